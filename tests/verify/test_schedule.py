"""The planned calls: what they cover for any chunk size, and what a schedule refuses."""

from __future__ import annotations

import dataclasses
from typing import get_args

import pytest
from helpers import small_config

from megalodon_deploy.config import MegalodonConfig
from megalodon_deploy.verify.schedule import (
    Call,
    Handover,
    Schedule,
    buckets,
    plan_schedules,
    rows_in_use,
    rows_used,
    whole_chunk,
)

CHUNKS = [1, 2, 3, 5, 12, 64, 2048]


def plan(chunk: int) -> dict[str, Schedule]:
    return {schedule.name: schedule for schedule in plan_schedules(small_config(chunk_size=chunk))}


@pytest.mark.parametrize("chunk", CHUNKS)
def test_calls_are_valid_at_any_chunk_size(chunk: int) -> None:
    for schedule in plan(chunk).values():
        dataclasses.replace(schedule)  # construction checks every call


@pytest.mark.parametrize("chunk", CHUNKS)
def test_every_schedule_crosses_a_chunk_edge(chunk: int) -> None:
    for schedule in plan(chunk).values():
        ends = [position + call.num_tokens for call in schedule.calls[:-1] for position in call.positions]
        assert any(end % chunk == 0 for end in ends), schedule.name


@pytest.mark.parametrize("chunk", [5, 12, 64, 2048])
def test_steps_and_capacities_that_must_occur(chunk: int) -> None:
    schedules = plan(chunk)
    calls = [call for schedule in schedules.values() for call in schedule.calls]
    singles = {position for call in calls if call.num_tokens == 1 for position in call.positions}
    assert {chunk - 2, chunk - 1, chunk, chunk + 1} <= singles
    assert Call((0,), chunk, 0) in calls, "a whole chunk at once, without any memory"
    assert any(call.capacity == 0 and call.num_tokens == 1 for call in calls)
    assert any(call.capacity > max(position % chunk for position in call.positions) for call in calls)
    assert any(min(call.positions) > 2**33 - chunk or max(call.positions) > 2**33 for call in calls)


@pytest.mark.parametrize("chunk", [5, 12, 64, 2048])
def test_the_batch_has_rows_apart_and_resets_one(chunk: int) -> None:
    schedule = plan(chunk)["batch"]
    assert schedule.batch == 3
    assert all(len(set(call.positions)) == 3 for call in schedule.calls)
    row = [call.positions[2] for call in schedule.calls]
    assert row[0] > chunk
    assert 0 in row


@pytest.mark.parametrize("chunk", [5, 12, 64, 2048])
def test_memory_is_what_callers_hold(chunk: int) -> None:
    assert [buckets(used, 64) for used in (0, 15, 16, 60)] == [16, 16, 32, 64]
    schedules = plan(chunk)
    rules = {"prefill": rows_used, "splits": rows_used, "batch": whole_chunk, "steps": buckets, "deep": buckets}
    for name, rule in rules.items():
        for call in schedules[name].calls:
            assert call.capacity == rule(rows_in_use(call.positions, chunk), chunk), name


@pytest.mark.parametrize("chunk", [5, 12, 64, 2048])
@pytest.mark.parametrize("handover", get_args(Handover)[1:])
def test_streams_are_handed_over_at_an_edge_off_it_and_before_they_start_over(chunk: int, handover: Handover) -> None:
    schedule = plan(chunk)[handover]
    assert schedule.is_for_streams
    calls = [call for call in schedule.calls if call.handover != "carried"]
    assert [call.handover for call in calls] == [handover] * 2
    positions = [position for call in calls for position in call.positions]
    assert 0 in positions
    assert any(position and position % chunk == 0 for position in positions)
    assert any(position % chunk for position in positions)
    assert not plan(chunk)["batch"].is_for_streams


def test_fed_tokens_count_from_the_start_or_the_reset() -> None:
    schedule = Schedule("x", "", 8, (Call((6, 0), 2, 8), Call((8, 2), 1, 8), Call((9, 0), 3, 8)))
    assert list(schedule.fed_tokens()) == [(2, 2), (3, 3), (6, 3)]


def test_a_large_model_gets_a_bounded_prefill() -> None:
    config = MegalodonConfig.preset("mega7.1B")
    prefill = next(schedule for schedule in plan_schedules(config) if schedule.name == "prefill")
    first = prefill.calls[0]
    assert 1 < first.num_tokens < config.chunk_size
    assert first.positions[0] + first.num_tokens == config.chunk_size


@pytest.mark.parametrize(
    ("calls", "complaint"),
    [
        ((), "no calls"),
        ((Call((6,), 3, 8),), "crosses a chunk edge"),
        ((Call((0,), 3, 8), Call((4,), 1, 8)), "rows are at"),
        ((Call((5,), 1, 4),), "capacity 4"),
        ((Call((5,), 1, 9),), "capacity 9"),
        ((Call((0,), 0, 8),), "is no call"),
        ((Call((0,), 1, 8), Call((1, 1), 1, 8)), "is no call"),
    ],
)
def test_impossible_calls_are_refused(calls: tuple[Call, ...], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        Schedule("x", "", 8, calls)
