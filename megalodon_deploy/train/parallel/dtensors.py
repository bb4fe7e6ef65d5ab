"""Parameters of which a rank may hold a part, as DTensors, beside others that it holds whole.

PyTorch's operators on lists of tensors take one kind at a time.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.tensor import DTensor

_CLIP_EPSILON = 1e-6  # as in PyTorch's own clipping


def by_kind(parameters: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Groups of parameters that lie on ranks alike."""
    groups: dict[Any, list[nn.Parameter]] = {}
    for parameter in parameters:
        kind = (parameter.device_mesh, parameter.placements) if isinstance(parameter, DTensor) else None
        groups.setdefault(kind, []).append(parameter)
    return list(groups.values())


def whole(tensor: Tensor) -> Tensor:
    """All of it; every rank that has a part takes part."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of it, the same memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def squared_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """The sum of all gradients' squares, float64: one sum over ranks for each kind, not for each tensor."""
    return torch.stack([_square(group) for group in _gradients(parameters)]).sum()


def scale_gradients(parameters: Iterable[nn.Parameter], max_norm: float, norm: Tensor) -> Tensor:
    """Make a norm of `norm` at most `max_norm`, as `clip_grad_norm_` does; returns `norm`."""
    factor = (max_norm / (norm + _CLIP_EPSILON)).clamp(max=1)
    for group in _gradients(parameters):
        torch._foreach_mul_([local(gradient) for gradient in group], factor.to(group[0].dtype))
    return norm


def _gradients(parameters: Iterable[nn.Parameter]) -> list[list[Tensor]]:
    groups = [[parameter.grad for parameter in group if parameter.grad is not None] for group in by_kind(parameters)]
    return [group for group in groups if group]


def _square(gradients: list[Tensor]) -> Tensor:
    """The sum of all squares, float64, of gradients that are cut alike."""
    square = torch.stack(torch._foreach_norm([local(gradient) for gradient in gradients])).double().square().sum()
    if isinstance(first := gradients[0], DTensor):
        for axis, placement in enumerate(first.placements):
            assert not placement.is_partial(), "Bug: a gradient that is not summed"
            if not placement.is_replicate():
                dist.all_reduce(square, group=first.device_mesh.get_group(axis))
    return square
