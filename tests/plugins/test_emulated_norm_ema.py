"""norm_ema: TimestepNorm and ComplexEMA in one kernel, compiled for the CPU, against float64 loops and the two."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from kernel_helpers import ACTIVATIONS, DESCENDING, EPSILON, RANDOM, KernelLibrary
from norm_ema_helpers import check_norm_ema, norm_ema_inputs, run_apart, run_norm_ema

INVALID_ARGUMENT, UNSUPPORTED = 1, 2  # enum mgd_status

# D, G, N: groups smaller and larger than a block's channels, that begin inside one; every layout of modes.
SIZES = [(24, 3, 16), (1, 1, 1), (66, 6, 4), (70, 1, 8), (96, 2, 32), (45, 45, 5), (40, 5, 40), (20, 4, 256)]


@pytest.mark.parametrize("dtype", ACTIVATIONS)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_one_token_matches_float64(kernels: KernelLibrary, sizes: tuple[int, ...], dtype: str) -> None:
    D, G, N = sizes
    check_norm_ema(kernels, dtype, norm_ema_inputs(B=3, T=1, D=D, G=G, N=N))


@pytest.mark.parametrize("dtype", ACTIVATIONS)
@pytest.mark.parametrize("num_tokens", [2, 65])
def test_many_tokens_match_float64(kernels: KernelLibrary, num_tokens: int, dtype: str) -> None:
    check_norm_ema(kernels, dtype, norm_ema_inputs(B=2, T=num_tokens, D=12, G=3, N=5))


@pytest.mark.parametrize("dtype", ACTIVATIONS)
@pytest.mark.parametrize("sizes", SIZES[:5], ids=str)
def test_the_bits_are_those_of_the_two_operators(kernels: KernelLibrary, sizes: tuple[int, ...], dtype: str) -> None:
    D, G, N = sizes
    call = norm_ema_inputs(B=3, T=1, D=D, G=G, N=N)
    for found, expected in zip(run_norm_ema(kernels, dtype, call), run_apart(kernels, dtype, call), strict=True):
        assert found.tobytes() == expected.tobytes()


@pytest.mark.parametrize("order", [DESCENDING, RANDOM])
def test_results_do_not_depend_on_the_order_of_threads(
    kernels: KernelLibrary, set_order: Callable[[int], None], order: int
) -> None:
    call = norm_ema_inputs(B=3, T=1, D=66, G=6, N=16)
    expected = run_norm_ema(kernels, "float32", call)
    set_order(order)
    for one, other in zip(run_norm_ema(kernels, "float32", call), expected, strict=True):
        assert one.tobytes() == other.tobytes()


def test_nan_in_the_past_reaches_only_rows_that_have_one(kernels: KernelLibrary) -> None:
    call = norm_ema_inputs(B=3, T=1, D=12, G=3, N=4)
    call.norm[1][:], call.ema[0][:] = np.nan, np.nan
    for result in run_norm_ema(kernels, "float32", call):
        assert np.isfinite(result[0]).all()
        assert np.isnan(result[1:]).all()


def test_no_tokens_copy_the_states(kernels: KernelLibrary) -> None:
    call = norm_ema_inputs(B=3, T=0, D=12, G=3, N=4)
    _, present_norm, _, present_cema = run_norm_ema(kernels, "float32", call)
    for present, past in ((present_norm, call.norm[1]), (present_cema, call.ema[0])):
        assert not present[0].any()
        np.testing.assert_allclose(present[1:], past[1:], rtol=1e-7, atol=1e-7, equal_nan=False)


POINTERS = ("x", "past_norm", "position", "weight", "bias", "past_cema", "p", "q", "gamma", "omega")
OUTPUTS = ("u", "present_norm", "y", "present_cema")


def call_norm_ema(kernels: KernelLibrary, **changes: Any) -> int:
    """Status of a call with plausible arguments but for `changes`."""
    memory = {name: np.zeros(4096, np.float32) for name in (*POINTERS, *OUTPUTS, "workspace")}
    pointers = {name: ctypes.c_void_p(array.ctypes.data) for name, array in memory.items()}
    for name, value in changes.items():
        if name in pointers:
            pointers[name] = value if isinstance(value, ctypes.c_void_p) else pointers.get(value)
    sizes = {"B": 1, "T": 1, "D": 4, "G": 2, "N": 3}
    return int(
        kernels.library.mgd_timestep_norm_complex_ema(
            changes.get("dtype", 0),
            *(ctypes.c_int64(changes.get(name, size)) for name, size in sizes.items()),
            *(pointers[name] for name in POINTERS[:5]),
            ctypes.c_float(changes.get("epsilon", EPSILON)),
            *(pointers[name] for name in (*POINTERS[5:], *OUTPUTS, "workspace")),
            ctypes.c_size_t(changes.get("bytes", 4096)),
            None,
        )
    )


def test_impossible_arguments_are_refused(kernels: KernelLibrary) -> None:
    assert call_norm_ema(kernels) == 0
    for name in (*POINTERS, *OUTPUTS):
        assert call_norm_ema(kernels, **{name: None}) == INVALID_ARGUMENT, name
    for pair in (("u", "x"), ("y", "x"), ("y", "u"), ("present_norm", "past_norm"), ("present_cema", "past_cema")):
        assert call_norm_ema(kernels, **{pair[0]: pair[1]}) == INVALID_ARGUMENT, pair
    for name in ("B", "T", "D"):
        assert call_norm_ema(kernels, **{name: -1}) == INVALID_ARGUMENT, name
    for changes in ({"G": 3}, {"G": 0}, {"N": 0}, {"dtype": 3}):
        assert call_norm_ema(kernels, **changes) == INVALID_ARGUMENT, changes
    for epsilon in (0.0, -1.0, np.nan, np.inf):
        assert call_norm_ema(kernels, epsilon=epsilon) == INVALID_ARGUMENT
    assert call_norm_ema(kernels, N=257) == UNSUPPORTED
    assert call_norm_ema(kernels, B=0) == 0
    assert call_norm_ema(kernels, workspace=None, bytes=0) == 0
    assert call_norm_ema(kernels, T=17, workspace=None, bytes=0) == INVALID_ARGUMENT
    assert call_norm_ema(kernels, T=17, workspace=ctypes.c_void_p(8)) == INVALID_ARGUMENT  # not on 16 bytes
