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
from operator_gradients import complex_ema_loop, gradients_of, timestep_norm_loop

from megalodon_deploy.state import COMPLEX_PARTS, NORM_PARTS, pack_norm

Array = np.ndarray

ACTIVATIONS = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
DTYPE_NUMBERS = {"float32": 0, "float16": 1, "bfloat16": 2}  # enum mgd_dtype
# Largest error over the scale of the expected values. Activations are rounded once; states are always float32.
Y_TOLERANCES = {"float32": 3e-6, "float16": 6e-4, "bfloat16": 5e-3}
STATE_TOLERANCE = 3e-6
NORM_STATE_TOLERANCE = 3e-7
SPLIT_TOLERANCE = 1e-8  # of norm states: a token's own moments are float32 sums, in another order for few tokens
GRADIENT_TOLERANCE = 3e-6  # of states and coefficients, which are float32 sums over rows and tokens
EPSILON = 1e-5
ASCENDING, DESCENDING, RANDOM = 0, 1, 20240801  # orders in which the threads of a block run
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
    """An array in `memory` between two margins of `margin` elements."""

    def __init__(self, memory: Memory, values: Array, margin: int = MARGIN) -> None:
        self.memory, self.shape, self.dtype, self.margin = memory, values.shape, values.dtype, margin
        edge = np.full(margin, _poison(values.dtype), values.dtype)
        self.padded = np.concatenate([edge, np.ascontiguousarray(values).reshape(-1), edge])
        self.buffer = memory.upload(self.padded)

    @property
    def pointer(self) -> ctypes.c_void_p:
        return ctypes.c_void_p(self.memory.address(self.buffer) + self.margin * self.dtype.itemsize)

    def read(self) -> Array:
        """The values; fails when a margin has changed."""
        found = self.memory.download(self.buffer)
        end = found.size - self.margin
        for part in (slice(None, self.margin), slice(end, None)):
            assert found[part].tobytes() == self.padded[part].tobytes(), "written outside the tensor"
        return found[self.margin : end].reshape(self.shape)

    def is_unchanged(self) -> bool:
        return self.memory.download(self.buffer).tobytes() == self.padded.tobytes()


def _poison(dtype: np.dtype) -> Any:
    return np.iinfo(dtype).min if np.issubdtype(dtype, np.integer) else np.nan


class KernelLibrary:
    """The operators of one library file. Tensors start on 16 bytes with the default margin, else they do not."""

    def __init__(self, path: Path, memory: Memory, margin: int = MARGIN) -> None:
        self.path = path
        self.library = ctypes.CDLL(str(path))
        self.library.mgd_status_string.restype = ctypes.c_char_p
        self.memory = memory
        self.margin = margin

    def status_string(self, status: int) -> str:
        text: bytes = self.library.mgd_status_string(status)
        return text.decode()

    def workspace_bytes(self, operator: str, *sizes: int) -> int:
        """mgd_OPERATOR_workspace_bytes."""
        function = self.library[f"mgd_{operator}_workspace_bytes"]
        function.restype = ctypes.c_size_t
        return int(function(*map(ctypes.c_int64, sizes)))

    def complex_ema(
        self, dtype: str, inputs: Sequence[Array], lengths: Array | None = None, *, workspace_bytes: int | None = None
    ) -> tuple[Array, Array]:
        """`inputs` in the operator's order, with q instead of its powers; x is converted to `dtype`. `workspace_bytes`:
        in the place of those with which the call is fastest."""
        inputs = _converted(dtype, inputs)
        sizes = *inputs[0].shape, inputs[1].shape[2]
        num_bytes = self.workspace_bytes("complex_ema", *sizes) if workspace_bytes is None else workspace_bytes
        y, present = self.call("complex_ema", dtype, sizes, [*inputs, lengths], inputs[:2], num_bytes)
        return y, present

    def complex_ema_backward(self, dtype: str, inputs: Sequence[Array], grads: Sequence[Array]) -> list[Array]:
        """Gradients of x, past, p, q, gamma, omega from those of y and present."""
        inputs, grads = _converted(dtype, inputs), _converted(dtype, grads)
        sizes = *inputs[0].shape, inputs[1].shape[2]
        num_bytes = self.workspace_bytes("complex_ema_backward", *sizes)
        x, past, _, *coefficients = inputs
        outputs = [x, past, *coefficients]
        return self.call("complex_ema_backward", dtype, sizes, [*inputs, *grads], outputs, num_bytes)

    def timestep_norm(self, dtype: str, inputs: Sequence[Array], lengths: Array | None = None) -> tuple[Array, Array]:
        """`inputs` in the operator's order; x is converted to `dtype`."""
        inputs = _converted(dtype, inputs)
        (B, T, D), G = inputs[0].shape, inputs[1].shape[1]
        num_bytes = self.workspace_bytes("timestep_norm", B, T, G)
        arguments = [*inputs, EPSILON, lengths]
        y, present = self.call("timestep_norm", dtype, (B, T, D, G), arguments, inputs[:2], num_bytes)
        return y, present

    def timestep_norm_backward(self, dtype: str, inputs: Sequence[Array], grads: Sequence[Array]) -> list[Array]:
        """Gradients of x, past, weight, bias from those of y and present."""
        inputs, grads = _converted(dtype, inputs), _converted(dtype, grads)
        sizes = *inputs[0].shape, inputs[1].shape[1]
        num_bytes = self.workspace_bytes("timestep_norm_backward", *sizes)
        x, past, position, weight, bias = inputs
        arguments = [x, past, position, weight, EPSILON, *grads]
        return self.call("timestep_norm_backward", dtype, sizes, arguments, [x, past, weight, bias], num_bytes)

    def call(
        self,
        operator: str,
        dtype: str,
        sizes: Sequence[int],
        arguments: Sequence[Array | float | None],
        outputs: Sequence[Array],
        workspace_bytes: int,
    ) -> list[Array]:
        """Run mgd_OPERATOR; the results are like `outputs`, and NaN where nothing was written."""
        given = [self.tensor(argument) if isinstance(argument, np.ndarray) else argument for argument in arguments]
        results = [self.tensor(np.full(like.shape, np.nan, like.dtype)) for like in outputs]
        workspace = Tensor(self.memory, np.full(-(-workspace_bytes // 4), np.nan, np.float32))
        status = self.library[f"mgd_{operator}"](
            DTYPE_NUMBERS[dtype],
            *map(ctypes.c_int64, sizes),
            *map(_as_argument, given),
            *(tensor.pointer for tensor in results),
            workspace.pointer if workspace_bytes else None,
            ctypes.c_size_t(workspace_bytes),
            ctypes.c_void_p(self.memory.stream()),
        )
        assert status == 0, self.status_string(status)
        found = [tensor.read() for tensor in results]
        workspace.read()
        tensors = [argument for argument in given if isinstance(argument, Tensor)]
        assert all(tensor.is_unchanged() for tensor in tensors), "an input was written"
        return found

    def tensor(self, values: Array) -> Tensor:
        return Tensor(self.memory, values, self.margin)


def _converted(dtype: str, tensors: Sequence[Array]) -> list[Array]:
    """The first one, x or the gradient of y, has the activations' type."""
    return [tensors[0].astype(ACTIVATIONS[dtype]), *tensors[1:]]


def _as_argument(value: Tensor | float | None) -> Any:
    if isinstance(value, Tensor):
        return value.pointer
    return None if value is None else ctypes.c_float(value)


Operator = Callable[[str, Sequence[Array]], tuple[Array, Array]]
Backward = Callable[[str, Sequence[Array], Sequence[Array]], list[Array]]

POSITIONS = np.array([0, 7, 1_000_003, 1])  # of the rows of a batch, from the first on


def complex_ema_inputs(*, B: int, T: int, D: int, N: int, seed: int = 0) -> list[Array]:
    """(x, past, position, p, q, gamma, omega) float32; row 0 is fresh and its past is NaN; |q| from 0.1 to 0.999."""
    random = np.random.default_rng([seed, B, T, D, N])
    q = (1 - np.geomspace(1e-3, 0.9, D * N).reshape(D, N)) * np.exp(2j * np.pi * random.random((D, N)))
    past = random.standard_normal((B, D, N, COMPLEX_PARTS))
    past[:1] = np.nan
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
    past[:1] = np.nan
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


def check_shorter_rows(run: Callable[..., tuple[Array, Array]], inputs: Sequence[Array]) -> None:
    """`run(dtype, inputs, lengths)`: each row must be what it is alone with its own length, whatever lies behind."""
    x, past, position, *others = inputs
    B, T, _ = x.shape
    lengths = np.array([T, 0, 1, T - 1, T // 2, T // 3])[:B]
    for row, length in enumerate(lengths):
        x[row, length:] = np.nan
    given = lengths.copy()
    given[:2] += 9, -3  # count as T and 0
    y, present = run("float32", [x, past, position, *others], given)
    for row, length in enumerate(lengths):
        one = slice(row, row + 1)
        alone = run("float32", [x[one, :length], past[one], position[one], *others])
        assert_close(y[one, :length], alone[0], 3e-6, f"y of {length} tokens")
        assert not y[row, length:].any(), "tokens that do not count give 0"
        if present.shape[-1] == 4:
            assert_norm_state(present[one], alone[1], SPLIT_TOLERANCE)
        else:
            assert_close(present[one], alone[1], 3e-6, f"state after {length} tokens")


def six_rows(inputs: Sequence[Array]) -> list[Array]:
    """Of four rows, the first two twice."""
    return [np.concatenate([array, array[:2]]) if index < 3 else array for index, array in enumerate(inputs)]


def check_complex_ema_backward(kernels: KernelLibrary, dtype: str, inputs: Sequence[Array]) -> None:
    """Row 0's past is NaN, as everywhere here: its gradient is zero."""
    check_gradients(kernels.complex_ema_backward, complex_ema_loop, dtype, inputs)


def check_timestep_norm_backward(kernels: KernelLibrary, dtype: str, inputs: Sequence[Array]) -> None:
    check_gradients(kernels.timestep_norm_backward, timestep_norm_loop, dtype, inputs, EPSILON)


def check_gradients(run: Backward, loop: Callable[..., Any], dtype: str, inputs: Sequence[Array], *rest: float) -> None:
    """Against autograd through the recurrence in float64, on the same rounded inputs."""
    x, past, *others = inputs
    rounded = x.astype(ACTIVATIONS[dtype])
    random = np.random.default_rng(x.size)
    grad_y = random.standard_normal(x.shape).astype(ACTIVATIONS[dtype])
    grad_present = random.standard_normal(past.shape).astype(np.float32)
    expected = gradients_of(loop, [rounded.astype(np.float32), past, *others], [grad_y, grad_present], *rest)
    found = run(dtype, [rounded, past, *others], [grad_y, grad_present])
    assert len(found) == len(expected)
    assert_close(found[0].astype(np.float64), expected[0], Y_TOLERANCES[dtype], "gradient of x")
    for index in range(1, len(expected)):
        assert_close(found[index], expected[index], GRADIENT_TOLERANCE, f"gradient {index}")
