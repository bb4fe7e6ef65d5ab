"""State memory in the main memory of the machine, for executors that bind plain buffers.

Letters as in `megalodon_deploy.state`; w: width of a key or value row of one head, none for the scale of a row.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from megalodon_deploy.config import MegalodonConfig
from megalodon_deploy.state import ROW_AXIS, StateSpec, concrete_shape, state_specs

BUCKET_ROWS = 64  # key/value memory grows by so many rows, so that a short chunk is not paid for as a full one


class KeyValueMemory:
    """Keys and values of the open chunk of every slot, in a capacity S that follows the longest of them.

    Each tensor is one allocation for a full chunk, of which the first bytes are laid out as [B, H, S, w]. The system
    hands out the pages behind it when they are first written.
    """

    def __init__(
        self, config: MegalodonConfig, num_slots: int, activation: np.dtype, bucket_rows: int = BUCKET_ROWS
    ) -> None:
        self._chunk_size = config.chunk_size
        self._bucket_rows = bucket_rows
        self._num_slots = num_slots
        self._specs = [spec for spec in state_specs(config) if spec.is_rows]
        self._flat = {
            spec.past: np.zeros(math.prod(self._shape(spec, config.chunk_size)), spec.numpy_dtype(activation))
            for spec in self._specs
        }
        self._used = [0] * num_slots  # rows of each slot's open chunk
        self.capacity = 0  # S
        self.views: dict[str, np.ndarray] = {}  # [B, H, S, w] by input name; new ones when the capacity changes
        self._lay_out(0, 0)

    def append(self, rows: slice, position_B: np.ndarray, new: Mapping[str, np.ndarray]) -> None:
        """Write the rows [b, H, T, w] (by output name) that a call returned for slots at `position_B` before it."""
        num_tokens = next(iter(new.values())).shape[ROW_AXIS]
        starts = [int(position) % self._chunk_size for position in position_B]
        slots = range(self._num_slots)[rows]
        self._use({slot: (start + num_tokens) % self._chunk_size for slot, start in zip(slots, starts, strict=True)})
        for index, (slot, start) in enumerate(zip(slots, starts, strict=True)):
            if start + num_tokens == self._chunk_size:
                continue  # the chunk is complete: nothing looks at its rows any more
            for spec in self._specs:
                self.views[spec.past][slot, :, start : start + num_tokens] = new[spec.present][index]

    def read(self, slot: int, num_rows: int) -> dict[str, np.ndarray]:
        """Copies [1, H, num_rows, w]."""
        return {name: view[slot : slot + 1, :, :num_rows].copy() for name, view in self.views.items()}

    def write(self, slot: int, num_rows: int, tensors: Mapping[str, np.ndarray]) -> None:
        """Set a slot's open chunk from tensors [1, H, num_rows, w]."""
        self._use({slot: num_rows})
        for name, view in self.views.items():
            view[slot, :, :num_rows] = tensors[name][0]

    def retire(self, slot: int, *, clear: bool) -> None:
        if clear:
            for view in self.views.values():
                view[slot] = 0
        self._use({slot: 0})

    def _use(self, used: Mapping[int, int]) -> None:
        kept_rows = max(self._used)
        for slot, num_rows in used.items():
            self._used[slot] = num_rows
        num_buckets = -(-max(self._used) // self._bucket_rows)
        capacity = min(num_buckets * self._bucket_rows, self._chunk_size)
        if capacity != self.capacity:
            self._lay_out(capacity, min(kept_rows, capacity))

    def _lay_out(self, capacity: int, kept_rows: int) -> None:
        """Change the capacity, moving the first `kept_rows` rows of every head to their new place.

        The rest is cleared: what lay there may come from another slot, and a NaN times a masked weight is a NaN.
        """
        self.capacity = capacity
        for spec in self._specs:
            old = self.views.get(spec.past)
            shape = self._shape(spec, capacity)
            view = self._flat[spec.past][: math.prod(shape)].reshape(shape)
            if old is not None and shape[0] * shape[1] > 1:  # a single head of a single slot stays where it is
                view[:, :, :kept_rows] = old[:, :, :kept_rows].copy()
            view[:, :, kept_rows:] = 0
            self.views[spec.past] = view

    def _shape(self, spec: StateSpec, capacity: int) -> tuple[int, ...]:
        return concrete_shape(spec.past_shape, batch=self._num_slots, capacity=capacity)
