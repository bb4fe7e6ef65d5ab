"""Key/value memory: rows stay in place while the capacity follows the longest open chunk."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import small_config
from hypothesis import given, settings
from hypothesis import strategies as st

from megalodon_deploy.runtime.executors.host_memory import KeyValueMemory
from megalodon_deploy.state import concrete_shape, state_specs

CONFIG = small_config(num_layers=1, chunk_size=22)
SPECS = [spec for spec in state_specs(CONFIG) if spec.is_activation]


def new_rows(rng: np.random.Generator, batch: int, tokens: int, scale: float = 1.0) -> dict[str, np.ndarray]:
    shapes = {spec.present: concrete_shape(spec.present_shape, batch=batch, tokens=tokens) for spec in SPECS}
    return {name: (scale * rng.normal(size=shape)).astype(np.float32) for name, shape in shapes.items()}


@settings(max_examples=60, deadline=None)
@given(data=st.data(), num_slots=st.integers(1, 3))
def test_every_slot_holds_its_open_chunk(data: st.DataObject, num_slots: int) -> None:
    rng = np.random.default_rng(0)
    memory = KeyValueMemory(CONFIG, num_slots, np.dtype(np.float32), bucket_rows=4)
    positions = [0] * num_slots
    chunks: list[list[dict[str, np.ndarray]]] = [[] for _ in range(num_slots)]  # a dict of rows per token
    for _ in range(data.draw(st.integers(1, 25))):
        first = data.draw(st.integers(0, num_slots - 1))
        rows = slice(first, data.draw(st.integers(first + 1, num_slots)))
        room = min(22 - positions[slot] % 22 for slot in range(num_slots)[rows])
        length = data.draw(st.integers(1, room))
        new = new_rows(rng, rows.stop - rows.start, length)
        memory.append(rows, np.array(positions[rows]), new)
        for index, slot in enumerate(range(num_slots)[rows]):
            positions[slot] += length
            chunks[slot] += [{name: array[index, :, t] for name, array in new.items()} for t in range(length)]
            if positions[slot] % 22 == 0:
                chunks[slot] = []
            if data.draw(st.integers(0, 9)) == 0:
                memory.retire(slot, clear=False)
                positions[slot], chunks[slot] = 0, []
        longest = max(map(len, chunks))
        assert memory.capacity == min(-(-longest // 4) * 4, 22)
        check_rows(memory, chunks)


def check_rows(memory: KeyValueMemory, chunks: list[list[dict[str, np.ndarray]]]) -> None:
    for slot, chunk in enumerate(chunks):
        read = memory.read(slot, len(chunk))
        for spec in SPECS:
            view = memory.views[spec.past]
            assert view.flags.c_contiguous
            assert view.shape == concrete_shape(spec.past_shape, batch=len(chunks), capacity=memory.capacity)
            assert np.isfinite(view).all()
            for row, expected in enumerate(chunk):
                np.testing.assert_array_equal(view[slot, :, row], expected[spec.present])
                np.testing.assert_array_equal(read[spec.past][0, :, row], expected[spec.present])


def test_what_was_read_can_be_written_elsewhere() -> None:
    rng = np.random.default_rng(1)
    source, target = (KeyValueMemory(CONFIG, 2, np.dtype(np.float32), bucket_rows=4) for _ in range(2))
    source.append(slice(1, 2), np.array([0]), new_rows(rng, 1, 10))
    target.append(slice(0, 2), np.array([0, 0]), new_rows(rng, 2, 3))
    before = target.read(0, 3)
    target.write(1, 10, source.read(1, 10))
    for spec in SPECS:
        np.testing.assert_array_equal(target.read(1, 10)[spec.past], source.read(1, 10)[spec.past])
        np.testing.assert_array_equal(target.read(0, 3)[spec.past], before[spec.past])


@pytest.mark.parametrize("num_slots", [1, 2])
def test_rows_of_a_broken_stream_never_show_again(num_slots: int) -> None:
    """Slot 0 leaves NaN in the open chunk's memory; capacity then shrinks, and grows over those bytes."""
    rng = np.random.default_rng(2)
    memory = KeyValueMemory(CONFIG, num_slots, np.dtype(np.float32), bucket_rows=4)
    memory.append(slice(0, 1), np.array([0]), new_rows(rng, 1, 17, scale=np.nan))
    assert np.isnan(memory.views["past_key.0"]).any()
    memory.append(slice(0, 1), np.array([17]), new_rows(rng, 1, 5))
    assert memory.capacity == 0
    memory.retire(0, clear=True)
    last = num_slots - 1
    for position in range(21):
        memory.append(slice(last, last + 1), np.array([position]), new_rows(rng, 1, 1))
        assert all(np.isfinite(view).all() for view in memory.views.values())


@pytest.mark.parametrize("clear", [False, True])
def test_a_slot_is_cleared_only_when_told(clear: bool) -> None:
    memory = KeyValueMemory(CONFIG, 2, np.dtype(np.float32), bucket_rows=4)
    memory.append(slice(0, 2), np.array([0, 0]), new_rows(np.random.default_rng(4), 2, 6))
    memory.retire(0, clear=clear)
    assert (memory.views["past_key.0"][0] == 0).all() == clear
    assert (memory.views["past_key.0"][1, :, :6] != 0).all()


def test_a_single_head_of_a_single_slot_is_never_moved() -> None:
    config = small_config(num_heads=1, num_layers=1, chunk_size=22)
    memory = KeyValueMemory(config, 1, np.dtype(np.float32), bucket_rows=4)
    addresses = set()
    rng = np.random.default_rng(3)
    specs = [spec for spec in state_specs(config) if spec.is_activation]
    for position in range(60):
        new = {s.present: rng.normal(size=concrete_shape(s.present_shape, batch=1, tokens=1)) for s in specs}
        memory.append(slice(0, 1), np.array([position]), new)
        addresses.add(tuple(view.ctypes.data for view in memory.views.values() if view.size))
    assert len(addresses - {()}) == 1
