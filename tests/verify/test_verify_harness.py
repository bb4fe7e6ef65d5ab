"""Runners, schedules and comparison together, on a stand-in graph that is right, and on spoilt ones."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from helpers import small_config

from megalodon_deploy.state import LOGITS, POSITION, TOKENS, zero_state
from megalodon_deploy.verify.finding import Finding
from megalodon_deploy.verify.memory import STALE_MAGNITUDE, PoisonedMemory
from megalodon_deploy.verify.schedule import plan_schedules

CONFIG = small_config(vocab_size=256)
SCHEDULES = {schedule.name: schedule for schedule in plan_schedules(CONFIG)}
Arrays = dict[str, np.ndarray]
Find = Callable[..., list[Finding]]


def misses(findings: list[Finding]) -> list[Finding]:
    return [finding for finding in findings if not finding.passed]


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_model_itself_passes(find: Find, name: str) -> None:
    findings = find(SCHEDULES[name])
    assert {finding.reference for finding in findings} == {"whole", "calls"}
    assert {finding.call for finding in findings} == set(range(len(SCHEDULES[name].calls)))
    assert [miss.describe() for miss in misses(findings)] == []


def fault(change: Callable[[Arrays], object]) -> Callable[[Arrays], Arrays]:
    def apply(arrays: Arrays) -> Arrays:
        change(arrays)
        return arrays

    return apply


def forget_cema(feed: Arrays) -> None:
    feed["past_cema.1"][:] = 0


def shift_position(feed: Arrays) -> None:
    feed[POSITION] += 1


def repeat_token(feed: Arrays) -> None:
    feed[TOKENS][:] = feed[TOKENS][:, :1]


def swap_rows(feed: Arrays) -> None:
    feed["past_norm.0"][:] = feed["past_norm.0"][::-1].copy()


@pytest.mark.parametrize(
    ("schedule", "change", "tensor"),
    [
        ("splits", forget_cema, "present_cema.1"),
        ("steps", shift_position, "present_norm.0"),
        ("prefill", repeat_token, "present_norm.0"),
        ("batch", swap_rows, "present_norm.0"),
    ],
)
def test_a_graph_that_loses_its_inputs_misses_first_where_it_does(
    find: Find, schedule: str, change: Callable[[Arrays], object], tensor: str
) -> None:
    found = misses(find(SCHEDULES[schedule], before=fault(change)))
    assert found[0].tensor == tensor, found[0].describe()
    assert {miss.reference for miss in found} == {"whole", "calls"}


def test_float32_norm_state_misses_deep_in_a_stream(find: Find) -> None:
    def drop_low_parts(outputs: Arrays) -> None:
        for name in outputs:
            if name.startswith("present_norm"):
                outputs[name][..., 1::2] = 0

    assert not misses(find(SCHEDULES["splits"], after=fault(drop_low_parts)))
    assert {miss.kind for miss in misses(find(SCHEDULES["deep"], after=fault(drop_low_parts)))} == {
        "norm mean",
        "norm var",
    }


def test_a_missing_state_stops_the_stream_and_is_named(find: Find) -> None:
    found = misses(find(SCHEDULES["steps"], after=fault(lambda outputs: outputs.pop("present_cema.0"))))
    assert {(miss.tensor, miss.problem) for miss in found[:2]} == {("present_cema.0", "this output is missing")}
    assert "present_cema.0 is missing" in str(found[-1].problem)


def test_a_graph_that_raises_is_a_miss(find: Find) -> None:
    def fail(feed: Arrays) -> None:
        if feed[POSITION][0] == CONFIG.chunk_size:
            raise RuntimeError("no\nkernel")

    (miss,) = misses(find(SCHEDULES["steps"], before=fault(fail)))
    assert miss.call == 2
    assert "no kernel" in str(miss.problem)


def test_missing_logits_alone_do_not_stop_the_stream(find: Find) -> None:
    found = misses(find(SCHEDULES["steps"], after=fault(lambda outputs: outputs.pop(LOGITS))))
    assert {miss.tensor for miss in found} == {LOGITS}
    assert {miss.call for miss in found} == {0, 1, 2, 3}


def test_memory_poisons_what_must_not_be_read() -> None:
    zeros = zero_state(CONFIG, batch=2, capacity=5, activation=np.dtype(np.float32))
    start = {name: array + 1 for name, array in zeros.items()}
    memory = PoisonedMemory(CONFIG, (3, 0), start, num_rows=12, activation=np.dtype(np.float16))
    past = memory.past((3, 0), 7)
    assert past["past_key.0"].shape == (2, 2, 7, 8)
    assert past["past_key.0"].dtype == np.float16
    assert (past["past_key.0"][0, :, :3] == 1).all()
    assert (np.abs(past["past_key.0"][0, :, 3:]) == STALE_MAGNITUDE).all()
    assert (np.abs(past["past_key.0"][1]) == STALE_MAGNITUDE).all()
    assert (past["past_norm.final"][0] == 1).all()
    assert np.isnan(past["past_norm.final"][1]).all()
    assert np.isnan(memory.past((0, 0), 7)["past_cema.1"]).all(), "a reset row"
