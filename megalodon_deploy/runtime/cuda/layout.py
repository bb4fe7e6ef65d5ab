"""Sizes and shapes of everything that a memory of slots keeps on a GPU, from the state table alone.

Key and value rows, and whatever else the table appends, lie in memory of a fixed capacity: a full chunk, in which a row
goes to position mod C. Tensors that a call replaces exist twice, and the halves swap with each call.
Letters as in `megalodon_deploy.state`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from megalodon_deploy.config import MegalodonConfig
from megalodon_deploy.runtime.cuda.arena import aligned
from megalodon_deploy.state import LOGITS, POSITION, TOKENS, StateSpec, concrete_shape, state_specs

INT64_BYTES = 8


@dataclass(frozen=True)
class Tensor:
    """A dense tensor in device memory."""

    address: int
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class RowTensor:
    """Memory [B, heads, C, ...] of rows, of which a call returns the new ones [B, heads, T, ...]."""

    spec: StateSpec
    dtype: np.dtype
    heads: int
    row_bytes: int
    chunk_size: int

    @property
    def head_bytes(self) -> int:
        """From one head's rows to the next."""
        return self.chunk_size * self.row_bytes

    @property
    def slot_bytes(self) -> int:
        return self.heads * self.head_bytes


@dataclass(frozen=True)
class PairTensor:
    """A tensor that a call reads from one half of a pair and writes to the other; logits are only written."""

    name: str  # in the pair: the `past_*` name, or `logits`
    output: str
    shape: tuple[int, ...]  # of one slot
    dtype: np.dtype

    @property
    def slot_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Layout:
    """Of a memory with `num_slots` slots. One that has several takes one token a call; one that has one takes C."""

    def __init__(
        self, config: MegalodonConfig, num_slots: int, activation: np.dtype, *, returns_all_logits: bool
    ) -> None:
        self.num_slots = num_slots
        self.chunk_size = config.chunk_size
        self.vocab_size = config.vocab_size
        self.max_tokens = config.chunk_size if num_slots == 1 else 1
        self._returns_all_logits = returns_all_logits
        specs = list(state_specs(config))
        self.rows = [self._row_tensor(spec, activation) for spec in specs if spec.is_rows]
        self.recurrent = [
            PairTensor(
                spec.past, spec.present, concrete_shape(spec.past_shape, batch=1)[1:], spec.numpy_dtype(activation)
            )
            for spec in specs
            if not spec.is_rows
        ]
        self.logits = PairTensor(LOGITS, LOGITS, (config.vocab_size,), np.dtype(np.float32))

    @property
    def pair(self) -> list[PairTensor]:
        return [*self.recurrent, self.logits]

    def row_sizes(self) -> dict[str, int]:
        """Bytes of the memory of rows, by input name."""
        return {tensor.spec.past: self.num_slots * tensor.slot_bytes for tensor in self.rows}

    def pair_sizes(self) -> dict[str, int]:
        """Bytes of one half of the pair."""
        return {tensor.name: self.num_slots * tensor.slot_bytes for tensor in self.pair}

    def scratch_sizes(self) -> dict[str, int]:
        """Bytes of what only passes through a call, by name: new rows, logits of a prompt, tokens and positions."""
        num_rows = self.num_slots * self.max_tokens
        sizes = {tensor.spec.present: num_rows * tensor.heads * tensor.row_bytes for tensor in self.rows}
        if self._returns_all_logits:
            sizes[LOGITS] = self.max_tokens * self.num_slots * self.logits.slot_bytes
        return sizes | {_CONTROL: self.control_bytes(self.max_tokens)}

    def control_bytes(self, num_tokens: int) -> int:
        """Positions, then tokens, as one piece: one copy brings both to the GPU."""
        return self.tokens_offset + self.num_slots * num_tokens * INT64_BYTES

    @property
    def tokens_offset(self) -> int:
        return aligned(self.num_slots * INT64_BYTES)

    def tensors(
        self,
        num_tokens: int,
        rows: Mapping[str, int],
        past: Mapping[str, int],
        present: Mapping[str, int],
        scratch: Mapping[str, int],
    ) -> dict[str, Tensor]:
        """Every input and output of a call of all slots, by name. Addresses: of rows, both halves, and scratch."""
        batch, int64 = self.num_slots, np.dtype(np.int64)
        control = scratch[_CONTROL]
        bound = {
            TOKENS: Tensor(control + self.tokens_offset, (batch, num_tokens), int64),
            POSITION: Tensor(control, (batch,), int64),
        }
        for row in self.rows:
            spec = row.spec
            memory = concrete_shape(spec.past_shape, batch=batch, capacity=self.chunk_size)
            new = concrete_shape(spec.present_shape, batch=batch, tokens=num_tokens)
            bound[spec.past] = Tensor(rows[spec.past], memory, row.dtype)
            bound[spec.present] = Tensor(scratch[spec.present], new, row.dtype)
        for pair in self.recurrent:
            bound[pair.name] = Tensor(past[pair.name], (batch, *pair.shape), pair.dtype)
            bound[pair.output] = Tensor(present[pair.name], (batch, *pair.shape), pair.dtype)
        num_logits = num_tokens if self._returns_all_logits else 1
        address = scratch[LOGITS] if num_logits > 1 else present[LOGITS]
        bound[LOGITS] = Tensor(address, (batch, num_logits, self.vocab_size), self.logits.dtype)
        return bound

    def control(self, scratch: Mapping[str, int]) -> int:
        return scratch[_CONTROL]

    def _row_tensor(self, spec: StateSpec, activation: np.dtype) -> RowTensor:
        dtype = spec.numpy_dtype(activation)
        _, heads, _, *width = concrete_shape(spec.past_shape, batch=1)
        return RowTensor(spec, dtype, heads, math.prod(width) * dtype.itemsize, self.chunk_size)


_CONTROL = "positions and tokens"
