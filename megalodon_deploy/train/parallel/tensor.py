"""Tensor parallelism: W ranks hold parts of the matrices that widen a layer, and compute every token together.

    by rows of the matrix     wv, wr, fc1, fc3      a rank has E/W values and F/W feed-forward channels
    by columns                wh2, fc2              their products are summed over ranks
    whole on every rank       all else: embedding, norms, CEMA, wz, wh1, gamma, beta, output

E/W channels are H/W whole heads, or a part of one head's values where there are more ranks than heads. Queries and
keys are computed whole, a rank attends with those of its own heads. So a layer costs two sums of [B, T, D] forward;
backward three of [B, T, D] and one of its queries and keys, where one tensor goes into parts that differ by rank.
Key/value memory is that of the rank's heads.

Shapes: B rows, T tokens, D channels, H heads, d a head's key width, e its value width, S key/value rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleOutput,
    RowwiseParallel,
    parallelize_module,
)

from megalodon_deploy.config import MegalodonConfig
from megalodon_deploy.model.megalodon import Megalodon, ModelState
from megalodon_deploy.model.model_state import is_rows


class OwnHeads(ParallelStyle):
    """The rank's heads of queries and keys [B, T, 2, H, d] that all ranks have; gradients are summed over ranks."""

    def __init__(self, heads: slice) -> None:
        super().__init__()
        self.heads = heads

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def hook(module: nn.Module, inputs: object, both: Tensor) -> Tensor:
            same = DTensor.from_local(both, device_mesh, [Replicate()], run_check=False)
            return same.to_local(grad_placements=[Partial()])[:, :, :, self.heads]

        module.register_forward_hook(hook)
        return module


def parallelize(model: Megalodon, mesh: DeviceMesh) -> None:
    """Cut the model's layers over the ranks of a mesh of one axis. `model.config` is then that of the rank's part."""
    ways = mesh.size()
    whole_input = PrepareModuleOutput(
        output_layouts=Replicate(), desired_output_layouts=Replicate(), use_local_output=False
    )  # of fc1 and fc3: their gradients are added up before they are summed over ranks
    plan: dict[str, ParallelStyle] = {
        "mega.queries_and_keys": OwnHeads(own_heads(model.config, mesh.get_local_rank(), ways)),
        "mega.wv": ColwiseParallel(),
        "mega.wr": ColwiseParallel(),
        "mega.wh2": RowwiseParallel(),
        "nffn.norm": whole_input,
        "nffn.fc1": ColwiseParallel(),
        "nffn.fc2": RowwiseParallel(),
    }
    if model.config.swiglu:
        plan["nffn.fc3"] = ColwiseParallel()
    for layer in model.layers.children():  # of a stage, those that are here
        parallelize_module(layer, mesh, plan)
    model.config = _part(model.config, ways)


def own_heads(config: MegalodonConfig, rank: int, ways: int) -> slice:
    """The heads that a rank attends with, or the one that it has a part of."""
    begin = rank * config.num_heads // ways
    return slice(begin, begin + max(1, config.num_heads // ways))


def _part(config: MegalodonConfig, ways: int) -> MegalodonConfig:
    """The narrower model of a rank, whose state is a rank's."""
    heads = max(1, config.num_heads // ways)
    return dataclasses.replace(
        config,
        num_heads=heads,
        z_dim=heads * config.key_head_dim,
        value_dim=config.value_dim // ways,
        ffn_hidden_dim=config.ffn_hidden_dim // ways,
    )


def cut_state(state: ModelState, config: MegalodonConfig, rank: int, ways: int) -> ModelState:
    """What a rank keeps of the whole model's state."""
    heads = own_heads(config, rank, ways)
    width = config.value_dim // ways

    def cut(name: str, tensor: Tensor) -> Tensor:
        if name.startswith("past_key."):
            return tensor[:, heads]
        if name.startswith("past_value."):
            values_BSE = tensor.transpose(1, 2).flatten(2)[:, :, rank * width : (rank + 1) * width]
            return _to_heads(values_BSE, heads.stop - heads.start)
        return tensor

    return ModelState(state.position, {name: cut(name, tensor) for name, tensor in state.tensors.items()})


def join_state(parts: Sequence[ModelState], config: MegalodonConfig) -> ModelState:
    """The whole model's state from those of all ranks, in their order."""
    every = max(1, len(parts) // config.num_heads)  # ranks of a head

    def join(name: str) -> Tensor:
        tensors = [part.tensors[name] for part in parts]
        if not is_rows(name):
            return tensors[0]
        if name.startswith("past_key."):
            return torch.cat(tensors[::every], 1)
        values_BSE = torch.cat([tensor.transpose(1, 2).flatten(2) for tensor in tensors], 2)
        return _to_heads(values_BSE, config.num_heads)

    return ModelState(parts[0].position, {name: join(name) for name in parts[0].tensors})


def _to_heads(values_BSE: Tensor, num_heads: int) -> Tensor:
    """[B, H, S, e]."""
    batch, num_rows, width = values_BSE.shape
    return values_BSE.reshape(batch, num_rows, num_heads, width // num_heads).transpose(1, 2)
