"""What a session asks of a backend: one call for a range of rows, over memory that the backend owns.

Letters as in `megalodon_deploy.state`. A row is a slot of the memory; the stream in it starts over at position 0,
without clearing. Tensors of one row go by their `past_*` names, B = 1, with the position mod C key and value rows
of the open chunk and no others.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

import numpy as np

from megalodon_deploy.runtime.sampling import Choice

if TYPE_CHECKING:
    from megalodon_deploy.bundle import Precision


def activation_dtype(precision: Precision) -> np.dtype:
    """The numpy type of a bundle's activations."""
    if precision == "bf16":
        import ml_dtypes

        bfloat16: np.dtype = np.dtype(ml_dtypes.bfloat16)
        return bfloat16
    return np.dtype(np.float16 if precision == "fp16" else np.float32)


class SlotMemory(Protocol):
    """The state of `num_slots` streams and the logits that follow each of them, wherever the backend keeps them."""

    num_slots: int
    prefers_whole_steps: bool  # one token for all slots costs no more than for some

    def run(self, rows: slice, tokens_BT: np.ndarray, position_B: np.ndarray) -> None:
        """Feed int64 tokens [B, T] to the B rows of the contiguous range `rows`, which stand at int64 `position_B`.

        No row may cross a chunk edge. Rows outside the range keep their state and their logits.
        """
        ...

    def logits(self, slot: int) -> np.ndarray:
        """A copy of the logits [V] float32 that follow the last token that `run` fed to the slot."""
        ...

    def choose(self, choices: Mapping[int, Choice]) -> dict[int, int]:
        """The next token of each of these slots, from those logits; a generator that is drawn from advances.

        Left out are slots whose logits nothing can be chosen from: a NaN or an infinity is the largest.
        """
        ...

    def read(self, slot: int, position: int) -> dict[str, np.ndarray]:
        """A copy of one stream's state."""
        ...

    def write(self, slot: int, position: int, tensors: Mapping[str, np.ndarray]) -> None:
        """Put one stream's state, of the backend's dtypes, into a slot."""
        ...

    def copy(self, slot: int, source: SlotMemory, source_slot: int, position: int) -> None:
        """Put the state and logits of a stream of another memory of the same executor into a slot."""
        ...

    def retire(self, slot: int) -> None:
        """Forget the stream in a slot; memory is cleared only if that stream went non-finite."""
        ...


class Executor(Protocol):
    """A loaded model. Its weights are shared by all memories that it opens."""

    backend: str
    activation: np.dtype  # of key and value rows

    def open_slots(self, num_slots: int) -> SlotMemory: ...


class HostLogits(ABC):
    """A memory whose logits lie in main memory, where its choices are made too."""

    prefers_whole_steps = False

    def __init__(self, num_slots: int, vocab_size: int) -> None:
        self.num_slots = num_slots
        self.last_logits = np.zeros((num_slots, vocab_size), np.float32)  # what `run` fills, by slot

    @abstractmethod
    def write(self, slot: int, position: int, tensors: Mapping[str, np.ndarray]) -> None: ...

    def logits(self, slot: int) -> np.ndarray:
        return np.array(self.last_logits[slot])

    def choose(self, choices: Mapping[int, Choice]) -> dict[int, int]:
        tokens = {slot: choice.of(self.last_logits[slot]) for slot, choice in choices.items()}
        return {slot: token for slot, token in tokens.items() if token is not None}

    def copy(self, slot: int, source: SlotMemory, source_slot: int, position: int) -> None:
        self.write(slot, position, source.read(source_slot, position))
        self.last_logits[slot] = source.logits(source_slot)
