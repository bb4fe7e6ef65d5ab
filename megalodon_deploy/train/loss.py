"""Cross-entropy of next tokens without the logits of all positions at once.

M positions, D channels, V vocabulary. The gradient of a block of logits is softmax - onehot: it is known as soon as
the logits are, so one pass over blocks of positions computes the loss and the gradients of both factors, and neither
logits nor probabilities outlive their block.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

NO_TARGET = -100  # a position where nothing is to be predicted


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Sum over positions; gradients come from the forward pass and are scaled in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x_MD: Tensor, matrix_VD: Tensor, targets_M: Tensor, at_once: int) -> Tensor:
        wide = torch.promote_types(matrix_VD.dtype, torch.float32)
        needs_x, needs_matrix = ctx.needs_input_grad[:2]
        grad_x = torch.empty_like(x_MD) if needs_x else None
        grad_matrix = torch.zeros_like(matrix_VD, dtype=wide) if needs_matrix else None
        loss = x_MD.new_zeros((), dtype=wide)
        for begin in range(0, x_MD.shape[0], at_once):
            part = slice(begin, begin + at_once)
            x, targets = x_MD[part], targets_M[part]
            logits = functional.linear(x, matrix_VD).to(wide)
            valid = targets != NO_TARGET
            target = targets.where(valid, 0).unsqueeze(-1)
            log_sum = logits.logsumexp(-1, keepdim=True)
            loss += ((log_sum - logits.gather(-1, target)).squeeze(-1) * valid).sum()
            if needs_x or needs_matrix:
                grad = logits.sub_(log_sum).exp_()
                grad.scatter_add_(-1, target, torch.full_like(log_sum, -1))
                grad = grad.mul_(valid.unsqueeze(-1)).to(x.dtype)
                if grad_x is not None:
                    torch.mm(grad, matrix_VD, out=grad_x[part])
                if grad_matrix is not None:
                    grad_matrix += grad.t() @ x
        ctx.save_for_backward(grad_x, grad_matrix)
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad_loss,) = grads
        grad_x, grad_matrix = ctx.saved_tensors
        return (
            None if grad_x is None else grad_x.mul_(grad_loss),
            None if grad_matrix is None else grad_matrix.mul_(grad_loss),
            None,
            None,
        )


def chunked_cross_entropy(x_MD: Tensor, matrix_VD: Tensor, targets_M: Tensor, at_once: int) -> Tensor:
    """Sum of the cross-entropy of logits x matrix^T over positions whose target is not `NO_TARGET`, in nats.

    Args:
        x_MD, matrix_VD: any floating dtypes; under autocast the products run in its dtype.
        targets_M: int64.
        at_once: positions whose logits exist at a time.

    Returns a float32 scalar (float64 for a float64 matrix). Its gradient can be taken once.
    """
    device = x_MD.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else matrix_VD.dtype
    with torch.autocast(device, enabled=False):
        loss: Tensor = _ChunkedCrossEntropy.apply(x_MD.to(dtype), matrix_VD.to(dtype), targets_M, at_once)  # type: ignore[no-untyped-call]
    return loss
