"""The backward kernels, compiled for the CPU, against autograd through the recurrences in float64."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kernel_helpers import (
    ACTIVATIONS,
    EPSILON,
    MARGIN,
    HostMemory,
    KernelLibrary,
    check_complex_ema_backward,
    check_timestep_norm_backward,
    complex_ema_inputs,
    timestep_norm_inputs,
)

INVALID_ARGUMENT, UNSUPPORTED = 1, 2  # enum mgd_status

# B, T, D, N: every layout of modes; T on and off the tiles (16, 32 and 8 tokens) and their stretches.
CEMA_SIZES = [
    (3, 1, 33, 16),
    (2, 2, 5, 3),
    (1, 16, 7, 4),
    (3, 33, 5, 8),
    (2, 63, 9, 16),
    (2, 64, 35, 4),
    (3, 65, 3, 32),
    (1, 257, 5, 16),
    (2, 9, 3, 40),
    (1, 5, 2, 256),
]
# B, T, D, G: groups smaller and larger than a warp's packs, one token to several tiles of the scan.
NORM_SIZES = [
    (3, 1, 24, 3),
    (3, 2, 10, 2),
    (2, 63, 96, 2),
    (2, 64, 33, 1),
    (3, 65, 66, 6),
    (2, 257, 16, 2),
    (1, 1100, 6, 2),
    (1, 3, 544, 1),
]


@pytest.mark.parametrize("sizes", CEMA_SIZES, ids=str)
def test_complex_ema_gradients(kernels: KernelLibrary, sizes: tuple[int, ...]) -> None:
    B, T, D, N = sizes
    check_complex_ema_backward(kernels, "float32", complex_ema_inputs(B=B, T=T, D=D, N=N))


@pytest.mark.parametrize("sizes", NORM_SIZES, ids=str)
def test_timestep_norm_gradients(kernels: KernelLibrary, sizes: tuple[int, ...]) -> None:
    B, T, D, G = sizes
    check_timestep_norm_backward(kernels, "float32", timestep_norm_inputs(B=B, T=T, D=D, G=G))


@pytest.mark.parametrize("dtype", ACTIVATIONS)
@pytest.mark.parametrize("margin", [MARGIN, MARGIN + 1], ids=["aligned", "unaligned"])
def test_gradients_of_every_activation_type(emulated_path: Path, dtype: str, margin: int) -> None:
    kernels = KernelLibrary(emulated_path, HostMemory(), margin)
    check_complex_ema_backward(kernels, dtype, complex_ema_inputs(B=2, T=40, D=40, N=16))
    check_timestep_norm_backward(kernels, dtype, timestep_norm_inputs(B=2, T=40, D=64, G=2))


def both_gradients(kernels: KernelLibrary) -> list[np.ndarray]:
    cema, norm = complex_ema_inputs(B=3, T=45, D=11, N=16), timestep_norm_inputs(B=3, T=300, D=66, G=2)
    grads = []
    for run, inputs in ((kernels.complex_ema_backward, cema), (kernels.timestep_norm_backward, norm)):
        random = np.random.default_rng(1)
        given = [random.standard_normal(tensor.shape).astype(np.float32) for tensor in inputs[:2]]
        grads += run("float32", inputs, given)
    return grads


@pytest.mark.parametrize("order", [1, 20240801], ids=["descending", "random"])
def test_gradients_do_not_depend_on_the_order_of_threads(
    kernels: KernelLibrary, set_order: Callable[[int], None], order: int
) -> None:
    expected = both_gradients(kernels)
    set_order(order)
    for one, other in zip(both_gradients(kernels), expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, equal_nan=False)


def test_without_tokens_the_gradient_of_the_state_passes_through(kernels: KernelLibrary) -> None:
    cema, norm = complex_ema_inputs(B=3, T=0, D=6, N=4), timestep_norm_inputs(B=3, T=0, D=6, G=2)
    for run, inputs in ((kernels.complex_ema_backward, cema), (kernels.timestep_norm_backward, norm)):
        grad_present = np.random.default_rng(2).standard_normal(inputs[1].shape).astype(np.float32)
        _, grad_past, *others = run("float32", inputs, [inputs[0], grad_present])
        assert not grad_past[0].any()
        kept = grad_present if len(others) == 4 else np.repeat(grad_present[..., ::2], 2, -1)
        np.testing.assert_array_equal(grad_past[1:], kept[1:])
        assert not any(grad.any() for grad in others)


def test_without_rows_gradients_of_weights_are_zero(kernels: KernelLibrary) -> None:
    cema, norm = complex_ema_inputs(B=1, T=3, D=6, N=4), timestep_norm_inputs(B=1, T=3, D=6, G=2)
    for run, inputs in ((kernels.complex_ema_backward, cema), (kernels.timestep_norm_backward, norm)):
        inputs[:3] = [array[:0] for array in inputs[:3]]
        grad_x, _, *others = run("float32", inputs, inputs[:2])
        assert grad_x.size == 0
        assert all(grad.size and not grad.any() for grad in others)


def status_of(kernels: KernelLibrary, operator: str, sizes: list[int], num_pointers: int, **change: Any) -> int:
    """Of a call with plausible arguments but for one null pointer, one workspace byte less, or other sizes."""
    arrays = [np.zeros(8192, np.float32) for _ in range(num_pointers)]
    arguments: list[Any] = [ctypes.c_void_p(array.ctypes.data) for array in arrays]
    if change.get("null") is not None:
        arguments[change["null"]] = None
    if change.get("alias"):
        arguments[change["alias"][1]] = arguments[change["alias"][0]]
    if operator == "timestep_norm_backward":
        arguments.insert(4, ctypes.c_float(change.get("epsilon", EPSILON)))
    num_bytes = kernels.workspace_bytes(operator, *sizes) - change.get("missing_bytes", 0)
    scratch = np.zeros(1 << 20, np.uint8)
    function = kernels.library[f"mgd_{operator}"]
    tail = [ctypes.c_void_p(scratch.ctypes.data), ctypes.c_size_t(num_bytes), None]
    return int(function(change.get("dtype", 0), *map(ctypes.c_int64, sizes), *arguments, *tail))


@pytest.mark.parametrize(
    ("operator", "num_pointers", "grad_x"),
    [("complex_ema_backward", 15, 9), ("timestep_norm_backward", 10, 6)],
)
def test_impossible_arguments_are_refused(
    kernels: KernelLibrary, operator: str, num_pointers: int, grad_x: int
) -> None:
    sizes = [1, 2, 4, 2]
    assert status_of(kernels, operator, sizes, num_pointers) == 0
    for null in range(num_pointers):
        assert status_of(kernels, operator, sizes, num_pointers, null=null) == INVALID_ARGUMENT, null
    for change in ({"missing_bytes": 1}, {"dtype": 3}, {"alias": (0, grad_x)}):
        assert status_of(kernels, operator, sizes, num_pointers, **change) == INVALID_ARGUMENT, change
    assert status_of(kernels, operator, [1, -2, 4, 2], num_pointers) == INVALID_ARGUMENT
    assert status_of(kernels, operator, [1, 2, 4, 0], num_pointers) == INVALID_ARGUMENT


def test_impossible_sizes_are_refused(kernels: KernelLibrary) -> None:
    assert status_of(kernels, "complex_ema_backward", [1, 2, 4, 257], 15) == UNSUPPORTED
    assert status_of(kernels, "timestep_norm_backward", [1, 2, 4, 3], 10) == INVALID_ARGUMENT
    for epsilon in (0.0, np.nan):
        assert status_of(kernels, "timestep_norm_backward", [1, 2, 4, 2], 10, epsilon=epsilon) == INVALID_ARGUMENT
