"""Properties over schedules that nobody chose: any split, any start, any handover computes the same."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalodon_deploy.bundle import Bundle
from megalodon_deploy.model.megalodon import Megalodon
from megalodon_deploy.verify.candidates import cpu_candidates
from megalodon_deploy.verify.comparison import Candidate, compare_candidate, run_references
from megalodon_deploy.verify.reference import CallByCallRunner, WholeSequenceRunner, make_start
from megalodon_deploy.verify.runners import make_feeds
from megalodon_deploy.verify.schedule import Handover, Schedule, Stretch, buckets, rows_used, walk, whole_chunk

CHUNK = 12
EDGES = [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK - 1, 2 * CHUNK, 2**31 - 2, 2**33 + CHUNK - 1]
HANDOVERS: list[Handover] = ["carried", "saved", "forked", "moved"]


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    starts = draw(st.lists(st.sampled_from(EDGES) | st.integers(0, 5 * CHUNK), min_size=1, max_size=3))
    stretches = draw(
        st.lists(
            st.builds(
                Stretch,
                st.integers(1, 2 * CHUNK + 1),
                st.sets(st.integers(0, len(starts) - 1)).map(tuple) if draw(st.booleans()) else st.just(()),
                st.sampled_from(HANDOVERS),
            ),
            min_size=1,
            max_size=4,
        )
    )
    capacity = draw(st.sampled_from([rows_used, whole_chunk, buckets]))
    return walk("random", "", CHUNK, tuple(starts), stretches, capacity)


@pytest.fixture(scope="module")
def candidates(bundle: Bundle) -> list[Candidate]:
    found, _ = cpu_candidates(bundle)
    opened = [(candidate, functools.cache(candidate.open)) for candidate in found]
    return [dataclasses.replace(candidate, open=open_once) for candidate, open_once in opened]


@settings(max_examples=40, deadline=None)
@given(schedule=schedules(), seed=st.integers(0, 2**32 - 1))
def test_every_schedule_gives_the_same(
    model: Megalodon, candidates: list[Candidate], schedule: Schedule, seed: int
) -> None:
    start = make_start(model, schedule, np.dtype(np.float32), seed)
    feeds = list(make_feeds(schedule, model.config.vocab_size, seed))
    runners = [
        WholeSequenceRunner(model, schedule, start, name="whole sequence"),
        CallByCallRunner(model, schedule, start, name="call by call"),
    ]
    references = run_references(schedule, runners, feeds, lambda who, effort: None)
    for candidate in candidates:
        runner = candidate.open()(schedule, start)
        findings = compare_candidate(
            model.config, schedule, candidate, runner, feeds, references, lambda who, effort: None
        )
        assert [finding.describe() for finding in findings if not finding.passed] == []
