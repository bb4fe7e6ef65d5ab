"""Collectives that gradients flow through.

W ranks of a group.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

Group = dist.ProcessGroup


class _AllGather(torch.autograd.Function):
    """[...] on each rank -> [W, ...] on all. The gradient of a rank's part is the sum of what all ranks send back."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Group, gathered: Tensor | None) -> Tensor:
        ctx.group = group
        if gathered is not None:
            return gathered.view_as(gathered)
        parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(group.size())]
        dist.all_gather(parts, tensor.contiguous(), group=group)
        return torch.stack(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        # An all-reduce, since gloo has no reduce-scatter of every type: twice the bytes, and few.
        total = grads[0].contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        return total[ctx.group.rank()], None, None


def all_gather(tensor: Tensor, group: Group, gathered: Tensor | None = None) -> Tensor:
    """Every rank's `tensor`, [W, ...]; differentiable. Shapes and dtypes are the same on all ranks.

    With `gathered`, the result of an earlier call, nothing is sent: a recomputation for the backward pass.
    """
    result: Tensor = _AllGather.apply(tensor, group, gathered)  # type: ignore[no-untyped-call]
    return result


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
