"""Parameters of which a rank may hold a part, as DTensors, beside others that it holds whole.

PyTorch's operators on lists of tensors take one kind at a time.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


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


def part_of(tensor: Tensor, like: Tensor) -> Tensor:
    """This rank's part of a whole tensor that all ranks have, as `like` is spread; nothing is sent."""
    tensor = tensor.to(like.device)
    if isinstance(like, DTensor):
        return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)
    return tensor


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """As `clip_grad_norm_`, for parameters of several kinds."""
    groups = by_kind(parameter for parameter in parameters if parameter.grad is not None)
    norms = [whole(nn.utils.get_total_norm([p.grad for p in group if p.grad is not None])) for group in groups]
    norm: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    for group in groups:
        nn.utils.clip_grads_with_norm_(group, max_norm, norm)
    return norm
