"""Rows of tokens for every step, a pure function of data, seed and place: no worker or rank changes them.

Three ways to cut a data set into rows of T tokens: `DocumentRows` packs whole documents and pieces of longer ones,
`WindowRows` takes random places of the joined text, `StreamRows` reads B documents side by side from begin to end.
Each knows where it stands as a small JSON value, so that a run can go on.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from megalodon_deploy.errors import TrainError
from megalodon_deploy.train.data.tokens import BYTES_OF_TEXT, DIGEST, TOKENS, TokenStore

NO_TARGET = -100  # as in `train.loss`, which imports PyTorch
_BLOCK = 8192  # pieces that are packed together


@dataclass(frozen=True)
class Part:
    """Spans of a data set that belong together: the training documents, or those held out."""

    store: TokenStore
    begin: np.ndarray  # [spans] int64, in tokens of the store
    length: np.ndarray  # [spans] int64
    bytes_per_token: float

    @property
    def num_tokens(self) -> int:
        return int(self.length.sum())

    @cached_property
    def _ends(self) -> np.ndarray:
        return np.cumsum(self.length)

    def joined(self, begin: int, length: int) -> np.ndarray:
        """Tokens of the spans one after the other, int64."""
        span = int(np.searchsorted(self._ends, begin, side="right"))
        offset = begin - int(self._ends[span] - self.length[span])
        parts = []
        while length > 0:
            take = min(length, int(self.length[span]) - offset)
            parts.append(self.store.read(int(self.begin[span]) + offset, take))
            length, span, offset = length - take, span + 1, 0
        return np.concatenate(parts).astype(np.int64)


def split(store: TokenStore, held_out_fraction: float) -> tuple[Part, Part]:
    """(training part, held-out part): by the documents' content, so equal texts are never on both sides.

    At least one document is held out of several; a lone one gives its end.
    """
    table = store.documents
    if len(table) == 1:
        cut = int(table[0, TOKENS]) - int(table[0, TOKENS] * held_out_fraction)
        begin = np.array([0, cut])
        length = np.array([cut, int(table[0, TOKENS]) - cut])
        ratio = _bytes_per_token(table)
        return Part(store, begin[:1], length[:1], ratio), Part(store, begin[1:], length[1:], ratio)
    is_held_out = np.zeros(len(table), bool)
    if held_out_fraction and len(table):
        count = max(1, round(len(table) * held_out_fraction))
        is_held_out = table[:, DIGEST] <= np.sort(table[:, DIGEST])[count - 1]
    train, held_out = (
        Part(store, store.start[:-1][chosen], table[chosen, TOKENS], _bytes_per_token(table[chosen]))
        for chosen in (~is_held_out, is_held_out)
    )
    return train, held_out


def _bytes_per_token(table: np.ndarray) -> float:
    return float(table[:, BYTES_OF_TEXT].sum() / max(1, table[:, TOKENS].sum()))


@dataclass(frozen=True)
class Batch:
    """Rows of one step that one rank computes."""

    tokens: np.ndarray  # [b, T] int64
    targets: np.ndarray  # [b, T] int64, `NO_TARGET` where nothing is to be predicted
    documents: np.ndarray | None  # [documents, 3] int64 as in `model.packing`; None: rows are whole
    fresh: np.ndarray | None  # [b] bool: rows that do not go on from the step before; None: none does
    num_targets: int  # of the whole step, over all ranks

    def part(self, begin: int, end: int) -> Batch:
        """Some of its rows."""
        documents = self.documents
        if documents is not None:
            documents = documents[(documents[:, 0] >= begin) & (documents[:, 0] < end)] - [begin, 0, 0]
        fresh = None if self.fresh is None else self.fresh[begin:end]
        return Batch(self.tokens[begin:end], self.targets[begin:end], documents, fresh, self.num_targets)


class Rows(Protocol):
    """Where the batches of a run come from."""

    def next(self, take: slice) -> Batch:
        """The rows `take` of the next step's B rows."""
        ...

    def state(self) -> Any:
        """The place of the next step, for JSON."""
        ...

    def restore(self, state: Any) -> None: ...


def open_rows(kind: str, part: Part, *, seq_len: int, batch_size: int, seed: int) -> Rows:
    """Raises `TrainError` when there are too few tokens."""
    if kind == "windows":
        return WindowRows(part, seq_len, batch_size, seed)
    return (StreamRows if kind == "streams" else DocumentRows)(part, seq_len, batch_size, seed)


class DocumentRows:
    """Documents in random order, longer ones cut into pieces of T tokens, packed so that little is left empty."""

    def __init__(self, part: Part, seq_len: int, batch_size: int, seed: int) -> None:
        _check_documents(part)
        self.part, self.seq_len, self.batch_size, self.seed = part, seq_len, batch_size, seed
        self.piece_begin, self.piece_length = _pieces(part, seq_len)
        self.epoch, self.block, self.row = 0, 0, 0
        self._load()

    def _load(self) -> None:
        rng = np.random.default_rng((self.seed, self.epoch))
        order = rng.permutation(len(self.piece_begin))
        chosen = order[self.block * _BLOCK : (self.block + 1) * _BLOCK]
        rows = pack(self.piece_length[chosen].tolist(), self.seq_len)
        shuffled = np.random.default_rng((self.seed, self.epoch, self.block)).permutation(len(rows))
        self.rows = [[int(chosen[i]) for i in rows[row]] for row in shuffled]
        self.num_blocks = -(-len(order) // _BLOCK)

    def _next_row(self) -> list[int]:
        if self.row == len(self.rows):
            self.row, self.block = 0, self.block + 1
            if self.block == self.num_blocks:
                self.block, self.epoch = 0, self.epoch + 1
            self._load()
        self.row += 1
        return self.rows[self.row - 1]

    def next(self, take: slice) -> Batch:
        rows = [self._next_row() for _ in range(self.batch_size)]
        num_targets = int(sum(self.piece_length[piece].sum() for piece in rows))
        return self._build(rows[take], num_targets)

    def _build(self, rows: Sequence[Sequence[int]], num_targets: int) -> Batch:
        tokens = np.zeros((len(rows), self.seq_len), np.int64)
        targets = np.full_like(tokens, NO_TARGET)
        documents = []
        for row, pieces in enumerate(rows):
            at = 0
            for piece in pieces:
                length = int(self.piece_length[piece])
                content = self.part.store.read(int(self.piece_begin[piece]), length + 1)
                tokens[row, at : at + length], targets[row, at : at + length] = content[:-1], content[1:]
                documents.append((row, at, length))
                at += length
        return Batch(tokens, targets, np.array(documents, np.int64), None, num_targets)

    def state(self) -> Any:
        return [self.epoch, self.block, self.row]

    def restore(self, state: Any) -> None:
        self.epoch, self.block, self.row = state
        self._load()


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Best fit, longest first: indices of `lengths` for each row of at most `capacity`."""
    rows: list[list[int]] = []
    spaces: list[tuple[int, int]] = []  # (space left, row), sorted
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        fit = bisect.bisect_left(spaces, (lengths[index], -1))
        if fit == len(spaces):
            rows.append([])
            space, row = capacity, len(rows) - 1
        else:
            space, row = spaces.pop(fit)
        rows[row].append(index)
        if space > lengths[index]:
            bisect.insort(spaces, (space - lengths[index], row))
    return rows


def _pieces(part: Part, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """(begin, predictions) of all pieces; a piece has one token more, and the next one begins with that token."""
    predictions = part.length - 1
    counts = -(-predictions // seq_len)
    document = np.repeat(np.arange(len(counts)), counts)
    place = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
    length = np.minimum(seq_len, predictions[document] - place * seq_len)
    return part.begin[document] + place * seq_len, length


def _check_documents(part: Part) -> None:
    if not (part.length > 1).any():
        raise TrainError(f"{part.num_tokens} tokens in {len(part.length)} documents to train on; give more data")


class WindowRows:
    """Random places of the joined text: rows cross from one document into the next."""

    def __init__(self, part: Part, seq_len: int, batch_size: int, seed: int) -> None:
        if part.num_tokens <= seq_len:
            raise TrainError(
                f"{part.num_tokens} tokens, a row of run.seq_len = {seq_len} takes one more than that; "
                "give more data or a smaller run.seq_len"
            )
        self.part, self.seq_len, self.batch_size, self.seed = part, seq_len, batch_size, seed
        self.step = 0

    def next(self, take: slice) -> Batch:
        rng = np.random.default_rng((self.seed, self.step))
        starts = rng.integers(0, self.part.num_tokens - self.seq_len, size=self.batch_size)
        self.step += 1
        return self.windows(starts[take], self.batch_size * self.seq_len)

    def windows(self, starts: np.ndarray, num_targets: int) -> Batch:
        content = np.stack([self.part.joined(int(start), self.seq_len + 1) for start in starts])
        return Batch(content[:, :-1], content[:, 1:], None, None, num_targets)

    def state(self) -> Any:
        return self.step

    def restore(self, state: Any) -> None:
        self.step = state


class StreamRows:
    """B documents side by side, T tokens of each at a time; a row whose document ends takes the next one."""

    def __init__(self, part: Part, seq_len: int, batch_size: int, seed: int) -> None:
        _check_documents(part)
        self.part, self.seq_len, self.batch_size, self.seed = part, seq_len, batch_size, seed
        self.usable = np.flatnonzero(part.length > 1)
        self.epoch, self.num_taken = 0, 0
        self.order = self._order()
        self.slots = [[0, 0] for _ in range(batch_size)]  # (first token, tokens left) of each row

    def _order(self) -> np.ndarray:
        return self.usable[np.random.default_rng((self.seed, self.epoch)).permutation(len(self.usable))]

    def _next_document(self) -> list[int]:
        if self.num_taken == len(self.order):
            self.epoch, self.num_taken = self.epoch + 1, 0
            self.order = self._order()
        document = self.order[self.num_taken]
        self.num_taken += 1
        return [int(self.part.begin[document]), int(self.part.length[document])]

    def next(self, take: slice) -> Batch:
        fresh = np.array([left < 2 for _, left in self.slots])
        self.slots = [self._next_document() if new else slot for slot, new in zip(self.slots, fresh, strict=True)]
        lengths = [min(self.seq_len, left - 1) for _, left in self.slots]
        mine = range(self.batch_size)[take]
        tokens = np.zeros((len(mine), self.seq_len), np.int64)
        targets = np.full_like(tokens, NO_TARGET)
        for row, slot in enumerate(mine):
            content = self.part.store.read(self.slots[slot][0], lengths[slot] + 1)
            tokens[row, : lengths[slot]], targets[row, : lengths[slot]] = content[:-1], content[1:]
        self.slots = [[begin + n, left - n] for (begin, left), n in zip(self.slots, lengths, strict=True)]
        return Batch(tokens, targets, None, fresh[take], sum(lengths))

    def state(self) -> Any:
        return {"epoch": self.epoch, "num_taken": self.num_taken, "slots": self.slots}

    def restore(self, state: Any) -> None:
        self.epoch, self.num_taken, self.slots = state["epoch"], state["num_taken"], state["slots"]
        self.order = self._order()


def evaluation_batches(kind: str, part: Part, *, seq_len: int, num_rows: int, batch_size: int) -> list[Batch]:
    """The rows of every evaluation: packed documents in an order of their own, or evenly spaced windows.

    Empty when nothing is held out. Raises `TrainError` when too little is.
    """
    if part.num_tokens == 0:
        return []
    counts = [min(batch_size, num_rows - done) for done in range(0, num_rows, batch_size)]
    if kind == "windows":
        windows = WindowRows(part, seq_len, batch_size, 0)
        starts = np.linspace(0, part.num_tokens - seq_len - 1, num_rows).astype(np.int64)
        return [windows.windows(starts[i * batch_size :][:count], count * seq_len) for i, count in enumerate(counts)]
    rows = DocumentRows(part, seq_len, 1, 0)
    chosen = [rows._next_row() for _ in range(min(num_rows, len(rows.rows)))]
    groups = [chosen[done : done + batch_size] for done in range(0, len(chosen), batch_size)]
    return [rows._build(group, int(sum(rows.piece_length[row].sum() for row in group))) for group in groups]
