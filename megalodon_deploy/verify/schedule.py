"""Which calls a verification makes: pure data, planned from a configuration alone.

A schedule is a sequence of calls of the graph, each with the position of every row, the number of tokens and the
capacity S of the key/value memory. Together the planned schedules cross chunk edges by a whole-chunk prefill, by odd
splits and by single steps, run rows at different positions in one batch, reset a row, and use S = 0, S = C and
capacities in between. Streams are saved, forked and moved to other slots between calls. Rows may start anywhere in a
stream: the harness gives both sides the same state there, so that an edge at token 2,048, or 2^33 tokens into a
stream, costs a few tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from megalodon_deploy.config import MegalodonConfig
from megalodon_deploy.parameters import num_parameters

CapacityRule = Callable[[int, int], int]  # (rows in use, C) -> S
Handover = Literal["carried", "saved", "forked", "moved"]
"""How streams come from one call to the next: as they are; through files; as forks of streams that go on otherwise;
in other slots."""

DEEP_POSITION = 2**33  # beyond int32, and its neighbours are no float32 numbers
PREFILL_FLOP = 2e12  # bounds the whole-sequence prefill: 20 to 30 s on two cores, a whole chunk of mega200M twice
_ROW_BUCKET = 16


@dataclass(frozen=True)
class Call:
    """One call of the graph: `num_tokens` in every row, from `positions` on, with `capacity` = S key/value rows.

    `handover` is for what keeps streams by itself; a graph's state is carried by whoever calls it.
    """

    positions: tuple[int, ...]
    num_tokens: int
    capacity: int
    handover: Handover = "carried"


@dataclass(frozen=True)
class Schedule:
    """Calls of one batch in order. A row goes on where its last call ended, or starts anew at position 0.

    Raises `ValueError` when a call crosses a chunk edge, a row jumps, or the capacity does not hold the open chunk.
    """

    name: str
    purpose: str
    chunk_size: int
    calls: tuple[Call, ...]

    def __post_init__(self) -> None:
        if not self.calls:
            raise ValueError(f"schedule {self.name}: no calls")
        expected = self.start_positions
        for index, call in enumerate(self.calls):
            where = f"schedule {self.name}, call {index}"
            if len(call.positions) != len(expected) or call.num_tokens < 1 or min(call.positions) < 0:
                raise ValueError(f"{where}: {call} is no call of {len(expected)} rows")
            if any(found not in (0, due) for found, due in zip(call.positions, expected, strict=True)):
                raise ValueError(f"{where}: rows are at {expected}, the call says {call.positions}")
            used = rows_in_use(call.positions, self.chunk_size)
            if used + call.num_tokens > self.chunk_size:
                raise ValueError(f"{where}: {call} crosses a chunk edge of {self.chunk_size}")
            if not used <= call.capacity <= self.chunk_size:
                raise ValueError(f"{where}: capacity {call.capacity}, rows in use {used}, chunk {self.chunk_size}")
            expected = tuple(position + call.num_tokens for position in call.positions)

    @property
    def start_positions(self) -> tuple[int, ...]:
        return self.calls[0].positions

    @property
    def batch(self) -> int:
        return len(self.start_positions)

    @property
    def num_tokens(self) -> int:
        return self.batch * sum(call.num_tokens for call in self.calls)

    @property
    def is_for_streams(self) -> bool:
        """Whether it does what only a keeper of streams can do."""
        return any(call.handover != "carried" for call in self.calls)

    @property
    def memory_rows(self) -> int:
        """Key/value rows that a caller needs to hold for all calls."""
        return max(
            max(call.capacity, rows_in_use(call.positions, self.chunk_size) + call.num_tokens) for call in self.calls
        )

    def fed_tokens(self) -> Iterator[tuple[int, ...]]:
        """For each call and row: tokens computed since the row's start, this call's included."""
        fed = (0,) * self.batch
        for call in self.calls:
            fed = tuple(
                call.num_tokens + (0 if position == 0 else before)
                for position, before in zip(call.positions, fed, strict=True)
            )
            yield fed


def rows_in_use(positions: Sequence[int], chunk_size: int) -> int:
    """Rows of the open chunk that the furthest row of the batch has filled."""
    return max(position % chunk_size for position in positions)


@dataclass(frozen=True)
class Stretch:
    """Tokens to feed to every row (in as many calls as chunk edges demand), after resetting some rows."""

    num_tokens: int
    reset: tuple[int, ...] = ()
    handover: Handover = "carried"  # into the first of these calls


def plan_schedules(config: MegalodonConfig, *, prefill_flop: float = PREFILL_FLOP) -> tuple[Schedule, ...]:
    """The schedules for a model, cheapest last; `prefill_flop` bounds the tokens of the long prefill."""
    chunk = config.chunk_size
    return (
        _prefill(config, prefill_flop),
        walk(
            "batch",
            "three rows at different positions, one of them reset; S = C",
            chunk,
            (max(0, chunk - 3), 0, 5 * chunk + chunk // 4),
            (Stretch(2), Stretch(1), Stretch(3), Stretch(1, reset=(2,)), Stretch(2)),
            whole_chunk,
        ),
        walk(
            "edges",
            "two rows over C-1, C, C+1 and over 2C; S = C",
            chunk,
            (max(0, chunk - 3), max(0, 2 * chunk - 2)),
            (Stretch(2), Stretch(1), Stretch(1), Stretch(2)),
            whole_chunk,
        ),
        walk(
            "splits",
            "odd splits across a chunk edge; S as small as possible",
            chunk,
            (max(0, chunk - 8),),
            (Stretch(3), Stretch(7), Stretch(5)),
            rows_used,
        ),
        walk(
            "steps",
            "single steps at C-2, C-1, C and C+1; S in buckets",
            chunk,
            (max(0, chunk - 2),),
            (Stretch(1),) * 4,
            buckets,
        ),
        walk(
            "deep",
            "beyond 2^33 tokens, over a chunk edge; S in buckets",
            chunk,
            (DEEP_POSITION // chunk * chunk + chunk - 1,),
            (Stretch(1), Stretch(1), Stretch(2)),
            buckets,
        ),
        *(_handed_over(handover, chunk) for handover in _PURPOSES),
    )


_PURPOSES: dict[Handover, str] = {
    "saved": "every stream saved to a file and resumed between calls",
    "forked": "every stream forked between calls; the original goes on with other tokens and retires",
    "moved": "every stream moved to another slot between calls",
}


def _handed_over(handover: Handover, chunk: int) -> Schedule:
    """Three rows, at a chunk edge and off it, handed over before every call but the first; the last one starts over."""
    stretches = (Stretch(2), Stretch(1, handover=handover), Stretch(3, reset=(2,), handover=handover))
    starts = (max(0, chunk - 2), 0, 2 * chunk + chunk // 3)
    return walk(handover, _PURPOSES[handover], chunk, starts, stretches, whole_chunk)


def _prefill(config: MegalodonConfig, prefill_flop: float) -> Schedule:
    """A long prefill that ends at a chunk edge, then steps. A call's reference recomputes the stream from its start,
    so every call costs the prefill again; what the budget does not pay for is left out, one step apart."""
    chunk = config.chunk_size
    budget_tokens = int(prefill_flop / (2 * num_parameters(config)))
    prefill_tokens = max(1, min(chunk, budget_tokens // 2))
    num_steps = min(4, max(1, budget_tokens // prefill_tokens - 1))
    stretches = [Stretch(prefill_tokens), *(Stretch(length) for length in (1, 1, 5, 3)[:num_steps])]
    return walk(
        "prefill",
        f"prefill of {prefill_tokens} tokens up to a chunk edge, then on from there; S as small as possible",
        chunk,
        (chunk - prefill_tokens,),
        stretches,
        rows_used,
    )


def rows_used(used: int, chunk_size: int) -> int:
    """As few rows as the call allows."""
    return used


def whole_chunk(used: int, chunk_size: int) -> int:
    """Memory for a full chunk, as on a GPU."""
    return chunk_size


def buckets(used: int, chunk_size: int) -> int:
    """Memory that grows by sixteen rows, as on a CPU."""
    return min(chunk_size, (used // _ROW_BUCKET + 1) * _ROW_BUCKET)


def walk(
    name: str,
    purpose: str,
    chunk_size: int,
    starts: tuple[int, ...],
    stretches: Sequence[Stretch],
    capacity: CapacityRule = whole_chunk,
) -> Schedule:
    """A schedule that feeds `stretches` to rows at `starts`, in calls that end where any row reaches a chunk edge."""
    calls: list[Call] = []
    positions = starts
    for stretch in stretches:
        positions = tuple(0 if row in stretch.reset else position for row, position in enumerate(positions))
        first, left = len(calls), stretch.num_tokens
        while left:
            used = rows_in_use(positions, chunk_size)
            num_tokens = min(left, chunk_size - used)
            calls.append(Call(positions, num_tokens, capacity(used, chunk_size)))
            positions = tuple(position + num_tokens for position in positions)
            left -= num_tokens
        calls[first] = replace(calls[first], handover=stretch.handover)
    return Schedule(name, purpose, chunk_size, tuple(calls))
