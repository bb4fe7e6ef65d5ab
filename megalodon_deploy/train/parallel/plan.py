"""The plan of a run on several processes: rows over `data` ranks, sequences over `chunk` ranks, layers over `tensor`.

Ranks with the same place on the `data` axis compute parts of the same rows; `tensor` is the inner axis, then `chunk`:
those that exchange most are neighbours on a machine. Gradients are summed over data and chunk ranks: by PyTorch's
DistributedDataParallel during the backward pass, or by FSDP2 that shares out the weights over these ranks, or after it
where tensor ranks hold parts of the weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from megalodon_deploy.errors import TrainError
from megalodon_deploy.model.megalodon import Megalodon, ModelState
from megalodon_deploy.train.config import TrainConfig
from megalodon_deploy.train.objective import MicroBatch, Objective
from megalodon_deploy.train.parallel.chunk import ChunkParallel
from megalodon_deploy.train.parallel.dtensors import by_kind, local, scale_gradients, squared_norm, whole
from megalodon_deploy.train.parallel.shard import gathered_root, shard_weights
from megalodon_deploy.train.parallel.tensor import cut_state, join_state, parallelize, supported_ways
from megalodon_deploy.train.parts import staged
from megalodon_deploy.train.plan import Contexts, OneProcess, Snapshot, join_rows, training_tensors

PIPELINE, DATA, CHUNK, TENSOR = "pipeline", "data", "chunk", "tensor"


@dataclass(frozen=True)
class Layout:
    """How many ranks each axis has, whether those of data and chunk share the weights out, and whether each rank writes
    its part of a checkpoint."""

    data: int
    chunk: int
    tensor: int = 1
    shard: bool = False
    sharded_checkpoints: bool = False
    pipeline: int = 1

    @property
    def replicas(self) -> int:
        """Ranks that compute gradients of the same weights."""
        return self.data * self.chunk

    @classmethod
    def of(cls, config: TrainConfig, world_size: int) -> Layout:
        """Raises `TrainError` when the run does not fit on `world_size` ranks."""
        parallel, run = config.parallel, config.run
        asked = {name: getattr(parallel, name) for name in (PIPELINE, CHUNK, TENSOR)}
        chunk, tensor = parallel.chunk, parallel.tensor
        data, left = divmod(world_size, math.prod(asked.values()))
        if left or not data:
            named = " x ".join(f"parallel.{name} = {number}" for name, number in asked.items() if number > 1)
            raise TrainError(
                f"{named} does not divide the number of processes, {world_size}; "
                "start more: torchrun --nproc-per-node N -m megalodon_deploy.cli train ..."
            )
        if tensor not in (ways := supported_ways(config.model)):
            raise TrainError(
                f"parallel.tensor = {tensor} does not cut this model's heads, value_dim and ffn_hidden_dim evenly; "
                f"these do: {', '.join(map(str, ways))}"
            )
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
        if config.parallel.shard and tensor > 1:
            raise TrainError(f"parallel.shard = true with parallel.tensor = {tensor}: choose one of the two")
        if parallel.pipeline > 1:
            _check_pipeline(config, run.batch_size // data)
        shard, sharded = parallel.shard, config.checkpoint.sharded
        return cls(data, chunk, tensor, shard, shard if sharded is None else sharded, parallel.pipeline)


def _check_pipeline(config: TrainConfig, num_rows: int) -> None:
    """Raises `TrainError` when a pipeline cannot run it; `num_rows` of a step go through each."""
    num_stages, micro = config.parallel.pipeline, config.run.micro_batch_size or num_rows
    asked = f"parallel.pipeline = {num_stages}"
    if num_stages > config.model.num_layers:
        raise TrainError(f"{asked} is more than model.num_layers = {config.model.num_layers}: a stage has a layer")
    if num_rows % micro:
        raise TrainError(
            f"{asked} needs micro-batches of one size: run.micro_batch_size = {micro} does not divide the {num_rows} "
            "rows of a step that go through a pipeline"
        )
    if config.parallel.chunk > 1 or config.parallel.shard:
        other = "shard = true" if config.parallel.shard else f"chunk = {config.parallel.chunk}"
        raise TrainError(f"{asked} with parallel.{other}: choose one of the two")
    if config.log.sample_tokens:
        raise TrainError(f"{asked} with log.sample_tokens: no process has the whole model; set it to 0")


class Distributed(OneProcess):
    """One rank of several. Weights and moments are the same on all of them, or shared out."""

    def __init__(self, layout: Layout, device: torch.device) -> None:
        super().__init__(device)
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.layout = layout
        self._chunks: ChunkParallel | None = None
        self._sharded: FSDPModule | None = None
        # Its own group: checkpoints are written while the next steps are computed.
        self.checkpoint_group = dist.new_group(backend="gloo") if layout.sharded_checkpoints else None
        shape = (layout.pipeline, layout.data, layout.chunk, layout.tensor)
        self._mesh: DeviceMesh = init_device_mesh(device.type, shape, mesh_dim_names=(PIPELINE, DATA, CHUNK, TENSOR))
        alike = (layout.pipeline, layout.replicas, layout.tensor)
        self._replicas = init_device_mesh(device.type, alike, mesh_dim_names=(PIPELINE, "replicas", TENSOR))["replicas"]
        self._collects = all(self._mesh.get_local_rank(axis) == 0 for axis in (DATA, CHUNK, TENSOR))  # for checkpoints

    def rows(self, batch_size: int) -> slice:
        count, place = batch_size // self.layout.data, self._mesh.get_local_rank(DATA)
        return slice(place * count, (place + 1) * count)

    def prepare(self, objective: Objective) -> nn.Module:
        module: nn.Module = objective if self.layout.shard else super().prepare(objective)
        self._config = objective.model.config
        if self.layout.tensor > 1:
            parallelize(objective.model, self._mesh[TENSOR])
        if self.layout.chunk > 1:
            module = self._chunks = ChunkParallel(objective, self._mesh.get_group(CHUNK))
        if self.layout.shard:
            self._sharded = shard_weights(module, objective.model, self._replicas)
            objective.num_runs = self._most
            return module
        in_parts = self.layout.tensor > 1 or self.layout.pipeline > 1
        return module if in_parts else DistributedDataParallel(module)

    def _most(self, count: int) -> int:
        """The largest count of any rank."""
        most = torch.tensor(count, device=self.device)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        return int(most)

    def parameter_groups(self, objective: nn.Module) -> list[list[nn.Parameter]]:
        return by_kind(objective.parameters())

    def accumulate(
        self, objective: nn.Module, parts: Sequence[MicroBatch], num_targets: int
    ) -> tuple[Tensor, list[ModelState | None]]:
        """Whole gradients are exchanged once, in the last backward pass; FSDP2 keeps none, and exchanges in each."""
        if not isinstance(objective, DistributedDataParallel):
            return super().accumulate(objective, parts, num_targets)
        with objective.no_sync():
            first, states = super().accumulate(objective, parts[:-1], num_targets)
        last, last_states = super().accumulate(objective, parts[-1:], num_targets)
        return first + last, states + last_states

    def recomputation(self) -> Contexts:
        return self._chunks.recomputation() if self._chunks else super().recomputation()

    def reduce_gradients(self, objective: nn.Module) -> None:
        if self._sharded is not None:
            return  # the backward pass has left sums
        gradients = [local(parameter.grad) for parameter in objective.parameters() if parameter.grad is not None]
        if isinstance(objective, DistributedDataParallel):  # the backward pass has left the mean over ranks
            for gradient in gradients:
                gradient *= self.world_size
        elif self.layout.replicas > 1:
            for work in [
                dist.all_reduce(gradient, group=self._replicas.get_group(), async_op=True) for gradient in gradients
            ]:
                work.wait()

    def clip_gradients(self, objective: nn.Module, max_norm: float) -> Tensor:
        norm = squared_norm(objective.parameters()).sqrt()
        return scale_gradients(objective.parameters(), max_norm, norm)

    def reading(self) -> AbstractContextManager[None]:
        return nullcontext() if self._sharded is None else gathered_root(self._sharded)

    def sum(self, value: Tensor) -> Tensor:
        total = value.clone()
        dist.all_reduce(total, group=self._replicas.get_group())
        return total

    def any(self, flag: bool) -> bool:
        total = torch.tensor(float(flag), device=self.device)
        dist.all_reduce(total)
        return bool(total)

    def capture(self, model: Megalodon, optimizer: Optimizer, state: ModelState | None) -> Snapshot | None:
        state = state and self._whole_state(state)
        if self._sharded is not None:
            self._sharded.reshard()  # an evaluation leaves the root's weights whole
        if self.checkpoint_group is None:
            snapshot = super().capture(model, optimizer, state)
            return snapshot if self._collects else None
        weights, moments = map(staged, training_tensors(model, optimizer))
        stream = {} if state is None or self.rank else {"position": state.position, **state.tensors}
        return Snapshot(weights, moments, staged(stream))

    def _whole_state(self, state: ModelState) -> ModelState:
        """Of all rows; on rank 0 at least."""
        state = join_state(self._gathered(state, TENSOR), self._config)
        return join_rows(self._gathered(state, DATA))

    def _gathered(self, state: ModelState, axis: str) -> list[ModelState]:
        """As Python objects: key/value memory may have a different length on each rank."""
        group = self._mesh.get_group(axis)
        parts: list[ModelState] = [state] * group.size()
        dist.all_gather_object(parts, ModelState(state.position, state.tensors), group=group)
        return parts

    def own_state(self, state: ModelState) -> ModelState:
        return cut_state(state, self._config, self._mesh.get_local_rank(TENSOR), self.layout.tensor)

    def _whole(self, tensor: Tensor) -> Tensor:
        full = whole(tensor)
        return full if self._collects else full.new_empty(0)  # others keep no copy

    def barrier(self) -> None:
        dist.barrier()
