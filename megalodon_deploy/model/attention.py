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

from megalodon_deploy.model.operators import chunk_attention

Attend = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
"""(q [B,H,T,d], k [B,H,T,d], v [B,H,T,e], past_key [B,H,S,d], past_value [B,H,S,e]) -> [B,H,T,e]."""


# The dataclasses that are called are not frozen: torch.compile of PyTorch 2.11 does not find the fields of one that is.


@dataclass
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
    q: Tensor, k: Tensor, v: Tensor, past_key: Tensor, past_value: Tensor, position: Tensor, chunk_size: int
) -> Tensor:
    """Attention of a call inside one chunk. Autocast gives q, k and v different types: all take that of v."""
    q, k, past_key, past_value = (x.to(v.dtype) for x in (q, k, past_key, past_value))
    attended: Tensor = chunk_attention(q, k, v, past_key, past_value, position, chunk_size)
    return attended


@dataclass
class SameOffset:
    """All rows are `offset` tokens into their chunk; the call may cross any number of chunk edges."""

    offset: int
    position: Tensor  # [B] int64
    chunk_size: int

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, past_key: Tensor, past_value: Tensor) -> Tensor:
        if self.offset == 0:
            return _attend_chunks(q, k, v, self.chunk_size)
        head = self.chunk_size - self.offset
        own = q[:, :, :head], k[:, :, :head], v[:, :, :head]
        first = _attend_past(*own, past_key, past_value, self.position, self.chunk_size)
        if q.shape[2] <= head:
            return first
        rest = _attend_chunks(q[:, :, head:], k[:, :, head:], v[:, :, head:], self.chunk_size)
        return torch.cat([first, rest], 2)


@dataclass
class OneChunk:
    """Every row stays inside its chunk: (position mod C) + T <= C. Positions [B] int64 live on the device."""

    position: Tensor
    chunk_size: int

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, past_key: Tensor, past_value: Tensor) -> Tensor:
        return _attend_past(q, k, v, past_key, past_value, self.position, self.chunk_size)


@dataclass
class OnTheGrid:
    """Rows that cross chunk edges at different tokens.

    Each row is laid out from the begin of its open chunk: past rows, then the call's. All chunks of all rows are then
    one batch; queries that stand where past rows do are zeros, and nobody reads what comes of them.
    """

    offset: Tensor  # [B] int64, position mod C
    num_chunks: int  # that the call touches, of any row
    chunk_size: int

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, past_key: Tensor, past_value: Tensor) -> Tensor:
        place_BT = self.offset.unsqueeze(-1) + torch.arange(q.shape[2], device=q.device)

        def rows_at(x: Tensor) -> Tensor:
            return place_BT[:, None, :, None].expand_as(x)

        def lay(past: Tensor, new: Tensor) -> Tensor:
            beyond_BS = torch.arange(past.shape[2], device=q.device) >= self.offset.unsqueeze(-1)
            visible = past.to(new.dtype).masked_fill(beyond_BS[:, None, :, None], 0)
            room = self.num_chunks * self.chunk_size - past.shape[2]
            return functional.pad(visible, (0, 0, 0, room)).scatter(2, rows_at(new), new)

        queries = lay(q[:, :, :0], q)
        attended = _attend_chunks(queries, lay(past_key, k), lay(past_value, v), self.chunk_size)
        return attended.gather(2, rows_at(v))


def plan_attention(positions: Sequence[int], num_tokens: int, chunk_size: int, device: torch.device) -> Attend:
    """How to attend in a call of `num_tokens` whose rows have consumed `positions` tokens."""
    offsets = [position % chunk_size for position in positions]
    offset_B = torch.tensor(offsets, device=device)
    if len(set(offsets)) == 1:
        return SameOffset(offsets[0], offset_B, chunk_size)
    end = max(offsets) + num_tokens
    return (
        OneChunk(offset_B, chunk_size) if end <= chunk_size else OnTheGrid(offset_B, -(-end // chunk_size), chunk_size)
    )
