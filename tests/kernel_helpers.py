"""Drive libmegalodon's C interface from numpy, on host memory (emulated kernels) or on a GPU, and check its results.

Every tensor is handed over with margins of NaN on both sides and outputs are filled with NaN: a read outside shows in
the results, a write outside in the margins, and an element that is never written fails the comparison.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np
from helpers import assert_close
from model.reference import complex_ema_reference, timestep_norm_reference

from megalodon_deploy.state import COMPLEX_PARTS, NORM_PARTS, pack_norm

Array = np.ndarray

ACTIVATIONS = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
DTYPE_NUMBERS = {"float32": 0, "float16": 1, "bfloat16": 2}  # enum mgd_dtype
# Largest error over the scale of the expected values. Activations are rounded once; states are always float32.
Y_TOLERANCES = {"float32": 3e-6, "float16": 6e-4, "bfloat16": 5e-3}
STATE_TOLERANCE = 3e-6
NORM_STATE_TOLERANCE = 3e-7
EPSILON = 1e-5
MARGIN = int(os.environ.get("MEGALODON_TEST_MARGIN", "1024"))  # elements; 0 under AddressSanitizer, which has its own


class Memory(Protocol):
    """Where tensors live: the host, or a GPU."""

    def upload(self, padded: Array) -> Any: ...
    def address(self, buffer: Any) -> int: ...
    def download(self, buffer: Any) -> Array: ...
    def stream(self) -> int | None: ...


class HostMemory:
    """For the emulated library."""

    def upload(self, padded: Array) -> Array:
        return padded.copy()

    def address(self, buffer: Array) -> int:
        return buffer.ctypes.data

    def download(self, buffer: Array) -> Array:
        return buffer

    def stream(self) -> None:
        return None


class Tensor:
    """An array in `memory` between two margins."""

    def __init__(self, memory: Memory, values: Array) -> None:
        self.memory, self.shape, self.dtype = memory, values.shape, values.dtype
        margin = np.full(MARGIN, _poison(values.dtype), values.dtype)
        self.padded = np.concatenate([margin, np.ascontiguousarray(values).reshape(-1), margin])
        self.buffer = memory.upload(self.padded)

    @property
    def pointer(self) -> ctypes.c_void_p:
        return ctypes.c_void_p(self.memory.address(self.buffer) + MARGIN * self.dtype.itemsize)

    def read(self) -> Array:
        """The values; fails when a margin has changed."""
        found = self.memory.download(self.buffer)
        end = found.size - MARGIN
        for part in (slice(None, MARGIN), slice(end, None)):
            assert found[part].tobytes() == self.padded[part].tobytes(), "written outside the tensor"
        return found[MARGIN:end].reshape(self.shape)

    def is_unchanged(self) -> bool:
        return self.memory.download(self.buffer).tobytes() == self.padded.tobytes()


def _poison(dtype: np.dtype) -> Any:
    return np.iinfo(dtype).min if np.issubdtype(dtype, np.integer) else np.nan


class KernelLibrary:
    """The two operators of one library file."""

    def __init__(self, path: Path, memory: Memory) -> None:
        self.library = ctypes.CDLL(str(path))
        self.library.mgd_status_string.restype = ctypes.c_char_p
        self.library.mgd_timestep_norm_workspace_bytes.restype = ctypes.c_size_t
        self.memory = memory

    def status_string(self, status: int) -> str:
        text: bytes = self.library.mgd_status_string(status)
        return text.decode()

    def workspace_bytes(self, *, B: int, T: int, G: int) -> int:
        return int(self.library.mgd_timestep_norm_workspace_bytes(*map(ctypes.c_int64, (B, T, G))))

    def complex_ema(self, dtype: str, inputs: Sequence[Array]) -> tuple[Array, Array]:
        """`inputs` in the operator's order, with q instead of its powers; x is converted to `dtype`."""
        x, past = inputs[0].astype(ACTIVATIONS[dtype]), inputs[1]
        (B, T, D), N = x.shape, past.shape[2]
        return self._call(self.library.mgd_complex_ema, dtype, (B, T, D, N), [x, *inputs[1:]], [])

    def timestep_norm(self, dtype: str, inputs: Sequence[Array]) -> tuple[Array, Array]:
        """`inputs` in the operator's order; x is converted to `dtype`."""
        x, past = inputs[0].astype(ACTIVATIONS[dtype]), inputs[1]
        (B, T, D), G = x.shape, past.shape[1]
        num_bytes = self.workspace_bytes(B=B, T=T, G=G)
        workspace = Tensor(self.memory, np.full(num_bytes // 4, np.nan, np.float32))
        extra = [workspace.pointer, ctypes.c_size_t(num_bytes)]
        results = self._call(self.library.mgd_timestep_norm, dtype, (B, T, D, G), [x, *inputs[1:]], extra)
        workspace.read()
        return results

    def _call(
        self, function: Any, dtype: str, sizes: Sequence[int], inputs: Sequence[Array], extra: Sequence[Any]
    ) -> tuple[Array, Array]:
        given = [Tensor(self.memory, array) for array in inputs]
        y, present = (Tensor(self.memory, np.full(like.shape, np.nan, like.dtype)) for like in inputs[:2])
        attributes = [ctypes.c_float(EPSILON)] if extra else []
        status = function(
            DTYPE_NUMBERS[dtype],
            *map(ctypes.c_int64, sizes),
            *(tensor.pointer for tensor in given),
            *attributes,
            y.pointer,
            present.pointer,
            *extra,
            ctypes.c_void_p(self.memory.stream()),
        )
        assert status == 0, self.status_string(status)
        results = y.read(), present.read()
        assert all(tensor.is_unchanged() for tensor in given), "an input was written"
        return results


Operator = Callable[[str, Sequence[Array]], tuple[Array, Array]]

POSITIONS = np.array([0, 7, 1_000_003, 1])  # of the rows of a batch, from the first on


def complex_ema_inputs(*, B: int, T: int, D: int, N: int, seed: int = 0) -> list[Array]:
    """(x, past, position, p, q, gamma, omega) float32; row 0 is fresh and its past is NaN; |q| from 0.1 to 0.999."""
    random = np.random.default_rng([seed, B, T, D, N])
    q = (1 - np.geomspace(1e-3, 0.9, D * N).reshape(D, N)) * np.exp(2j * np.pi * random.random((D, N)))
    past = random.standard_normal((B, D, N, COMPLEX_PARTS))
    past[0] = np.nan
    gamma = random.standard_normal((D, N, 2)) / np.sqrt(N)
    arrays = [
        random.standard_normal((B, T, D)),
        past,
        random.random((D, N)),
        np.stack([q.real, q.imag], -1),
        gamma,
        random.standard_normal(D),
    ]
    x, past, *coefficients = (array.astype(np.float32) for array in arrays)
    return [x, past, POSITIONS[:B], *coefficients]


def timestep_norm_inputs(*, B: int, T: int, D: int, G: int, seed: int = 0) -> list[Array]:
    """(x, past, position, weight, bias); row 0 is fresh and its past is NaN; the mean drifts around 3."""
    random = np.random.default_rng([seed, B, T, D, G])
    drift = 3 + 2 * np.sin(np.arange(T) / 40)[:, None]
    past = pack_norm(3 + random.random((B, G)), 0.5 + random.random((B, G)))
    past[0] = np.nan
    x, weight, bias = drift + random.standard_normal((B, T, D)), 1 + random.random(D), random.standard_normal(D)
    return [x.astype(np.float32), past, POSITIONS[:B], weight.astype(np.float32), bias.astype(np.float32)]


def check_complex_ema(run: Operator, dtype: str, inputs: Sequence[Array]) -> None:
    y, present = run(dtype, inputs)
    rounded = inputs[0].astype(ACTIVATIONS[dtype])
    expected_y, expected_present = complex_ema_reference(rounded, *inputs[1:])
    assert_close(y.astype(np.float64), expected_y, Y_TOLERANCES[dtype], "y")
    assert_close(present, expected_present, STATE_TOLERANCE, "present_cema")


def check_timestep_norm(run: Operator, dtype: str, inputs: Sequence[Array]) -> None:
    y, present = run(dtype, inputs)
    rounded = inputs[0].astype(ACTIVATIONS[dtype])
    expected_y, expected_present = timestep_norm_reference(rounded, *inputs[1:], EPSILON)
    assert_close(y.astype(np.float64), expected_y, Y_TOLERANCES[dtype], "y")
    assert_norm_state(present, expected_present, NORM_STATE_TOLERANCE)


def assert_norm_state(actual: Array, expected: Array, tolerance: float) -> None:
    """Compare the float64 numbers that two norm states [..., G, 4] stand for."""
    assert actual.shape[-1] == NORM_PARTS
    pairs = (state.astype(np.float64).reshape(*state.shape[:-1], 2, 2).sum(-1) for state in (actual, expected))
    assert_close(*pairs, tolerance, "present_norm")


def run_in_parts(run: Operator, dtype: str, inputs: Sequence[Array], lengths: Sequence[int]) -> tuple[Array, Array]:
    """The same tokens in several calls, the state of one given to the next."""
    x, state, position, *coefficients = inputs
    assert sum(lengths) == x.shape[1]
    outputs, first = [], 0
    for length in lengths:
        call = [x[:, first : first + length], state, position + first, *coefficients]
        y, state = run(dtype, call)
        outputs.append(y)
        first += length
    return np.concatenate(outputs, 1), state
