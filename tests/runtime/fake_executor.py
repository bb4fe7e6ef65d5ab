"""A backend without a model: a toy recurrence that notices every mistake of the slot logic.

Logits depend on every token since the stream began, on the tokens of the open chunk by their place in it, and on the
position. Idle memory is poisoned with NaN, so that a stream that reads another's memory shows.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from megalodon_deploy.bundle import Bundle, Manifest, TokenizerInfo
from megalodon_deploy.config import MegalodonConfig
from megalodon_deploy.runtime.executors.base import HostLogits
from megalodon_deploy.runtime.session import Session
from megalodon_deploy.state import zero_state


class FakeMemory(HostLogits):
    def __init__(self, executor: FakeExecutor, num_slots: int) -> None:
        super().__init__(num_slots, executor.config.vocab_size)
        self.calls: list[tuple[int, int, int]] = []  # (first row, last row + 1, tokens) of every call
        self.retired: list[int] = []
        self._config = executor.config
        self._activation = executor.activation
        self._state = {
            name: np.full_like(array, np.nan)
            for name, array in zero_state(
                self._config, batch=num_slots, capacity=self._config.chunk_size, activation=self._activation
            ).items()
        }

    def run(self, rows: slice, tokens_BT: np.ndarray, position_B: np.ndarray) -> None:
        slots = range(self.num_slots)[rows]
        assert tokens_BT.shape == (len(slots), tokens_BT.shape[1])
        assert position_B.shape == (len(slots),)
        assert (position_B % self._config.chunk_size + tokens_BT.shape[1] <= self._config.chunk_size).all()
        self.calls.append((rows.start, rows.stop, tokens_BT.shape[1]))
        for row, slot in enumerate(slots):
            self.last_logits[slot] = self._run_row(slot, tokens_BT[row], int(position_B[row]))

    def _run_row(self, slot: int, tokens_T: np.ndarray, position: int) -> np.ndarray:
        memory, keys = self._state["past_cema.0"][slot], self._state["past_key.0"][slot]
        if position == 0:
            for name in ("past_cema.0", "past_norm.0", "past_norm.final"):
                self._state[name][slot] = 0
        for token in tokens_T:
            start = position % self._config.chunk_size
            keys[:, start] = token / 8
            self._state["past_value.0"][slot, :, start] = 1
            memory[...] = 0.75 * memory + np.cos(np.arange(memory.size).reshape(memory.shape) + token)
            position += 1
        in_chunk = keys[0, : start + 1, 0] * np.arange(1, start + 2)
        phases = np.arange(self._config.vocab_size)
        mixed = np.cos(np.outer(phases + 1, memory.ravel()[:8])).sum(1)
        return (mixed + np.cos(phases * in_chunk.sum()) + np.cos(phases + position)).astype(np.float32)

    def read(self, slot: int, position: int) -> dict[str, np.ndarray]:
        num_rows = position % self._config.chunk_size
        tensors = {}
        for name, array in self._state.items():
            row = array[slot : slot + 1].copy()
            is_rows = name.startswith(("past_key", "past_value"))
            tensors[name] = row[:, :, :num_rows] if is_rows else row
        return tensors

    def write(self, slot: int, position: int, tensors: Mapping[str, np.ndarray]) -> None:
        num_rows = position % self._config.chunk_size
        for name, array in self._state.items():
            array[slot] = np.nan
            if name.startswith(("past_key", "past_value")):
                assert tensors[name].dtype == self._activation
                array[slot, :, :num_rows] = tensors[name][0]
            else:
                array[slot] = tensors[name][0]

    def retire(self, slot: int) -> None:
        self.retired.append(slot)
        for array in self._state.values():
            array[slot] = np.nan


class FakeExecutor:
    backend = "fake"

    def __init__(self, config: MegalodonConfig, activation: type = np.float32) -> None:
        self.config = config
        self.activation = np.dtype(activation)
        self.memories: list[FakeMemory] = []

    def open_slots(self, num_slots: int) -> FakeMemory:
        self.memories.append(FakeMemory(self, num_slots))
        return self.memories[-1]


def fake_session(
    config: MegalodonConfig, activation: type = np.float32, name: str = "fake", stop_tokens: tuple[int, ...] = ()
) -> Session:
    manifest = Manifest(
        name=name,
        config=config,
        precision="fp32",
        logits="last",
        tokenizer=TokenizerInfo("bytes", stop_tokens=stop_tokens),
        files={},
        tools={},
        source={},
    )
    return Session(Bundle(Path("nowhere"), manifest), FakeExecutor(config, activation))
