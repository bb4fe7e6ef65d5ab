"""The public runtime as a runner: streams of a session, handed over from call to call as a schedule says."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from megalodon_deploy.config import MegalodonConfig
from megalodon_deploy.runtime.executors.base import Executor, SlotMemory
from megalodon_deploy.runtime.sampling import Choice
from megalodon_deploy.runtime.saved_stream import SavedStream
from megalodon_deploy.runtime.session import Session
from megalodon_deploy.runtime.stream import Stream
from megalodon_deploy.state import LOGITS, concrete_shape, state_specs
from megalodon_deploy.verify.memory import STALE_MAGNITUDE
from megalodon_deploy.verify.reference import Start
from megalodon_deploy.verify.runners import StreamRunner
from megalodon_deploy.verify.schedule import Schedule

_POISONED_ROWS = 4  # more would make a small memory grow before the schedule asks for it


class SessionRunner(StreamRunner):
    """Streams of one batch: admitted, resumed, fed together, handed over, retired when a row starts over."""

    def __init__(self, load: Callable[[], Session], schedule: Schedule, start: Start, *, name: str) -> None:
        super().__init__(name=name)
        self._load = load
        self._schedule = schedule
        self._start = start

    def activate_impl(self) -> None:
        with self.failing("cannot be loaded"):
            session = self._load()
            self._session = Session(session.bundle, PoisonedExecutor(session.executor, session.config))
            self._batch = self._session.batch(self._schedule.batch)
            self._streams = [self._admit(row, at) for row, at in enumerate(self._schedule.start_positions)]
        self._calls = iter(self._schedule.calls)

    def deactivate_impl(self) -> None:
        del self._session, self._batch, self._streams, self._calls

    def call(self, tokens_BT: np.ndarray, position_B: np.ndarray, capacity: int) -> Mapping[str, np.ndarray]:
        handover = next(self._calls).handover
        with self.failing("cannot run"):
            for row, position in enumerate(position_B.tolist()):
                if position == 0 and self._streams[row].position:
                    self._batch.retire(self._streams[row])
                    self._streams[row] = self._batch.admit()
            if handover == "saved":
                self._save_and_resume()
            elif handover == "forked":
                self._go_on_as_forks()
            elif handover == "moved":
                self._change_slots()
            logits = self._batch.feed(dict(zip(self._streams, tokens_BT.tolist(), strict=True)))
            states = [stream.snapshot().tensors for stream in self._streams]
        outputs = {LOGITS: np.stack([logits[stream] for stream in self._streams])[:, None]}
        for spec in state_specs(self._session.config):
            if not spec.is_rows:
                outputs[spec.present] = np.concatenate([state[spec.past] for state in states])
        return outputs

    def _admit(self, row: int, position: int) -> Stream:
        """A fresh stream, or one that goes on from the schedule's start."""
        if position == 0:
            return self._batch.admit()
        config = self._session.config
        used = position % config.chunk_size
        tensors = {}
        for spec in state_specs(config):
            mine = self._start[spec.past][row : row + 1]
            dtype = spec.numpy_dtype(self._session.activation)
            tensors[spec.past] = mine[:, :, :used].astype(dtype) if spec.is_rows else mine
        saved = SavedStream(
            fingerprint=self._session.bundle.manifest.fingerprint,
            position=position,
            tensors=tensors,
            recent=(),
            pending=(),
            logits=np.zeros(self._session.config.vocab_size, np.float32),  # of the token before; nobody asks for them
            generator=None,
        )
        return self._batch.admit(resume=saved)

    def _save_and_resume(self) -> None:
        with tempfile.TemporaryDirectory(prefix="megalodon-verify.") as folder:
            for row, stream in enumerate(self._streams):
                stream.save(Path(folder) / str(row))
                self._batch.retire(stream)
            self._streams = [self._batch.admit(resume=Path(folder) / str(row)) for row in range(len(self._streams))]

    def _go_on_as_forks(self) -> None:
        """The originals take other tokens before they retire: a fork that shares memory with them shows."""
        forks = [stream.fork() for stream in self._streams]
        self._batch.feed({stream: [0, 0] for stream in self._streams})
        for stream in self._streams:
            self._batch.retire(stream)
        for fork in forks:
            self._batch.take_over(fork)
        self._streams = forks

    def _change_slots(self) -> None:
        """Each stream to the slot before its own, the first to the last."""
        snapshots = [stream.snapshot() for stream in self._streams]
        for stream in self._streams:
            self._batch.retire(stream)
        others = [self._batch.admit(resume=snapshot) for snapshot in snapshots[1:]]
        self._streams = [self._batch.admit(resume=snapshots[0]), *others]


class PoisonedExecutor:
    """An executor whose free slots hold the worst that a stream may leave behind: NaN in what position 0 ignores,
    large numbers in the rows of keys and values."""

    def __init__(self, executor: Executor, config: MegalodonConfig) -> None:
        self.backend, self.activation = executor.backend, executor.activation
        self._executor = executor
        self._config = config

    def open_slots(self, num_slots: int) -> SlotMemory:
        position = min(_POISONED_ROWS, self._config.chunk_size - 1)
        poison = {}
        for spec in state_specs(self._config):
            shape = concrete_shape(spec.past_shape, batch=1, capacity=position)
            value = STALE_MAGNITUDE if spec.is_rows else np.nan
            poison[spec.past] = np.full(shape, value, spec.numpy_dtype(self.activation))
        return _PoisonedSlots(self._executor.open_slots(num_slots), position, poison)


class _PoisonedSlots:
    def __init__(self, memory: SlotMemory, position: int, poison: Mapping[str, np.ndarray]) -> None:
        self.num_slots, self.prefers_whole_steps = memory.num_slots, memory.prefers_whole_steps
        self._memory = memory
        self._position = position
        self._poison = poison
        for slot in range(self.num_slots):
            self._memory.write(slot, position, poison)

    def run(self, rows: slice, tokens_BT: np.ndarray, position_B: np.ndarray) -> None:
        self._memory.run(rows, tokens_BT, position_B)

    def logits(self, slot: int) -> np.ndarray:
        return self._memory.logits(slot)

    def choose(self, choices: Mapping[int, Choice]) -> dict[int, int]:
        return self._memory.choose(choices)

    def copy(self, slot: int, source: SlotMemory, source_slot: int, position: int) -> None:
        source = source._memory if isinstance(source, _PoisonedSlots) else source
        self._memory.copy(slot, source, source_slot, position)

    def read(self, slot: int, position: int) -> dict[str, np.ndarray]:
        return self._memory.read(slot, position)

    def write(self, slot: int, position: int, tensors: Mapping[str, np.ndarray]) -> None:
        self._memory.write(slot, position, tensors)

    def retire(self, slot: int) -> None:
        self._memory.retire(slot)
        self._memory.write(slot, self._position, self._poison)
