"""Rotary embedding and attention within chunks.

Shapes: B rows, T tokens of the call, S key/value rows held from before, H heads, C chunk length, d key width, e value
width. Scores are q.k without a further scale; softmax is computed in float32 (float64 in a float64 model). Keys are
rotated before they enter attention or memory, so memory holds rotated keys.

How a call lies on the chunk grid is decided once per call, not per layer: `plan_attention` for calls of any length
whose positions are known to Python, `OneChunk` for calls that stay inside one chunk in every row and whose positions
are known to the device only (tracing, batches of streams).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

Attend = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
"""(q [B,H,T,d], k [B,H,T,d], v [B,H,T,e], past_key [B,H,S,d], past_value [B,H,S,e]) -> [B,H,T,e]."""


@dataclass(frozen=True)
class Rotation:
    """cos and sin of every token's angle, each pair's value twice, the sign folded into sin: [B, T, 1, 1, d] each."""

    cos: Tensor
    sin: Tensor

    @classmethod
    def at(cls, position_BT: Tensor, width: int, base: float, dtype: torch.dtype) -> Rotation:
        """Angles (position in the chunk) * base^(-2i/d), from float64."""
        exponent = torch.arange(0, width, 2, dtype=torch.float64, device=position_BT.device) / width
        angle = position_BT.double().unsqueeze(-1) * torch.pow(base, -exponent)
        cos, sin = angle.cos(), angle.sin()
        pairs = torch.stack([cos, cos], -1), torch.stack([-sin, sin], -1)
        return cls(*(pair.flatten(-2).to(dtype)[:, :, None, None] for pair in pairs))

    def __call__(self, x: Tensor) -> Tensor:
        """Rotate adjacent pairs of the last axis of x [B, T, ., H, d]: (a, b) -> (a cos - b sin, b cos + a sin)."""
        swapped = x.reshape(*x.shape[:-1], -1, 2).flip(-1).flatten(-2)
        return torch.addcmul(x * self.cos, swapped, self.sin)


def _attend_causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention among the call's own tokens."""
    return functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0)


def _attend_chunks(q: Tensor, k: Tensor, v: Tensor, chunk_size: int) -> Tensor:
    """Attention of tokens that begin at a chunk edge: whole chunks as one batch, then the rest."""
    batch, heads, num_tokens, _ = q.shape
    whole = num_tokens // chunk_size
    if whole == 0 or num_tokens == chunk_size:
        return _attend_causal(q, k, v)
    covered = whole * chunk_size

    def as_batch(x: Tensor) -> Tensor:
        chunks = x[:, :, :covered].reshape(batch, heads, whole, chunk_size, -1)
        return chunks.transpose(1, 2).flatten(0, 1)

    chunks = _attend_causal(as_batch(q), as_batch(k), as_batch(v))
    out = chunks.view(batch, whole, heads, chunk_size, -1).transpose(1, 2).reshape(batch, heads, covered, -1)
    if covered == num_tokens:
        return out
    rest = _attend_causal(q[:, :, covered:], k[:, :, covered:], v[:, :, covered:])
    return torch.cat([out, rest], 2)


def _attend_past(
    q: Tensor, k: Tensor, v: Tensor, past_key: Tensor, past_value: Tensor, masked_BS: Tensor | None = None
) -> Tensor:
    """Attention to held rows and to the call's own tokens, without copying the held rows.

    Where `masked_BS` [B, S] is true a held row has no effect, whatever it contains.
    """
    num_held, num_tokens = past_key.shape[2], k.shape[2]
    held = q @ past_key.transpose(-1, -2)
    own = q @ k.transpose(-1, -2)
    if masked_BS is not None:
        held = held.masked_fill(masked_BS[:, None, None], float("-inf"))
        past_value = past_value.masked_fill(masked_BS[:, None, :, None], 0)
    if num_tokens > 1:
        later = torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=q.device).triu(1)
        own = own.masked_fill(later, float("-inf"))
    scores = torch.cat([held, own], -1)
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(v.dtype)
    return weights[..., :num_held] @ past_value + weights[..., num_held:] @ v


@dataclass(frozen=True)
class SameOffset:
    """All rows are `offset` tokens into their chunk; the call may cross any number of chunk edges."""

    offset: int
    chunk_size: int

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, past_key: Tensor, past_value: Tensor) -> Tensor:
        if self.offset == 0:
            return _attend_chunks(q, k, v, self.chunk_size)
        past_key, past_value = past_key[:, :, : self.offset], past_value[:, :, : self.offset]
        head = self.chunk_size - self.offset
        if q.shape[2] <= head:
            return _attend_past(q, k, v, past_key, past_value)
        first = _attend_past(q[:, :, :head], k[:, :, :head], v[:, :, :head], past_key, past_value)
        rest = _attend_chunks(q[:, :, head:], k[:, :, head:], v[:, :, head:], self.chunk_size)
        return torch.cat([first, rest], 2)


@dataclass(frozen=True)
class OneChunk:
    """Every row stays inside its chunk: (position mod C) + T <= C. Offsets live on the device: [B] int64."""

    offset: Tensor

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, past_key: Tensor, past_value: Tensor) -> Tensor:
        held = torch.arange(past_key.shape[2], device=q.device)
        return _attend_past(q, k, v, past_key, past_value, held >= self.offset.unsqueeze(-1))


@dataclass(frozen=True)
class RowByRow:
    """Rows that cross chunk edges at different tokens, one after the other."""

    rows: tuple[SameOffset, ...]

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, past_key: Tensor, past_value: Tensor) -> Tensor:
        tensors = (q, k, v, past_key, past_value)
        return torch.cat([attend(*(x[i : i + 1] for x in tensors)) for i, attend in enumerate(self.rows)])


def plan_attention(positions: Sequence[int], num_tokens: int, chunk_size: int, device: torch.device) -> Attend:
    """How to attend in a call of `num_tokens` whose rows have consumed `positions` tokens."""
    offsets = [position % chunk_size for position in positions]
    if len(set(offsets)) == 1:
        return SameOffset(offsets[0], chunk_size)
    if max(offsets) + num_tokens <= chunk_size:
        return OneChunk(torch.tensor(offsets, device=device))
    return RowByRow(tuple(SameOffset(offset, chunk_size) for offset in offsets))
