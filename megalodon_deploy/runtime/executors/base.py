"""What a session asks of a backend: one call for a range of rows, over memory that the backend owns.

Letters as in `megalodon_deploy.state`. A row is a slot of the memory; the stream in it starts over at position 0,
without clearing. Tensors of one row go by their `past_*` names, B = 1, with the position mod C key and value rows
of the open chunk and no others.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np


class SlotMemory(Protocol):
    """The state of `num_slots` streams, wherever the backend keeps it."""

    num_slots: int

    def run(self, rows: slice, tokens_BT: np.ndarray, position_B: np.ndarray) -> np.ndarray:
        """Feed int64 tokens [B, T] to the B rows of the contiguous range `rows`, which stand at int64 `position_B`.

        No row may cross a chunk edge. Rows outside the range keep their state. Returns logits [B, K, V] float32,
        valid until the next call.
        """
        ...

    def read(self, slot: int, position: int) -> dict[str, np.ndarray]:
        """A copy of one stream's state."""
        ...

    def write(self, slot: int, position: int, tensors: Mapping[str, np.ndarray]) -> None:
        """Put one stream's state, of the backend's dtypes, into a slot."""
        ...

    def retire(self, slot: int) -> None:
        """Forget the stream in a slot; memory is cleared only if that stream went non-finite."""
        ...


class Executor(Protocol):
    """A loaded model. Its weights are shared by all memories that it opens."""

    backend: str
    activation: np.dtype  # of key and value rows

    def open_slots(self, num_slots: int) -> SlotMemory: ...
