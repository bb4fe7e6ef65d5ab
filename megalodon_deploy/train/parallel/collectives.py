"""Collectives that gradients flow through, and how many bytes they move.

W ranks of a group.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

Group = dist.ProcessGroup


class Traffic:
    """Bytes that this rank has received through the collectives below, for checks of what a mode claims."""

    received = 0


class _AllGather(torch.autograd.Function):
    """[...] on each rank -> [W, ...] on all. The gradient of a rank's part is the sum of what all ranks send back."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Group) -> Tensor:
        ctx.group = group
        parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(group.size())]
        dist.all_gather(parts, tensor.contiguous(), group=group)
        Traffic.received += (group.size() - 1) * tensor.nbytes
        return torch.stack(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        # An all-reduce, since gloo has no reduce-scatter of every type: twice the bytes, and few.
        total = grads[0].contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        Traffic.received += 2 * (ctx.group.size() - 1) * total[0].nbytes  # of a ring
        return total[ctx.group.rank()], None


def all_gather(tensor: Tensor, group: Group) -> Tensor:
    """Every rank's `tensor`, [W, ...]; differentiable. Shapes and dtypes are the same on all ranks."""
    gathered: Tensor = _AllGather.apply(tensor, group)  # type: ignore[no-untyped-call]
    return gathered


class _TakePart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, gathered: Tensor) -> Tensor:
        ctx.shape, ctx.options = gathered.shape, {"dtype": gathered.dtype, "device": gathered.device}
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0], torch.zeros(ctx.shape, **ctx.options)


def take_part(tensor: Tensor, gathered: Tensor) -> Tensor:
    """`tensor` itself, with the backward pass of `gathered` behind it: a rank that uses nothing of what it gathered
    must still send the others their gradients."""
    tied: Tensor = _TakePart.apply(tensor, gathered)  # type: ignore[no-untyped-call]
    return tied
