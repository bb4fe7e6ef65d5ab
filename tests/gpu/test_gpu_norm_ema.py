"""TimestepNorm and ComplexEMA in one kernel on a GPU, against float64 loops and the two operators."""

from __future__ import annotations

import pytest
from kernel_helpers import ACTIVATIONS, KernelLibrary
from norm_ema_helpers import check_norm_ema, norm_ema_inputs, run_apart, run_norm_ema

pytestmark = pytest.mark.gpu

SIZES = [(24, 3, 16), (66, 6, 4), (70, 1, 8), (96, 2, 32), (20, 4, 256), (1024, 32, 16), (4096, 64, 16)]


@pytest.mark.parametrize("dtype", ACTIVATIONS)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("num_tokens", [1, 17])
def test_matches_float64_on_gpu(kernels: KernelLibrary, sizes: tuple[int, ...], num_tokens: int, dtype: str) -> None:
    D, G, N = sizes
    check_norm_ema(kernels, dtype, norm_ema_inputs(B=3, T=num_tokens, D=D, G=G, N=N))


def test_the_bits_are_those_of_the_two_operators_on_gpu(kernels: KernelLibrary) -> None:
    call = norm_ema_inputs(B=3, T=1, D=1024, G=32, N=16)
    for found, expected in zip(
        run_norm_ema(kernels, "float16", call), run_apart(kernels, "float16", call), strict=True
    ):
        assert found.tobytes() == expected.tobytes()
