"""The plan of a run on several processes: rows over `data` ranks, sequences over `chunk` ranks.

PyTorch's DistributedDataParallel sums the gradients over all of them. Ranks with the same place on the `data` axis
compute parts of the same rows; the `chunk` axis is the inner one, so its ranks are neighbours on a machine.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from megalodon_deploy.errors import TrainError
from megalodon_deploy.model.megalodon import Megalodon, ModelState
from megalodon_deploy.train.config import TrainConfig
from megalodon_deploy.train.objective import Objective
from megalodon_deploy.train.parallel.chunk import ChunkParallel
from megalodon_deploy.train.plan import Contexts, OneProcess, Snapshot

DATA, CHUNK = "data", "chunk"


@dataclass(frozen=True)
class Layout:
    """How many ranks each axis has."""

    data: int
    chunk: int

    @classmethod
    def of(cls, config: TrainConfig, world_size: int) -> Layout:
        """Raises `TrainError` when the run does not fit on `world_size` ranks."""
        chunk = config.parallel.chunk
        if world_size % chunk:
            raise TrainError(
                f"parallel.chunk = {chunk} does not divide the number of processes, {world_size}; "
                "start more: torchrun --nproc-per-node N -m megalodon_deploy.cli train ..."
            )
        data, run = world_size // chunk, config.run
        if run.batch_size % data:
            raise TrainError(f"run.batch_size = {run.batch_size} is not a multiple of {data} data-parallel processes")
        if run.minutes is not None and world_size > 1:
            raise TrainError("run.minutes: processes would end at different steps; give run.steps")
        segment = chunk * config.model.chunk_size
        if chunk > 1 and (config.data.rows == "documents" or run.seq_len % segment):
            raise TrainError(
                f"parallel.chunk = {chunk} needs data.rows = windows or streams and a run.seq_len that is a multiple "
                f"of {segment}; found {config.data.rows}, {run.seq_len}"
            )
        return cls(data, chunk)


class Distributed(OneProcess):
    """One rank of several; weights and moments are the same on all of them."""

    def __init__(self, layout: Layout, device: torch.device) -> None:
        super().__init__(device)
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.layout = layout
        self._chunks: ChunkParallel | None = None
        self._mesh: DeviceMesh = init_device_mesh(
            device.type, (layout.data, layout.chunk), mesh_dim_names=(DATA, CHUNK)
        )

    def rows(self, batch_size: int) -> slice:
        count, place = batch_size // self.layout.data, self._mesh.get_local_rank(DATA)
        return slice(place * count, (place + 1) * count)

    def prepare(self, objective: Objective) -> nn.Module:
        module: nn.Module = super().prepare(objective)
        if self.layout.chunk > 1:
            module = self._chunks = ChunkParallel(objective, self._mesh.get_group(CHUNK))
        return DistributedDataParallel(module)

    def recomputation(self) -> Contexts:
        return self._chunks.recomputation() if self._chunks else super().recomputation()

    def reduce_gradients(self, objective: nn.Module) -> None:
        """What the backward pass has left is the mean over ranks."""
        for parameter in objective.parameters():
            if parameter.grad is not None:
                parameter.grad *= self.world_size

    def sum(self, value: Tensor) -> Tensor:
        total = value.clone()
        dist.all_reduce(total)
        return total

    def any(self, flag: bool) -> bool:
        return bool(self.sum(torch.tensor(float(flag), device=self.device)))

    def capture(self, model: Megalodon, optimizer: Optimizer, state: ModelState | None) -> Snapshot | None:
        if state is not None:
            state = self._all_rows(state)
        return super().capture(model, optimizer, state) if self.rank == 0 else None

    def _all_rows(self, state: ModelState) -> ModelState:
        """As Python objects: key/value memory may have a different length on each rank."""
        from megalodon_deploy.train.trainer import join_rows

        group = self._mesh.get_group(DATA)
        parts: list[ModelState] = [state] * group.size()
        dist.all_gather_object(parts, ModelState(state.position, state.tensors), group=group)
        return join_rows(parts)

    def barrier(self) -> None:
        dist.barrier()
