"""Choosing tokens on a GPU, through the C interface, against `sampling.py`."""

from __future__ import annotations

import numpy as np
import pytest
from choice_helpers import CHOICE_SETTINGS, ChoiceRow, run_choices
from kernel_helpers import KernelLibrary

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("vocab_size", [1, 50, 256, 257, 32_000, 128_256])
@pytest.mark.parametrize("is_coarse", [False, True], ids=["distinct", "ties"])
def test_choices_on_gpu_are_those_of_the_runtime(kernels: KernelLibrary, vocab_size: int, is_coarse: bool) -> None:
    rng = np.random.default_rng(vocab_size)
    rows: list[ChoiceRow | None] = []
    for index, params in enumerate(CHOICE_SETTINGS * 4):
        logits_V = rng.normal(0, 3, vocab_size).astype(np.float32)
        logits_V = np.round(logits_V) if is_coarse else logits_V
        rows.append(ChoiceRow(logits_V, params, rng.integers(0, vocab_size, 40).tolist(), seed=index))
    found = run_choices(kernels, [*rows, None])
    assert found.tolist() == [*[row.expected for row in rows if row], -7]
