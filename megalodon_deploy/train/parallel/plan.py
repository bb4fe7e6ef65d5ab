"""The plan of a run on several processes: rows over `data` ranks, sequences over `chunk` ranks, layers over `tensor`.

Ranks with the same place on the `data` axis compute parts of the same rows; `tensor` is the inner axis, then `chunk`:
those that exchange most are neighbours on a machine. Gradients are summed over data and chunk ranks: by PyTorch's
DistributedDataParallel during the backward pass, or by FSDP2 that shares out the weights over these ranks, or after it
where tensor ranks hold parts of the weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from megalodon_deploy.model.megalodon import Megalodon, ModelState
from megalodon_deploy.train.objective import MicroBatch, Objective
from megalodon_deploy.train.parallel.chunk import ChunkParallel
from megalodon_deploy.train.parallel.dtensors import by_kind, local, scale_gradients, squared_norm, whole
from megalodon_deploy.train.parallel.layout import CHUNK, DATA, PIPELINE, TENSOR, Layout
from megalodon_deploy.train.parallel.shard import gathered_root, shard_weights
from megalodon_deploy.train.parallel.tensor import cut_state, join_state, parallelize
from megalodon_deploy.train.parts import staged
from megalodon_deploy.train.plan import Contexts, OneProcess, Snapshot, join_rows, training_tensors


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
        weights = init_device_mesh(device.type, alike, mesh_dim_names=(PIPELINE, "replicas", TENSOR))
        self._replicas, self._tensor = weights["replicas"], weights[TENSOR]
        self._collects = all(self._mesh.get_local_rank(axis) == 0 for axis in (DATA, CHUNK, TENSOR))  # for checkpoints

    def rows(self, batch_size: int) -> slice:
        count, place = batch_size // self.layout.data, self._mesh.get_local_rank(DATA)
        return slice(place * count, (place + 1) * count)

    def prepare(self, objective: Objective) -> nn.Module:
        module: nn.Module = objective if self.layout.shard else super().prepare(objective)
        self._config = objective.model.config
        if self.layout.tensor > 1:
            parallelize(objective.model, self._tensor)
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
