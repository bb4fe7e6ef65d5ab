"""What the launchers make of launches that fail: each one's error is the status of the call."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from attention_helpers import append_inputs, attention_inputs, run_append, run_attention
from choice_helpers import ChoiceRow, run_choices
from kernel_helpers import KernelLibrary, complex_ema_inputs, timestep_norm_inputs
from norm_ema_helpers import norm_ema_inputs, run_norm_ema

from megalodon_deploy.runtime.sampling import SamplingParams

MESSAGE = "this launch was to fail"


def complex_ema(kernels: KernelLibrary, *, B: int, T: int) -> None:
    kernels.complex_ema("float32", complex_ema_inputs(B=B, T=T, D=3, N=4))


def complex_ema_backward(kernels: KernelLibrary, *, B: int, T: int) -> None:
    inputs = complex_ema_inputs(B=B, T=T, D=3, N=4)
    kernels.complex_ema_backward("float32", inputs, inputs[:2])


def timestep_norm(kernels: KernelLibrary, *, B: int, T: int) -> None:
    kernels.timestep_norm("float32", timestep_norm_inputs(B=B, T=T, D=4, G=2))


def timestep_norm_backward(kernels: KernelLibrary, *, B: int, T: int) -> None:
    inputs = timestep_norm_inputs(B=B, T=T, D=4, G=2)
    kernels.timestep_norm_backward("float32", inputs, inputs[:2])


def norm_ema(kernels: KernelLibrary, *, B: int, T: int) -> None:
    run_norm_ema(kernels, "float32", norm_ema_inputs(B=B, T=T, D=6, G=2, N=4))


def chunk_attention(kernels: KernelLibrary, *, T: int, S: int, past: str = "float32") -> None:
    run_attention(kernels, attention_inputs(T=T, S=S, dz=4, dv=4, filled=[S], past=past))


def append_rows(kernels: KernelLibrary, *, num_tensors: int) -> None:
    run_append(kernels, append_inputs([(1, 2, np.float32)] * num_tensors, T=1, S=4, filled=[1]))


def choose_token(kernels: KernelLibrary) -> None:
    run_choices(kernels, [ChoiceRow(np.zeros(5, np.float32), SamplingParams.greedy(), [], seed=0)])


CALLS: list[tuple[Callable[..., None], dict[str, int | str], int]] = [  # and how many launches each makes
    (complex_ema, {"B": 2, "T": 4}, 1),
    (complex_ema, {"B": 2, "T": 5}, 1),
    (complex_ema, {"B": 1, "T": 600}, 3),
    (complex_ema_backward, {"B": 1, "T": 5}, 2),
    (complex_ema_backward, {"B": 2, "T": 5}, 6),
    (complex_ema_backward, {"B": 2, "T": 0}, 5),
    (complex_ema_backward, {"B": 0, "T": 5}, 4),
    (timestep_norm, {"B": 2, "T": 16}, 1),
    (timestep_norm, {"B": 2, "T": 17}, 3),
    (timestep_norm_backward, {"B": 2, "T": 1}, 5),
    (timestep_norm_backward, {"B": 2, "T": 0}, 3),
    (timestep_norm_backward, {"B": 0, "T": 1}, 2),
    (norm_ema, {"B": 2, "T": 1}, 1),
    (norm_ema, {"B": 2, "T": 17}, 4),
    (chunk_attention, {"T": 1, "S": 0}, 1),
    (chunk_attention, {"T": 1, "S": 3}, 2),
    (chunk_attention, {"T": 1, "S": 3, "past": "int8"}, 2),
    (chunk_attention, {"T": 2, "S": 3}, 1),
    (append_rows, {"num_tensors": 64}, 1),
    (append_rows, {"num_tensors": 65}, 2),
    (choose_token, {}, 1),
]


@pytest.fixture
def fail_after(kernels: KernelLibrary) -> Iterator[Callable[[int], None]]:
    """On a device with so many multiprocessors that rows are cut."""
    kernels.library.mgd_emulate_multiprocessors(ctypes.c_int(132))
    yield lambda launches: kernels.library.mgd_emulate_failure(ctypes.c_int64(launches))
    kernels.library.mgd_emulate_failure(ctypes.c_int64(-1))
    kernels.library.mgd_emulate_multiprocessors(ctypes.c_int(1))


@pytest.mark.parametrize(
    ("call", "sizes", "num_launches"), CALLS, ids=lambda value: getattr(value, "__name__", str(value))
)
def test_every_launch_that_fails_is_reported(
    kernels: KernelLibrary,
    fail_after: Callable[[int], None],
    call: Callable[..., None],
    sizes: dict[str, int | str],
    num_launches: int,
) -> None:
    for launches in range(num_launches):
        fail_after(launches)
        with pytest.raises(AssertionError, match=MESSAGE):
            call(kernels, **sizes)
    fail_after(num_launches)
    call(kernels, **sizes)
