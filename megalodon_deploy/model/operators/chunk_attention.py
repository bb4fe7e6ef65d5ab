r"""Attention to the open chunk: past rows and the call's own, for calls that stay inside a chunk.

Shapes: B rows, H heads, T tokens, S past rows, d key width, e value width, C chunk length. With n = position mod C,
token t sees past rows j < n and the call's rows i <= t; scores are q.k without a further factor, softmax is float32
(float64 in a float64 model).

**Backward.** With weights P, both parts of them side by side, and G the gradient of the output,

    G_v = P^T G,   G_P = G v^T,   G_x = P (G_P - sum_j P G_P),   G_q = G_x k,   G_k = G_x^T q

computed from recomputed weights, in float32 at least. Rows that nobody sees are replaced by zeros first, so that
whatever they hold, NaN included, has no effect and takes no gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megalodon_deploy.model.operators import kernels

_MAX_KEY_WIDTH, _MAX_VALUE_WIDTH = 256, 2048  # MGD_MAX_KEY_WIDTH, MGD_MAX_VALUE_WIDTH


def _visible_past(past: Tensor, masked_BS: Tensor | None) -> Tensor:
    """Rows [B, H, S, .] with zeros where `masked_BS` is true."""
    return past if masked_BS is None else past.masked_fill(masked_BS[:, None, :, None], 0)


def _trim(
    past_key: Tensor, past_value: Tensor, position: Tensor, chunk_size: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Past rows as far as any row of the batch sees them, and where [B, S] they are masked; None: nowhere.

    On the CPU, where positions cost nothing to read, memory is cut without a copy.
    """
    offset_B = position % chunk_size
    if position.device.type == "cpu":
        offsets = offset_B.tolist()
        most = max(offsets)
        past_key, past_value = past_key[:, :, :most], past_value[:, :, :most]
        if min(offsets) == most <= past_key.shape[2]:
            return past_key, past_value, None
    masked_BS = torch.arange(past_key.shape[2], device=position.device) >= offset_B.unsqueeze(-1)
    return past_key, past_value, masked_BS


def _weights(q: Tensor, k: Tensor, past_key: Tensor, masked_BS: Tensor | None) -> Tensor:
    """[B, H, T, S + T], float32 at least."""
    past, own = q @ past_key.transpose(-1, -2), q @ k.transpose(-1, -2)
    if masked_BS is not None:
        past = past.masked_fill(masked_BS[:, None, None], float("-inf"))
    num_tokens = k.shape[2]
    if num_tokens > 1:
        later = torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=q.device).triu(1)
        own = own.masked_fill(later, float("-inf"))
    scores = torch.cat([past, own], -1)
    return scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))


def _is_decode(q: Tensor, v: Tensor) -> bool:
    """One token, of heads that the kernel takes. Many tokens are matrix products: PyTorch has tensor cores for them."""
    return q.shape[2] == 1 and q.shape[3] <= _MAX_KEY_WIDTH and v.shape[3] <= _MAX_VALUE_WIDTH


@torch.library.custom_op("megalodon::chunk_attention", mutates_args=())
def chunk_attention(
    q: Tensor, k: Tensor, v: Tensor, past_key: Tensor, past_value: Tensor, position: Tensor, chunk_size: int
) -> Tensor:
    """Attention of T more tokens, all in one chunk: (position mod C) + T <= C in every row (not checked).

    Args:
        q, k: [B, H, T, d]; v: [B, H, T, e], all of one floating dtype. Keys are rotated.
        past_key, past_value: [B, H, S, d], [B, H, S, e] of the same dtype, S at least position mod C in every row.
            Rows from position mod C on have no effect, whatever they hold.
        position: [B] int64, tokens consumed before the call.
        chunk_size: C.

    Returns:
        [B, H, T, e].
    """
    if _is_decode(q, v) and (found := kernels.kernels_for(q)):
        return found.chunk_attention(q, k, v, past_key, past_value, position, chunk_size)
    past_key, past_value, masked_BS = _trim(past_key, past_value, position, chunk_size)
    weights = _weights(q, k, past_key, masked_BS).to(v.dtype)
    num_past = past_key.shape[2]
    return weights[..., :num_past] @ _visible_past(past_value, masked_BS) + weights[..., num_past:] @ v


@chunk_attention.register_fake
def _chunk_attention_fake(
    q: Tensor, k: Tensor, v: Tensor, past_key: Tensor, past_value: Tensor, position: Tensor, chunk_size: int
) -> Tensor:
    return v.new_empty(v.shape)


@torch.library.custom_op("megalodon::chunk_attention_backward", mutates_args=())
def chunk_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past_key: Tensor,
    past_value: Tensor,
    position: Tensor,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, past_key, past_value, each of its tensor's shape and dtype."""
    num_held = past_key.shape[2]
    wide = torch.promote_types(q.dtype, torch.float32)
    past_key, past_value, masked_BS = _trim(past_key, past_value, position, chunk_size)
    keys = torch.cat([_visible_past(past_key, masked_BS), k], 2).to(wide)
    values = torch.cat([_visible_past(past_value, masked_BS), v], 2).to(wide)
    weights = _weights(q, k, past_key, masked_BS).to(wide)
    grad, wide_q = grad.to(wide), q.to(wide)
    grad_weights = grad @ values.transpose(-1, -2)
    grad_scores = weights * (grad_weights - (weights * grad_weights).sum(-1, keepdim=True))
    grad_keys, grad_values = grad_scores.transpose(-1, -2) @ wide_q, weights.transpose(-1, -2) @ grad
    num_past = past_key.shape[2]

    def split(grad_rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Gradients of past rows, with zeros for those that were cut off, and of the call's own."""
        past = torch.nn.functional.pad(grad_rows[:, :, :num_past], (0, 0, 0, num_held - num_past))
        return past.to(dtype).contiguous(), grad_rows[:, :, num_past:].to(dtype).contiguous()

    grad_past_key, grad_k = split(grad_keys, k.dtype)
    grad_past_value, grad_v = split(grad_values, v.dtype)
    return (grad_scores @ keys).to(q.dtype), grad_k, grad_v, grad_past_key, grad_past_value


@chunk_attention_backward.register_fake
def _chunk_attention_backward_fake(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past_key: Tensor,
    past_value: Tensor,
    position: Tensor,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    empty = [tensor.new_empty(tensor.shape) for tensor in (q, k, v, past_key, past_value)]
    return empty[0], empty[1], empty[2], empty[3], empty[4]


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, ctx.chunk_size = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    return *chunk_attention_backward(grad, *ctx.saved_tensors, ctx.chunk_size), None, None


chunk_attention.register_autograd(_backward, setup_context=_setup_context)
