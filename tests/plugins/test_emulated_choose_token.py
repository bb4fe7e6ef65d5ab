"""choose_token, compiled for the CPU: the choices of the runtime's `sampling.py`."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from choice_helpers import CHOICE_SETTINGS, ChoiceRow, run_choices
from kernel_helpers import ASCENDING, DESCENDING, RANDOM, KernelLibrary

from megalodon_deploy.runtime.sampling import SamplingParams


@pytest.mark.parametrize(
    ("vocab_size", "order"), [(1, ASCENDING), (50, RANDOM), (257, DESCENDING), (600, ASCENDING), (600, DESCENDING)]
)
def test_choices_in_any_order_of_threads_are_those_of_the_runtime(
    kernels: KernelLibrary, set_order: Callable[[int], None], vocab_size: int, order: int
) -> None:
    """The penalised tokens are the best ones and any others, so that many choices depend on the penalty."""
    set_order(order)
    rng = np.random.default_rng(vocab_size)
    rows: list[ChoiceRow | None] = []
    for index, params in enumerate(CHOICE_SETTINGS):
        logits_V = rng.normal(-10 * (index % 2), 3, vocab_size).astype(np.float32)
        recent = [*rng.integers(0, vocab_size, 20).tolist(), *np.argsort(logits_V)[-10:].tolist()]
        rows.append(ChoiceRow(logits_V, params, recent, seed=index))
    found = run_choices(kernels, [*rows, None])
    assert found.tolist() == [*[row.expected for row in rows if row], -7]


@pytest.mark.parametrize("params", CHOICE_SETTINGS, ids=range(len(CHOICE_SETTINGS)))
def test_equal_logits_are_taken_in_token_order(kernels: KernelLibrary, params: SamplingParams) -> None:
    """Few distinct values: every border is shared, within a thread's run and over many."""
    rng = np.random.default_rng(3)
    rows: list[ChoiceRow | None] = []
    for seed in range(4):
        logits_V = rng.integers(-2, 3, 300).astype(np.float32)
        rows.append(ChoiceRow(logits_V, params, rng.integers(0, 300, 40).tolist(), seed))
    assert run_choices(kernels, rows).tolist() == [row.expected for row in rows if row]


def test_draws_follow_the_distribution_to_its_ends(kernels: KernelLibrary) -> None:
    logits_V = np.log(np.array([0.1, 0.2, 0.3, 0.4], np.float32))
    rows: list[ChoiceRow | None] = []
    for uniform in (0.0, 0.0999, 0.1001, 0.2999, 0.3001, 0.5999, 0.6001, 1 - 2.0**-53):
        row = ChoiceRow(logits_V, SamplingParams(), [], seed=0)
        row.uniform = uniform
        rows.append(row)
    assert run_choices(kernels, rows).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_sums_of_a_large_vocabulary_do_not_overflow(kernels: KernelLibrary) -> None:
    """All tokens weigh 1: with the scale of small vocabularies their sum would be beyond 64 bits."""
    row = ChoiceRow(np.zeros(70_000, np.float32), SamplingParams(top_k=69_999), [], seed=5)
    assert run_choices(kernels, [row]).tolist() == [row.expected]


def test_broken_logits_give_no_token(kernels: KernelLibrary) -> None:
    good = np.arange(300, dtype=np.float32)
    rows: list[ChoiceRow | None] = [
        ChoiceRow(good, params, [], 0) for params in (CHOICE_SETTINGS[0], CHOICE_SETTINGS[1]) for _ in range(4)
    ]
    for index, value in enumerate([np.nan, np.inf, None, -np.inf] * 2):
        row = rows[index]
        assert row is not None
        row.logits_V = good.copy()
        if value == -np.inf:
            row.logits_V[:] = value
        elif value is not None:
            row.logits_V[77] = value
    found = run_choices(kernels, rows)
    assert (found[[0, 1, 3, 4, 5, 7]] == -1).all()
    assert (found[[2, 6]] >= 0).all()


def test_impossible_calls_are_refused(kernels: KernelLibrary) -> None:
    array = (ctypes.c_int64 * 64)()
    good: dict[str, Any] = {"B": 1, "V": 4, "logits": array, "choices": array, "recent": array, "max_recent": 2}
    good |= {"tokens": array, "workspace": array, "workspace_bytes": 32, "stream": None}

    def call(**changes: Any) -> int:
        values = good | changes
        counts = {"B", "V", "max_recent", "workspace_bytes"}
        arguments = [ctypes.c_int64(value) if name in counts else value for name, value in values.items()]
        return int(kernels.library.mgd_choose_tokens(*arguments))

    assert call() == 0
    assert call(B=0, logits=None) == 0
    bad: list[dict[str, Any]] = [{"B": -1}, {"V": 0}, {"max_recent": -1}, {"workspace_bytes": 31}]
    bad += [{"workspace": ctypes.c_void_p(8)}]  # not on 16 bytes
    bad += [{name: None} for name in ("logits", "choices", "recent", "tokens", "workspace")]
    for changes in bad:
        assert call(**changes) == 1, changes
    assert call(V=(1 << 24) + 1, workspace_bytes=1 << 40) == 2
