"""Rows of every kind: each prediction once, documents apart, the same for any ranks and after a restart."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalodon_deploy.errors import TrainError
from megalodon_deploy.train.data.rows import (
    NO_TARGET,
    Batch,
    DocumentRows,
    Part,
    Rows,
    StreamRows,
    WindowRows,
    evaluation_batches,
    open_rows,
    pack,
    split,
)
from megalodon_deploy.train.data.tokens import TokenStore

LENGTHS = [1, 2, 3, 17, 30, 31, 32, 33, 64, 65, 100, 5, 0, 9]
SEQ_LEN, BATCH = 16, 3
ALL = slice(0, BATCH)


def make_store(lengths: list[int]) -> TokenStore:
    """Document i consists of 1000 i, 1000 i + 1, ...: a token tells where it comes from."""
    tokens = np.concatenate([1000 * i + np.arange(n) for i, n in enumerate(lengths)]).astype(np.uint32)
    start = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    digest = [(7919 * (i + 1)) % 104729 for i in range(len(lengths))]
    documents = np.array([[n, 2 * n, d] for n, d in zip(lengths, digest, strict=True)], np.int64)
    return TokenStore("tokens-test", (tokens,), np.array([0, len(tokens)]), documents, start)


def make_part(lengths: list[int] = LENGTHS) -> Part:
    store = make_store(lengths)
    return Part(store, store.start[:-1], store.documents[:, 0], 2.0)


def predictions(batch: Batch) -> list[tuple[int, int]]:
    """(token, target) pairs of a batch, after checking that each is a real neighbour."""
    known = batch.targets != NO_TARGET
    pairs = list(zip(batch.tokens[known].tolist(), batch.targets[known].tolist(), strict=True))
    assert all(target == token + 1 for token, target in pairs)
    return pairs


def test_an_epoch_of_documents_has_every_prediction_once() -> None:
    rows = DocumentRows(make_part(), SEQ_LEN, 1, seed=3)
    seen: list[tuple[int, int]] = []
    while rows.epoch == 0 and rows.row < len(rows.rows):
        seen += predictions(rows.next(slice(0, 1)))
    expected = [(1000 * i + t, 1000 * i + t + 1) for i, n in enumerate(LENGTHS) for t in range(n - 1)]
    assert sorted(seen) == sorted(expected)


def test_packed_documents_lie_apart_and_fill_the_row() -> None:
    batch = DocumentRows(make_part(), SEQ_LEN, 8, seed=0).next(slice(0, 8))
    assert batch.documents is not None
    covered = np.zeros(batch.tokens.shape, int)
    for row, begin, length in batch.documents:
        covered[row, begin : begin + length] += 1
        span = batch.tokens[row, begin : begin + length]
        np.testing.assert_array_equal(np.diff(span), 1)
        assert (batch.targets[row, begin : begin + length] == span + 1).all()
    assert covered.max() == 1
    assert ((batch.targets == NO_TARGET) == (covered == 0)).all()
    assert batch.num_targets == covered.sum()


@given(st.lists(st.integers(1, 40), max_size=60), st.integers(40, 90))
def test_packing_places_everything_within_capacity(lengths: list[int], capacity: int) -> None:
    rows = pack(lengths, capacity)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    sizes = [sum(lengths[index] for index in row) for row in rows]
    assert all(size <= capacity for size in sizes)
    assert sum(2 * size <= capacity for size in sizes) <= 1  # two half-empty rows would have been one


def test_windows_are_pieces_of_the_joined_text_and_reach_both_ends() -> None:
    part = make_part([0, 7, 0, 5])
    joined = [*range(1000, 1007), *range(3000, 3005)]
    starts = set()
    rows = WindowRows(part, 9, BATCH, seed=0)
    for _ in range(40):
        batch = rows.next(ALL)
        for tokens, targets in zip(batch.tokens.tolist(), batch.targets.tolist(), strict=True):
            at = joined.index(tokens[0])
            assert tokens == joined[at : at + 9]
            assert targets == joined[at + 1 : at + 10]
            starts.add(at)
    assert starts == {0, 1, 2}


def test_streams_read_documents_from_begin_to_end() -> None:
    rows = StreamRows(make_part(), SEQ_LEN, BATCH, seed=1)
    reading: list[list[int]] = [[] for _ in range(BATCH)]
    finished: list[list[int]] = []
    for _ in range(60):
        batch = rows.next(ALL)
        assert batch.fresh is not None
        predictions(batch)
        for row in range(BATCH):
            if batch.fresh[row]:
                finished.append(reading[row])
                reading[row] = [int(batch.tokens[row, 0])]
            targets = batch.targets[row]
            reading[row] += targets[targets != NO_TARGET].tolist()
            assert batch.tokens[row, 0] == reading[row][-(targets != NO_TARGET).sum() - 1]
    whole = [list(range(1000 * i, 1000 * i + n)) for i, n in enumerate(LENGTHS) if n > 1]
    documents = [document for document in finished if document]
    assert all(document in whole for document in documents)
    assert all(document in documents for document in whole)


@pytest.mark.parametrize("kind", ["documents", "windows", "streams"])
def test_ranks_share_a_step_without_overlap(kind: str) -> None:
    def rows() -> Rows:
        return open_rows(kind, make_part(), seq_len=SEQ_LEN, batch_size=4, seed=5)

    together, first, second = rows(), rows(), rows()
    for _ in range(12):
        whole, low, high = together.next(slice(0, 4)), first.next(slice(0, 1)), second.next(slice(1, 4))
        np.testing.assert_array_equal(whole.tokens, np.concatenate([low.tokens, high.tokens]))
        np.testing.assert_array_equal(whole.targets, np.concatenate([low.targets, high.targets]))
        assert whole.num_targets == low.num_targets == high.num_targets == (whole.targets != NO_TARGET).sum()


@pytest.mark.parametrize("kind", ["documents", "windows", "streams"])
@settings(deadline=None, max_examples=20)
@given(steps=st.integers(0, 40))
def test_a_restart_goes_on_in_the_same_place(kind: str, steps: int) -> None:
    def rows(**values: Any) -> Rows:
        return open_rows(kind, make_part(), **({"seq_len": SEQ_LEN, "batch_size": BATCH, "seed": 5} | values))

    running, resumed = rows(), rows()
    for _ in range(steps):
        running.next(ALL)
    resumed.restore(running.state())
    other = rows(seed=6).next(ALL)
    assert not np.array_equal(other.tokens, rows().next(ALL).tokens)
    for _ in range(3):
        expected, found = running.next(ALL), resumed.next(ALL)
        np.testing.assert_array_equal(found.tokens, expected.tokens)
        np.testing.assert_array_equal(found.targets, expected.targets)


def test_part_of_a_batch_has_its_own_documents() -> None:
    batch = DocumentRows(make_part(), SEQ_LEN, 6, seed=0).next(slice(0, 6))
    assert batch.documents is not None
    low, high = batch.part(0, 2), batch.part(2, 6)
    assert low.documents is not None
    assert high.documents is not None
    np.testing.assert_array_equal(
        np.concatenate([low.documents, high.documents + np.array([2, 0, 0])]), batch.documents
    )
    assert low.num_targets == batch.num_targets


def test_the_split_is_by_content_and_complete() -> None:
    store = make_store([10] * 20)
    store.documents[7] = store.documents[3]  # the same text twice
    train, held_out = split(store, 0.1)
    assert train.num_tokens + held_out.num_tokens == 200
    assert 2 <= len(held_out.begin) <= 3
    assert not set(train.begin.tolist()) & set(held_out.begin.tolist())
    assert (3 in held_out.begin // 10) == (7 in held_out.begin // 10)


def test_a_lone_document_gives_its_end() -> None:
    train, held_out = split(make_store([100]), 0.25)
    assert (train.begin[0], train.length[0], held_out.begin[0], held_out.length[0]) == (0, 75, 75, 25)
    assert train.bytes_per_token == 2.0


def test_too_little_text_is_a_mistake_of_the_user() -> None:
    with pytest.raises(TrainError, match=r"16 tokens, a row of run\.seq_len = 16"):
        WindowRows(make_part([16]), 16, 1, 0)
    for kind in (DocumentRows, StreamRows):
        with pytest.raises(TrainError, match="2 tokens in 3 documents"):
            kind(make_part([1, 1, 0]), 16, 1, 0)


@pytest.mark.parametrize("kind", ["documents", "windows", "streams"])
def test_an_evaluation_takes_the_same_rows_each_time(kind: str) -> None:
    def batches() -> list[Batch]:
        return evaluation_batches(kind, make_part(), seq_len=SEQ_LEN, num_rows=7, batch_size=3)

    assert [len(batch.tokens) for batch in batches()] == [3, 3, 1]
    for first, second in zip(batches(), batches(), strict=True):
        np.testing.assert_array_equal(first.tokens, second.tokens)
        assert first.num_targets == (first.targets != NO_TARGET).sum()
