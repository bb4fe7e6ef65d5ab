"""The real kernels on a GPU, through the C interface, against float64 loops."""

from __future__ import annotations

import numpy as np
import pytest
from attention_helpers import attention_inputs, check_attention
from kernel_helpers import (
    ACTIVATIONS,
    MARGIN,
    SPLIT_TOLERANCE,
    KernelLibrary,
    assert_norm_state,
    check_complex_ema,
    check_complex_ema_backward,
    check_shorter_rows,
    check_timestep_norm,
    check_timestep_norm_backward,
    complex_ema_inputs,
    run_in_parts,
    six_rows,
    timestep_norm_inputs,
)
from norm_ema_helpers import check_norm_ema, norm_ema_inputs

pytestmark = pytest.mark.gpu

CEMA_SIZES = [
    *[(3, T, 70, N) for T, N in ((1, 16), (2, 4), (63, 8), (64, 3), (65, 32), (257, 16), (33, 40), (9, 256))],
    (2, 1, 1024, 16),
    (1, 2048, 1024, 16),
]
NORM_SIZES = [
    *[(3, T, 66, 6) for T in (1, 2, 16, 17, 63, 64, 65, 257, 600)],
    (2, 300, 1024, 1),
    (2, 1, 4096, 64),
    (1, 2048, 1024, 32),
]


@pytest.mark.parametrize("dtype", ACTIVATIONS)
@pytest.mark.parametrize("sizes", CEMA_SIZES, ids=str)
def test_complex_ema_on_gpu(kernels: KernelLibrary, sizes: tuple[int, ...], dtype: str) -> None:
    B, T, D, N = sizes
    check_complex_ema(kernels.complex_ema, dtype, complex_ema_inputs(B=B, T=T, D=D, N=N))


@pytest.mark.parametrize("dtype", ACTIVATIONS)
@pytest.mark.parametrize("sizes", NORM_SIZES, ids=str)
def test_timestep_norm_on_gpu(kernels: KernelLibrary, sizes: tuple[int, ...], dtype: str) -> None:
    B, T, D, G = sizes
    check_timestep_norm(kernels.timestep_norm, dtype, timestep_norm_inputs(B=B, T=T, D=D, G=G))


@pytest.mark.parametrize("T", [4, 16, 70, 300, 1100])
def test_rows_may_be_shorter_than_the_call_on_gpu(kernels: KernelLibrary, T: int) -> None:
    """Of 1,100 tokens, rows are cut into segments as well."""
    check_shorter_rows(kernels.complex_ema, six_rows(complex_ema_inputs(B=4, T=T, D=5, N=4)))
    check_shorter_rows(kernels.timestep_norm, six_rows(timestep_norm_inputs(B=4, T=T, D=6, G=2)))


@pytest.mark.parametrize("dtype", ACTIVATIONS)
@pytest.mark.parametrize("T", [1, 70])
def test_tensors_need_not_start_on_16_bytes_on_gpu(kernels: KernelLibrary, dtype: str, T: int) -> None:
    """An access to an address that is not a multiple of its size is an error of the device."""
    kernels = KernelLibrary(kernels.path, kernels.memory, margin=MARGIN + 1)
    cema, norm = complex_ema_inputs(B=2, T=T, D=40, N=16), timestep_norm_inputs(B=2, T=T, D=64, G=2)
    check_complex_ema(kernels.complex_ema, dtype, cema)
    check_timestep_norm(kernels.timestep_norm, dtype, norm)
    check_norm_ema(kernels, dtype, norm_ema_inputs(B=2, T=T, D=64, G=2, N=16))
    check_complex_ema_backward(kernels, dtype, cema)
    check_timestep_norm_backward(kernels, dtype, norm)
    for past in (dtype, "int8"):
        check_attention(
            kernels, attention_inputs(T=T, S=20, dz=16, dv=32, filled=[20, 7], dtype=dtype, past=past), dtype
        )


@pytest.mark.parametrize("dtype", ACTIVATIONS)
@pytest.mark.parametrize("sizes", CEMA_SIZES, ids=str)
def test_complex_ema_gradients_on_gpu(kernels: KernelLibrary, sizes: tuple[int, ...], dtype: str) -> None:
    B, T, D, N = sizes
    check_complex_ema_backward(kernels, dtype, complex_ema_inputs(B=B, T=T, D=D, N=N))


@pytest.mark.parametrize("dtype", ACTIVATIONS)
@pytest.mark.parametrize("sizes", NORM_SIZES, ids=str)
def test_timestep_norm_gradients_on_gpu(kernels: KernelLibrary, sizes: tuple[int, ...], dtype: str) -> None:
    B, T, D, G = sizes
    check_timestep_norm_backward(kernels, dtype, timestep_norm_inputs(B=B, T=T, D=D, G=G))


def test_the_same_gradients_have_the_same_bits(kernels: KernelLibrary) -> None:
    inputs = complex_ema_inputs(B=3, T=257, D=70, N=16)
    grads = [np.nan_to_num(tensor) for tensor in inputs[:2]]
    first, second = (kernels.complex_ema_backward("float32", inputs, grads) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("lengths", [[1] * 65, [1, 40, 24]], ids=lambda lengths: str(len(lengths)))
def test_any_split_gives_the_same_on_gpu(kernels: KernelLibrary, lengths: list[int]) -> None:
    cema, norm = complex_ema_inputs(B=3, T=65, D=70, N=16), timestep_norm_inputs(B=3, T=65, D=66, G=6)
    for run, inputs in ((kernels.complex_ema, cema), (kernels.timestep_norm, norm)):
        whole, parts = run("float32", inputs), run_in_parts(run, "float32", inputs, lengths)
        np.testing.assert_allclose(parts[0], whole[0], rtol=0, atol=3e-6, equal_nan=False)
        if run == kernels.timestep_norm:
            assert_norm_state(parts[1], whole[1], SPLIT_TOLERANCE)
        else:
            np.testing.assert_allclose(parts[1], whole[1], rtol=0, atol=3e-6, equal_nan=False)
