"""What the forward kernels make of shorter rows, unaligned tensors and devices of other sizes, compiled for the CPU."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from attention_helpers import attention_inputs, check_attention
from kernel_helpers import (
    ACTIVATIONS,
    ASCENDING,
    DESCENDING,
    MARGIN,
    HostMemory,
    KernelLibrary,
    check_complex_ema,
    check_shorter_rows,
    check_timestep_norm,
    complex_ema_inputs,
    six_rows,
    timestep_norm_inputs,
)
from norm_ema_helpers import check_norm_ema, norm_ema_inputs

MULTIPROCESSORS = 132  # of an H200


@pytest.fixture
def set_multiprocessors(kernels: KernelLibrary) -> Iterator[Callable[[int], None]]:
    def choose(count: int) -> None:
        kernels.library.mgd_emulate_multiprocessors(ctypes.c_int(count))

    yield choose
    choose(1)


@pytest.mark.parametrize("T", [4, 16, 70, 300])
def test_rows_may_be_shorter_than_the_call(kernels: KernelLibrary, T: int) -> None:
    check_shorter_rows(kernels.complex_ema, six_rows(complex_ema_inputs(B=4, T=T, D=5, N=4)))
    check_shorter_rows(kernels.timestep_norm, six_rows(timestep_norm_inputs(B=4, T=T, D=6, G=2)))


@pytest.mark.parametrize(("T", "N"), [(800, 3), (1030, 16), (800, 40)])
def test_segments_give_the_recurrence(
    kernels: KernelLibrary, set_multiprocessors: Callable[[int], None], T: int, N: int
) -> None:
    """Rows are cut on a device with many multiprocessors; on one with a single one they are not."""
    inputs = complex_ema_inputs(B=2, T=T, D=3, N=N)
    whole, _ = kernels.complex_ema("float32", inputs)
    set_multiprocessors(MULTIPROCESSORS)
    check_complex_ema(kernels.complex_ema, "float32", inputs)
    cut, _ = kernels.complex_ema("float32", inputs)
    assert cut.tobytes() != whole.tobytes(), "rows were not cut"
    without_workspace, _ = kernels.complex_ema("float32", inputs, workspace_bytes=0)
    np.testing.assert_array_equal(without_workspace, whole)


@pytest.mark.parametrize("num_segments", [2, 3])
def test_a_small_workspace_makes_fewer_segments(
    kernels: KernelLibrary, set_multiprocessors: Callable[[int], None], num_segments: int
) -> None:
    """It is exactly as large as the states at their edges: nothing is written behind it."""
    set_multiprocessors(MULTIPROCESSORS)
    inputs = complex_ema_inputs(B=2, T=1030, D=3, N=4)
    most, _ = kernels.complex_ema("float32", inputs)
    num_bytes = (num_segments - 1) * inputs[1].nbytes
    run = partial(kernels.complex_ema, workspace_bytes=num_bytes)
    check_complex_ema(run, "float32", inputs)
    assert run("float32", inputs)[0].tobytes() != most.tobytes()


@pytest.mark.parametrize("order", [ASCENDING, DESCENDING])
def test_segments_of_shorter_rows(
    kernels: KernelLibrary, set_multiprocessors: Callable[[int], None], set_order: Callable[[int], None], order: int
) -> None:
    set_multiprocessors(MULTIPROCESSORS)
    set_order(order)
    check_shorter_rows(kernels.complex_ema, six_rows(complex_ema_inputs(B=4, T=1100, D=2, N=4)))


def test_no_smaller_call_needs_more_workspace(kernels: KernelLibrary) -> None:
    """TensorRT grants what the largest call of a profile asks for."""
    random = np.random.default_rng(0)
    for _ in range(2000):
        B, T, D = (int(size) for size in np.exp(random.uniform(0, [5, 10, 9])) + 1)
        N = int(random.choice([1, 4, 16, 33, 256]))
        largest = kernels.workspace_bytes("complex_ema", B, T, D, N)
        assert largest <= 2 << 20
        smaller = [int(random.integers(1, size + 1)) for size in (B, T, D)]
        assert kernels.workspace_bytes("complex_ema", *smaller, N) <= largest


@pytest.mark.parametrize("dtype", ACTIVATIONS)
@pytest.mark.parametrize("T", [1, 70])
def test_tensors_need_not_start_on_16_bytes(emulated_path: Path, dtype: str, T: int) -> None:
    kernels = KernelLibrary(emulated_path, HostMemory(), margin=MARGIN + 1)
    check_complex_ema(kernels.complex_ema, dtype, complex_ema_inputs(B=2, T=T, D=40, N=16))
    check_timestep_norm(kernels.timestep_norm, dtype, timestep_norm_inputs(B=2, T=T, D=64, G=2))
    check_norm_ema(kernels, dtype, norm_ema_inputs(B=2, T=T, D=64, G=2, N=16))
    for past in (dtype, "int8"):
        call = attention_inputs(T=T, S=20, dz=16, dv=32, filled=[20, 7], dtype=dtype, past=past)
        check_attention(kernels, call, dtype)


def test_tiny_input_coefficients_keep_the_state(kernels: KernelLibrary) -> None:
    """The walk divides states by p: 0 and numbers close to it must neither lose the past nor overflow."""
    x, past, position, p, *others = complex_ema_inputs(B=2, T=70, D=6, N=4)
    p[:, 0], p[:, 1], p[:, 2] = 0, 1e-38, -1e-15
    check_complex_ema(kernels.complex_ema, "float32", [x, past, position, p, *others])
