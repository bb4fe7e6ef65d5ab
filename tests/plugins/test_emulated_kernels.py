"""The CUDA kernels, compiled for the CPU, against float64 loops."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import numpy as np
import pytest
from helpers import assert_close
from kernel_helpers import (
    ACTIVATIONS,
    DESCENDING,
    EPSILON,
    RANDOM,
    SPLIT_TOLERANCE,
    KernelLibrary,
    assert_norm_state,
    check_complex_ema,
    check_timestep_norm,
    complex_ema_inputs,
    run_in_parts,
    timestep_norm_inputs,
)
from model.reference import timestep_norm_reference

from megalodon_deploy.state import NORM_PARTS, pack_norm

INVALID_ARGUMENT, UNSUPPORTED = 1, 2  # enum mgd_status

# B, T, D, N: T and B * D off and on the tiles, every kernel variant, N that does and does not fill its lanes.
CEMA_SIZES = [
    (3, 1, 33, 16),
    (4, 1, 1, 1),
    (3, 2, 13, 3),
    (2, 63, 9, 4),
    (3, 64, 5, 8),
    (3, 65, 7, 32),
    (2, 257, 5, 16),
    (2, 9, 3, 40),
    (1, 3, 2, 256),
    (2, 70, 3, 200),
    (2, 5, 40, 8),
]
# B, T, D, G: groups smaller and larger than a warp and of one scalar, one token to several tiles of the prefix.
NORM_SIZES = [
    (3, 1, 24, 3),
    (4, 2, 5, 5),
    (2, 16, 96, 2),
    (2, 17, 33, 1),
    (3, 63, 12, 2),
    (3, 64, 8, 4),
    (2, 65, 66, 6),
    (3, 257, 10, 5),
    (1, 1100, 6, 2),
    (1, 17, 544, 1),
]


@pytest.mark.parametrize("dtype", ACTIVATIONS)
@pytest.mark.parametrize("sizes", CEMA_SIZES, ids=str)
def test_complex_ema_matches_float64(kernels: KernelLibrary, sizes: tuple[int, ...], dtype: str) -> None:
    B, T, D, N = sizes
    check_complex_ema(kernels.complex_ema, dtype, complex_ema_inputs(B=B, T=T, D=D, N=N))


@pytest.mark.parametrize("dtype", ACTIVATIONS)
@pytest.mark.parametrize("sizes", NORM_SIZES, ids=str)
def test_timestep_norm_matches_float64(kernels: KernelLibrary, sizes: tuple[int, ...], dtype: str) -> None:
    B, T, D, G = sizes
    check_timestep_norm(kernels.timestep_norm, dtype, timestep_norm_inputs(B=B, T=T, D=D, G=G))


@pytest.mark.parametrize("order", [DESCENDING, RANDOM])
def test_results_do_not_depend_on_the_order_of_threads(
    kernels: KernelLibrary, set_order: Callable[[int], None], order: int
) -> None:
    cema, norm = complex_ema_inputs(B=3, T=65, D=11, N=16), timestep_norm_inputs(B=3, T=300, D=66, G=2)
    expected = [*kernels.complex_ema("float32", cema), *kernels.timestep_norm("float32", norm)]
    set_order(order)
    found = [*kernels.complex_ema("float32", cema), *kernels.timestep_norm("float32", norm)]
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, equal_nan=False)


@pytest.mark.parametrize("lengths", [[65], [1] * 65, [1, 40, 24], [16, 17, 32]], ids=lambda lengths: str(len(lengths)))
def test_any_split_gives_the_same(kernels: KernelLibrary, lengths: list[int]) -> None:
    cema, norm = complex_ema_inputs(B=3, T=65, D=7, N=5), timestep_norm_inputs(B=3, T=65, D=12, G=3)
    whole, parts = kernels.complex_ema("float32", cema), run_in_parts(kernels.complex_ema, "float32", cema, lengths)
    for one, other in zip(parts, whole, strict=True):
        assert_close(one, other, 2e-6)
    whole, parts = (
        kernels.timestep_norm("float32", norm),
        run_in_parts(kernels.timestep_norm, "float32", norm, lengths),
    )
    np.testing.assert_allclose(parts[0], whole[0], rtol=0, atol=2e-6, equal_nan=False)
    assert_norm_state(parts[1], whole[1], SPLIT_TOLERANCE)


@pytest.mark.parametrize("num_tokens", [1, 17])
def test_nan_in_the_past_reaches_only_rows_that_have_one(kernels: KernelLibrary, num_tokens: int) -> None:
    """Row 0 is fresh. The others show that the check could fail."""
    cema, norm = complex_ema_inputs(B=3, T=num_tokens, D=6, N=4), timestep_norm_inputs(B=3, T=num_tokens, D=6, G=2)
    for run, inputs in ((kernels.complex_ema, cema), (kernels.timestep_norm, norm)):
        inputs[1][:] = np.nan
        for result in run("float32", inputs):
            assert np.isfinite(result[0]).all()
            assert np.isnan(result[1:]).all()


def test_norm_state_keeps_float64_precision(kernels: KernelLibrary) -> None:
    """At token 10^7 one token moves the mean by about 10^-7 of itself, less than half a unit of float32."""
    num_tokens = 200
    random = np.random.default_rng(5)
    position = np.array([10_000_000])
    past = pack_norm(np.array([[30.0, 29.0]]), np.array([[1.0, 2.0]]))
    x = (33 + random.standard_normal((1, num_tokens, 8))).astype(np.float32)
    ones, zeros = np.ones(8, np.float32), np.zeros(8, np.float32)
    inputs = [x, past, position, ones, zeros]
    _, present = run_in_parts(kernels.timestep_norm, "float32", inputs, [1] * num_tokens)
    _, expected = timestep_norm_reference(*inputs, EPSILON)
    moved = np.abs(expected[..., 0] - [30.0, 29.0]).min()
    assert_norm_state(present, expected, 1e-3 * moved / 30)


@pytest.mark.parametrize("num_tokens", [1, 40])
def test_a_mean_far_from_zero_loses_nothing(kernels: KernelLibrary, num_tokens: int) -> None:
    """30,000 standard deviations: sums relative to 0 would lose three digits."""
    x, past, position, *weights = timestep_norm_inputs(B=2, T=num_tokens, D=64, G=2)
    inputs = [x * np.float32(0.01) + 300, past, np.zeros_like(position), *weights]
    expected, _ = timestep_norm_reference(*inputs, EPSILON)
    assert_close(kernels.timestep_norm("float32", inputs)[0], expected, 2e-5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("factor", [1.0, 1 / 3, 2.0**-10, 1.5], ids=lambda factor: f"{factor:.4f}")
def test_every_16_bit_number_converts_as_in_numpy(kernels: KernelLibrary, dtype: str, factor: float) -> None:
    """With p and gamma zero the operator multiplies by omega: one conversion in, one rounding out."""
    with np.errstate(invalid="ignore"):
        values = np.arange(1 << 16, dtype=np.uint16).view(ACTIVATIONS[dtype])
        values = values[np.isfinite(values)].reshape(1, 16, -1)
    zero = np.zeros((values.shape[2], 1, 2), np.float32)
    omega = np.full(values.shape[2], factor, np.float32)
    y, _ = kernels.complex_ema(dtype, [values, zero[None], np.array([3]), zero[..., 0], zero, zero, omega])
    with np.errstate(over="ignore"):
        expected = (np.float32(0) + values.astype(np.float32) * omega).astype(ACTIVATIONS[dtype])
    np.testing.assert_array_equal(y.view(np.uint16), expected.view(np.uint16))


def test_no_tokens_copy_the_state(kernels: KernelLibrary) -> None:
    cema, norm = complex_ema_inputs(B=3, T=0, D=6, N=4), timestep_norm_inputs(B=3, T=0, D=6, G=2)
    for run, inputs in ((kernels.complex_ema, cema), (kernels.timestep_norm, norm)):
        _, present = run("float32", inputs)
        assert not present[0].any()
        np.testing.assert_allclose(present[1:], inputs[1][1:], rtol=1e-7, atol=1e-7, equal_nan=False)


def test_no_rows_are_no_work(kernels: KernelLibrary) -> None:
    inputs = complex_ema_inputs(B=1, T=2, D=6, N=4)
    for index in range(3):
        inputs[index] = inputs[index][:0]
    y, present = kernels.complex_ema("float32", inputs)
    assert y.size == present.size == 0


def call_complex_ema(kernels: KernelLibrary, *, dtype: int = 0, N: int = 4, **nulls: bool) -> int:
    """Status of a call with plausible pointers but for those named in `nulls`."""
    sizes = {"B": 1, "T": 1, "D": 1, "N": N}
    memory = {name: np.zeros(2048, np.float32) for name in ("x", "past", "position", "p", "q", "gamma", "omega")}
    memory |= {name: np.zeros(2048, np.float32) for name in ("y", "present")}
    pointers = [None if nulls.get(name) else ctypes.c_void_p(array.ctypes.data) for name, array in memory.items()]
    inputs, outputs = pointers[:-2], pointers[-2:]
    sizes_of_call = map(ctypes.c_int64, sizes.values())
    return int(kernels.library.mgd_complex_ema(dtype, *sizes_of_call, *inputs, None, *outputs, None, 0, None))


def test_complex_ema_refuses_impossible_arguments(kernels: KernelLibrary) -> None:
    assert call_complex_ema(kernels) == 0
    assert call_complex_ema(kernels, N=256) == 0
    assert call_complex_ema(kernels, N=257) == UNSUPPORTED
    assert call_complex_ema(kernels, N=0) == INVALID_ARGUMENT
    assert call_complex_ema(kernels, dtype=3) == INVALID_ARGUMENT
    for name in ("x", "past", "position", "p", "q", "gamma", "omega", "y", "present"):
        assert call_complex_ema(kernels, **{name: True}) == INVALID_ARGUMENT, name


def call_timestep_norm(
    kernels: KernelLibrary,
    *,
    T: int = 17,
    G: int = 2,
    epsilon: float = EPSILON,
    workspace: int = 4096,
    alias: bool = False,
) -> int:
    """Status of a call with B = 1 and D = 4."""
    x, past, position, weight, bias, y, present = (np.zeros(2048, np.float32) for _ in range(7))
    tensors = [x, past, position, weight, bias]
    outputs = [y, past if alias else present]
    scratch = np.zeros(4096, np.uint8)
    pointers = [[ctypes.c_void_p(array.ctypes.data) for array in group] for group in (tensors, outputs, [scratch])]
    sizes = map(ctypes.c_int64, (1, T, 4, G))
    tail = [*pointers[1], *pointers[2], ctypes.c_size_t(workspace), None]
    return int(kernels.library.mgd_timestep_norm(0, *sizes, *pointers[0], ctypes.c_float(epsilon), None, *tail))


def test_timestep_norm_refuses_impossible_arguments(kernels: KernelLibrary) -> None:
    needed = kernels.workspace_bytes("timestep_norm", 1, 17, 2)
    assert 0 < needed <= 4096
    assert call_timestep_norm(kernels, workspace=needed) == 0
    assert call_timestep_norm(kernels, workspace=needed - 1) == INVALID_ARGUMENT
    assert call_timestep_norm(kernels, T=1, workspace=0) == 0
    assert call_timestep_norm(kernels, T=-1) == INVALID_ARGUMENT
    assert call_timestep_norm(kernels, G=3) == INVALID_ARGUMENT
    assert call_timestep_norm(kernels, G=0) == INVALID_ARGUMENT
    assert call_timestep_norm(kernels, alias=True) == INVALID_ARGUMENT
    for epsilon in (0.0, -1.0, np.nan, np.inf):
        assert call_timestep_norm(kernels, epsilon=epsilon) == INVALID_ARGUMENT


def test_every_status_has_a_sentence(kernels: KernelLibrary) -> None:
    sentences = [kernels.status_string(status) for status in (0, 1, 2, 3, 1719, -5)]
    assert len(set(sentences)) == len(sentences)
    assert all(sentences)


def test_norm_state_has_the_parts_of_the_table(kernels: KernelLibrary) -> None:
    """hi is the nearest float32 and lo the rest, as `state.pack_norm` writes them."""
    _, present = kernels.timestep_norm("float32", timestep_norm_inputs(B=3, T=5, D=12, G=3))
    parts = present.astype(np.float64).reshape(3, 3, NORM_PARTS // 2, 2).sum(-1)
    np.testing.assert_array_equal(present, pack_norm(parts[..., 0], parts[..., 1]))
