"""Candidates other than the graph in ONNX Runtime: a runtime that is wrong."""

from __future__ import annotations

import dataclasses
import errno
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from helpers import small_config
from verify.conftest import Verify

from megalodon_deploy.bundle import Bundle
from megalodon_deploy.errors import EngineError
from megalodon_deploy.runtime.executors.base import Executor, SlotMemory
from megalodon_deploy.runtime.sampling import Choice
from megalodon_deploy.runtime.saved_stream import SavedStream
from megalodon_deploy.runtime.session import Session, open_session
from megalodon_deploy.runtime.stream import Stream
from megalodon_deploy.verify import candidates
from megalodon_deploy.verify.session_streams import SessionRunner


class WrongMemory:
    """A backend's memory with a fault."""

    def __init__(self, right: SlotMemory) -> None:
        self._right = right
        self.num_slots, self.prefers_whole_steps = right.num_slots, right.prefers_whole_steps

    def run(self, rows: slice, tokens_BT: np.ndarray, position_B: np.ndarray) -> None:
        self._right.run(rows, tokens_BT, position_B)

    def logits(self, slot: int) -> np.ndarray:
        return self._right.logits(slot)

    def choose(self, choices: Mapping[int, Choice]) -> dict[int, int]:
        return self._right.choose(choices)

    def copy(self, slot: int, source: SlotMemory, source_slot: int, position: int) -> None:
        self._right.copy(slot, source, source_slot, position)

    def read(self, slot: int, position: int) -> dict[str, np.ndarray]:
        return self._right.read(slot, position)

    def write(self, slot: int, position: int, tensors: Mapping[str, np.ndarray]) -> None:
        self._right.write(slot, position, tensors)

    def retire(self, slot: int) -> None:
        self._right.retire(slot)


class StaleLogits(WrongMemory):
    _last: np.ndarray | None = None

    def logits(self, slot: int) -> np.ndarray:
        logits = super().logits(slot)
        last, self._last = self._last, logits
        return logits if last is None else last


class NoFreshStart(WrongMemory):
    """A reused slot goes on where the old stream was."""

    _positions: np.ndarray | None = None

    def run(self, rows: slice, tokens_BT: np.ndarray, position_B: np.ndarray) -> None:
        if self._positions is not None:
            position_B = np.where(position_B == 0, self._positions % small_config().chunk_size, position_B)
        self._positions = position_B + tokens_BT.shape[1]
        super().run(rows, tokens_BT, position_B)


class LateCopies(WrongMemory):
    """A copy shares memory with its source until that retires."""

    def __init__(self, right: SlotMemory) -> None:
        super().__init__(right)
        self._shared: list[tuple[LateCopies, int, int, int]] = []

    def copy(self, slot: int, source: SlotMemory, source_slot: int, position: int) -> None:
        assert isinstance(source, LateCopies)
        self._right.copy(slot, source._right, source_slot, position)
        source._shared.append((self, slot, source_slot, position))

    def retire(self, slot: int) -> None:
        for target, target_slot, shared_slot, position in self._shared:
            if shared_slot == slot:
                target._right.copy(target_slot, self._right, slot, position)
        super().retire(slot)


class TimesZero(WrongMemory):
    """A stream that starts multiplies what lies in its slot by zero: what is NaN stays."""

    def __init__(self, right: SlotMemory) -> None:
        super().__init__(right)
        self._spoilt: set[int] = set()

    def run(self, rows: slice, tokens_BT: np.ndarray, position_B: np.ndarray) -> None:
        for slot, position in enumerate(position_B, rows.start):
            if position == 0:
                self._spoilt.discard(slot)
                tensors = self.read(slot, 1)
                if any(np.isnan(array).any() for name, array in tensors.items() if "cema" in name):
                    self._spoilt.add(slot)
        super().run(rows, tokens_BT, position_B)

    def logits(self, slot: int) -> np.ndarray:
        return super().logits(slot) * (np.nan if slot in self._spoilt else 1)


class MovedRows(WrongMemory):
    def write(self, slot: int, position: int, tensors: Mapping[str, np.ndarray]) -> None:
        super().write(slot, position, {name: np.roll(tensor, 1, axis=-2) for name, tensor in tensors.items()})


class WrongExecutor:
    def __init__(self, right: Executor, memory: Callable[[SlotMemory], SlotMemory]) -> None:
        self.backend, self.activation = right.backend, right.activation
        self._right, self._memory = right, memory

    def open_slots(self, num_slots: int) -> SlotMemory:
        return self._memory(self._right.open_slots(num_slots))


class LostState(WrongMemory):
    """A call that does not know what the one before it left."""

    def run(self, rows: slice, tokens_BT: np.ndarray, position_B: np.ndarray) -> None:
        before = [self.read(slot, int(position)) for slot, position in enumerate(position_B)]
        for slot, tensors in enumerate(before):
            tensors = {name: array * (0 if "cema" in name else 1) for name, array in tensors.items()}
            self.write(slot, int(position_B[slot]), tensors)
        super().run(rows, tokens_BT, position_B)


@pytest.mark.parametrize(
    ("memory", "schedule", "name"),
    [
        (StaleLogits, "prefill", "logits"),
        (NoFreshStart, "batch", "stale slot"),
        (MovedRows, "splits", "state not carried"),
        (LostState, "steps", "state not carried"),
        (LateCopies, "forked", "forked streams"),
    ],
)
def test_a_wrong_runtime_over_a_right_graph_is_a_miss(
    bundle: Bundle,
    checkpoint: Path,
    verify_copy: Verify,
    monkeypatch: pytest.MonkeyPatch,
    memory: Callable[[SlotMemory], SlotMemory],
    schedule: str,
    name: str,
) -> None:
    def open_wrong(bundle: Bundle, backend: str) -> Session:
        return Session(bundle, WrongExecutor(open_session(bundle, backend).executor, memory))

    monkeypatch.setattr(candidates, "open_session", open_wrong)
    report = verify_copy(bundle, checkpoint)
    assert {miss.candidate for miss in report.misses} == {"onnxruntime session"}
    assert schedule in {miss.schedule for miss in report.misses}
    assert name in report.diagnoses[0].name


def test_slots_are_poisoned_before_their_first_stream_and_after_each(
    bundle: Bundle, checkpoint: Path, verify_copy: Verify, monkeypatch: pytest.MonkeyPatch
) -> None:
    def open_wrong(bundle: Bundle, backend: str) -> Session:
        return Session(bundle, WrongExecutor(open_session(bundle, backend).executor, TimesZero))

    monkeypatch.setattr(candidates, "open_session", open_wrong)
    report = verify_copy(bundle, checkpoint)
    starts = {
        (schedule.name, index, row)
        for schedule in report.schedules
        for index, call in enumerate(schedule.calls)
        for row, position in enumerate(call.positions)
        if position == 0 and call.handover in ("carried", "forked")  # what is resumed overwrites its slot
    }
    assert {("prefill", 0, 0), ("batch", 0, 1)} < starts
    assert any(index for _, index, _ in starts), "a slot that is used again"
    assert starts <= {(miss.schedule, miss.call, row) for miss in report.misses for row in miss.missed_rows}
    assert report.diagnoses[0].candidate == "onnxruntime session"


@pytest.mark.parametrize("how", ["saved", "forked", "moved"])
def test_a_stream_that_is_handed_over_wrongly_is_a_miss_of_that_name(
    bundle: Bundle, checkpoint: Path, verify_copy: Verify, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    def wrongly(saved: SavedStream) -> SavedStream:
        tensors = {name: array * (1.01 if "cema" in name else 1) for name, array in saved.tensors.items()}
        return dataclasses.replace(saved, tensors=tensors)

    if how == "saved":
        write = SavedStream.write
        monkeypatch.setattr(SavedStream, "write", lambda saved, *to: write(wrongly(saved), *to))
    elif how == "forked":
        monkeypatch.setattr(Stream, "fork", lambda stream: stream._session.stream(resume=wrongly(stream.snapshot())))
    else:
        change = SessionRunner._change_slots

        def change_two(runner: SessionRunner) -> None:
            change(runner)
            runner._streams[:2] = runner._streams[1::-1]

        monkeypatch.setattr(SessionRunner, "_change_slots", change_two)
    (diagnosis,) = verify_copy(bundle, checkpoint).diagnoses
    assert diagnosis.candidate == "onnxruntime session"
    assert diagnosis.name == f"{how} streams"


def test_a_full_disk_is_no_miss(
    bundle: Bundle, checkpoint: Path, verify_copy: Verify, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(saved: SavedStream, path: Path, *to: object) -> None:
        raise OSError(errno.ENOSPC, "full", str(path))

    monkeypatch.setattr(SavedStream, "write", fail)
    with pytest.raises(OSError, match="full"):
        verify_copy(bundle, checkpoint)


def test_a_runtime_that_cannot_open_the_bundle_is_a_miss(
    bundle: Bundle, checkpoint: Path, verify_copy: Verify, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(bundle: Bundle, backend: str) -> Session:
        raise EngineError("no such luck")

    monkeypatch.setattr(candidates, "open_session", refuse)
    misses = verify_copy(bundle, checkpoint).misses
    assert {(miss.candidate, miss.tensor) for miss in misses} == {("onnxruntime session", "all outputs")}
    assert "no such luck" in misses[0].describe()
