"""TimestepNorm and ComplexEMA in one call of libmegalodon: inputs, the call, and what it must be equal to."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from helpers import assert_close
from kernel_helpers import (
    ACTIVATIONS,
    DTYPE_NUMBERS,
    EPSILON,
    NORM_STATE_TOLERANCE,
    STATE_TOLERANCE,
    Y_TOLERANCES,
    Array,
    KernelLibrary,
    Tensor,
    assert_norm_state,
    complex_ema_inputs,
    timestep_norm_inputs,
)
from model.reference import complex_ema_reference, timestep_norm_reference


@dataclass(frozen=True)
class NormEma:
    """Inputs of the two operators: (x, past, position, weight, bias), and (past, p, q, gamma, omega) of the second."""

    norm: list[Array]
    ema: list[Array]


def norm_ema_inputs(*, B: int, T: int, D: int, G: int, N: int) -> NormEma:
    """Row 0 is fresh and its past is NaN."""
    _, past, _, *coefficients = complex_ema_inputs(B=B, T=T, D=D, N=N)
    return NormEma(timestep_norm_inputs(B=B, T=T, D=D, G=G), [past, *coefficients])


def run_norm_ema(kernels: KernelLibrary, dtype: str, call: NormEma) -> list[Array]:
    """u, present_norm, y, present_cema; fails when an input or a margin was written."""
    inputs = [call.norm[0].astype(ACTIVATIONS[dtype]), *call.norm[1:], *call.ema]
    (B, T, D), G, N = inputs[0].shape, inputs[1].shape[1], call.ema[0].shape[2]
    sizes = [ctypes.c_int64(size) for size in (B, T, D, G, N)]
    given = [kernels.tensor(array) for array in inputs]
    likes = (inputs[0], inputs[1], inputs[0], call.ema[0])
    outputs = [kernels.tensor(np.full(like.shape, np.nan, like.dtype)) for like in likes]
    query = kernels.library.mgd_timestep_norm_complex_ema_workspace_bytes
    query.restype = ctypes.c_size_t
    num_bytes = query(*sizes)
    workspace = Tensor(kernels.memory, np.full(num_bytes // 4, np.nan, np.float32))
    status = kernels.library.mgd_timestep_norm_complex_ema(
        DTYPE_NUMBERS[dtype],
        *sizes,
        *(tensor.pointer for tensor in given[:5]),
        ctypes.c_float(EPSILON),
        *(tensor.pointer for tensor in (*given[5:], *outputs, workspace)),
        ctypes.c_size_t(num_bytes),
        ctypes.c_void_p(kernels.memory.stream()),
    )
    assert status == 0, kernels.status_string(status)
    workspace.read()
    results = [tensor.read() for tensor in outputs]
    assert all(tensor.is_unchanged() for tensor in given), "an input was written"
    return results


def check_norm_ema(kernels: KernelLibrary, dtype: str, call: NormEma) -> None:
    """Against float64 loops; the second starts from what the first gave, rounded as it was."""
    u, present_norm, y, present_cema = run_norm_ema(kernels, dtype, call)
    x, past_norm, position, weight, bias = call.norm
    x = x.astype(ACTIVATIONS[dtype])
    expected_u, expected_norm = timestep_norm_reference(x, past_norm, position, weight, bias, EPSILON)
    assert_close(u.astype(np.float64), expected_u, Y_TOLERANCES[dtype], "u")
    assert_norm_state(present_norm, expected_norm, NORM_STATE_TOLERANCE)
    expected_y, expected_cema = complex_ema_reference(u, call.ema[0], position, *call.ema[1:])
    assert_close(y.astype(np.float64), expected_y, Y_TOLERANCES[dtype], "y")
    assert_close(present_cema, expected_cema, STATE_TOLERANCE, "present_cema")


def run_apart(kernels: KernelLibrary, dtype: str, call: NormEma) -> Sequence[Array]:
    """The same through the two operators."""
    u, present_norm = kernels.timestep_norm(dtype, call.norm)
    past, *coefficients = call.ema
    return u, present_norm, *kernels.complex_ema(dtype, [u, past, call.norm[2], *coefficients])
