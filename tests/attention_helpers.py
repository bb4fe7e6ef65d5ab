"""Inputs for ChunkAttention and append_rows of libmegalodon, and float64 loops to compare with."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, replace

import ml_dtypes
import numpy as np
from helpers import assert_close
from kernel_helpers import ACTIVATIONS, DTYPE_NUMBERS, Array, KernelLibrary, Tensor

PAST_TYPES = ACTIVATIONS | {"float8_e4m3": ml_dtypes.float8_e4m3fn, "int8": np.int8}
PAST_NUMBERS = DTYPE_NUMBERS | {"float8_e4m3": 3, "int8": 4}  # enum mgd_dtype
LARGEST = {"float8_e4m3": 448.0, "int8": 127.0}
# Largest error over the scale of the expected values: one rounding to the activation type, all else in float32.
TOLERANCES = {"float32": 3e-6, "float16": 6e-4, "bfloat16": 5e-3}


@dataclass(frozen=True)
class Attention:
    """The operator's inputs; the first three [B, H, T, width] and the next two [B, H, S, width] in their own types."""

    q: Array
    k: Array
    v: Array
    past_key: Array
    past_value: Array
    position: Array  # [B]
    past_key_scale: Array | None  # [B, H, S]
    past_value_scale: Array | None
    chunk_size: int

    @property
    def filled(self) -> Array:
        return self.position % self.chunk_size

    def tokens(self, first: int, last: int) -> Attention:
        """A later call whose memory holds the tokens before `first`, for memory of the activations' type."""
        grown = replace(self, position=self.position + first)
        for new, past in ((self.k, grown.past_key), (self.v, grown.past_value)):
            for b, row in enumerate(self.filled):
                past[b, :, row : row + first] = new[b, :, :first]
        parts = {name: np.ascontiguousarray(getattr(self, name)[:, :, first:last]) for name in "qkv"}
        return replace(grown, **parts)


def attention_inputs(
    *,
    T: int,
    S: int,
    dz: int,
    dv: int,
    filled: Sequence[int],
    H: int = 2,
    dtype: str = "float32",
    past: str | None = None,
    seed: int = 0,
) -> Attention:
    """A row of the batch for each of `filled`, its number of rows in memory; rows that no token may see are NaN."""
    past = past or dtype
    B, C = len(filled), max(filled) + T
    random = np.random.default_rng([seed, B, H, T, S, dz, dv])

    def rounded(*shape: int) -> Array:
        return random.standard_normal(shape).astype(np.float32).astype(ACTIVATIONS[dtype])

    key, key_scale = _stored(random.standard_normal((B, H, S, dz)), past)
    value, value_scale = _stored(random.standard_normal((B, H, S, dv)), past)
    for b, count in enumerate(filled):
        for array in (key, value, key_scale, value_scale):
            if array is not None:
                array[b, :, count:] = np.nan if array.dtype != np.int8 else -128
    position = np.array([count + (7 * b) * C for b, count in enumerate(filled)])
    q, k, v = rounded(B, H, T, dz) / np.sqrt(dz).astype(ACTIVATIONS[dtype]), rounded(B, H, T, dz), rounded(B, H, T, dv)
    return Attention(q, k, v, key, value, position, key_scale, value_scale, C)


def _stored(rows: Array, past: str) -> tuple[Array, Array | None]:
    """Rows as memory keeps them: quantised with one scale for each where the type asks for it."""
    if past not in LARGEST:
        return rows.astype(np.float32).astype(PAST_TYPES[past]), None
    scale = (np.abs(rows).max(-1) / LARGEST[past]).astype(np.float32)
    scaled = rows / scale[..., None]
    stored = np.rint(scaled).astype(np.int8) if past == "int8" else scaled.astype(np.float32).astype(PAST_TYPES[past])
    return stored, scale


def attention_reference(call: Attention) -> Array:
    """out [B, H, T, dv], float64, a query at a time."""
    B, H, T, _ = call.q.shape
    out = np.empty((B, H, T, call.v.shape[3]))
    for b, h, t in np.ndindex(B, H, T):
        keys, values = (
            np.concatenate([_wide(past, scale, b, h, int(call.filled[b])), new[b, h, : t + 1].astype(np.float64)])
            for past, scale, new in (
                (call.past_key, call.past_key_scale, call.k),
                (call.past_value, call.past_value_scale, call.v),
            )
        )
        scores = keys @ call.q[b, h, t].astype(np.float64)
        weights = np.exp(scores - scores.max())
        out[b, h, t] = weights @ values / weights.sum()
    return out


def _wide(past: Array, scale: Array | None, b: int, h: int, count: int) -> Array:
    rows = past[b, h, :count].astype(np.float64)
    return rows if scale is None else rows * scale[b, h, :count, None].astype(np.float64)


def run_attention(kernels: KernelLibrary, call: Attention, *, workspace_value: float = np.nan) -> Array:
    """The operator's output; fails when an input or a margin was written."""
    dtype, past = (_number(array.dtype) for array in (call.q, call.past_key))
    (B, H, T, dz), dv, S = call.q.shape, call.v.shape[3], call.past_key.shape[2]
    sizes = [ctypes.c_int64(size) for size in (B, H, T, S, dz, dv)]
    names = ("q", "k", "v", "past_key", "past_value", "position", "past_key_scale", "past_value_scale")
    given = [None if getattr(call, name) is None else kernels.tensor(getattr(call, name)) for name in names]
    out = kernels.tensor(np.full(call.v.shape, np.nan, call.v.dtype))
    num_bytes = workspace_bytes(kernels, B=B, H=H, S=S, dv=dv)
    workspace = Tensor(kernels.memory, np.full(num_bytes // 4, workspace_value, np.float32))
    status = kernels.library.mgd_chunk_attention(
        dtype,
        past,
        *sizes,
        *(None if tensor is None else tensor.pointer for tensor in given),
        ctypes.c_int64(call.chunk_size),
        out.pointer,
        workspace.pointer,
        ctypes.c_size_t(num_bytes),
        ctypes.c_void_p(kernels.memory.stream()),
    )
    assert status == 0, kernels.status_string(status)
    workspace.read()
    result = out.read()
    assert all(tensor is None or tensor.is_unchanged() for tensor in given), "an input was written"
    return result


def _number(dtype: np.dtype) -> int:
    return next(PAST_NUMBERS[name] for name, known in PAST_TYPES.items() if np.dtype(known) == dtype)


def workspace_bytes(kernels: KernelLibrary, *, B: int, H: int, S: int, dv: int) -> int:
    function = kernels.library.mgd_chunk_attention_workspace_bytes
    function.restype = ctypes.c_size_t
    return int(function(*map(ctypes.c_int64, (B, H, S, dv))))


def check_attention(kernels: KernelLibrary, call: Attention, dtype: str) -> None:
    found = run_attention(kernels, call).astype(np.float64)
    assert_close(found, attention_reference(call), TOLERANCES[dtype], "out")


def check_quantised_memory(
    kernels: KernelLibrary, *, num_tokens: int, num_rows: int, width: int, dtype: str, past: str
) -> None:
    """Of rows whose memory is full, empty and in between."""
    filled = [num_rows, 0, 19]
    call = attention_inputs(T=num_tokens, S=num_rows, dz=width, dv=width + 16, filled=filled, dtype=dtype, past=past)
    check_attention(kernels, call, dtype)


def check_splits(kernels: KernelLibrary, lengths: Sequence[int]) -> None:
    """40 tokens in calls of these lengths."""
    whole = attention_inputs(T=40, S=60, dz=8, dv=12, filled=[0, 20, 7])
    expected, first = attention_reference(whole), 0
    for length in lengths:
        found = run_attention(kernels, whole.tokens(first, first + length))
        assert_close(found, expected[:, :, first : first + length], 3e-6, f"tokens from {first}")
        first += length


class AppendEntry(ctypes.Structure):
    """struct mgd_append."""

    _fields_ = [
        ("rows", ctypes.c_void_p),
        ("memory", ctypes.c_void_p),
        ("heads", ctypes.c_int64),
        ("row_bytes", ctypes.c_int64),
    ]


@dataclass(frozen=True)
class Append:
    """New rows [B, heads, T, ...] for each memory [B, heads, S, ...]."""

    rows: list[Array]
    memories: list[Array]
    position: Array
    chunk_size: int

    def expected(self) -> list[Array]:
        """The memories afterwards."""
        results = []
        for new, memory in zip(self.rows, self.memories, strict=True):
            result = memory.copy()
            for b, first in enumerate(self.position % self.chunk_size):
                kept = max(0, min(new.shape[2], memory.shape[2] - first))
                result[b, :, first : first + kept] = new[b, :, :kept]
            results.append(result)
        return results


def append_inputs(
    shapes: Sequence[tuple[int, int, type]], *, T: int, S: int, filled: Sequence[int], C: int = 1000
) -> Append:
    """`shapes`: (heads, width, element type) of each tensor; the bytes are random."""
    random, B = np.random.default_rng([len(shapes), T, S]), len(filled)

    def tensor(heads: int, length: int, width: int, element: type) -> Array:
        size = B * heads * length * width * np.dtype(element).itemsize
        values: Array = random.integers(0, 256, size, np.uint8).view(element).reshape(B, heads, length, width)
        return values

    rows = [tensor(heads, T, width, element) for heads, width, element in shapes]
    memories = [tensor(heads, S, width, element) for heads, width, element in shapes]
    return Append(rows, memories, np.array([count + b * C for b, count in enumerate(filled)]), C)


def run_append(kernels: KernelLibrary, call: Append, *, shift: int = 0) -> list[Array]:
    """The memories afterwards; with `shift` every tensor begins that many elements after a 16-byte boundary."""
    position = Tensor(kernels.memory, call.position)
    rows = [Tensor(kernels.memory, _shifted(new, shift)) for new in call.rows]
    memories = [Tensor(kernels.memory, _shifted(memory, shift)) for memory in call.memories]
    table = (AppendEntry * len(rows))()
    for entry, new, memory, like in zip(table, rows, memories, call.rows, strict=True):
        offset = shift * like.itemsize
        row_bytes = like.shape[3] * like.itemsize
        entry.rows, entry.memory = (tensor.pointer.value + offset for tensor in (new, memory))
        entry.heads, entry.row_bytes = like.shape[1], row_bytes
    (B, _, T, _), S = call.rows[0].shape, call.memories[0].shape[2]
    sizes = [ctypes.c_int64(size) for size in (len(rows), B, T, S, call.chunk_size)]
    status = kernels.library.mgd_append_rows(table, *sizes, position.pointer, ctypes.c_void_p(kernels.memory.stream()))
    assert status == 0, kernels.status_string(status)
    results = [tensor.read().reshape(-1)[shift:] for tensor in memories]
    assert all(tensor.is_unchanged() for tensor in (position, *rows)), "an input was written"
    return [result.reshape(memory.shape) for result, memory in zip(results, call.memories, strict=True)]


def _shifted(array: Array, shift: int) -> Array:
    return np.concatenate([np.zeros(shift, array.dtype), array.reshape(-1)])


def check_append(kernels: KernelLibrary, call: Append, *, shift: int = 0) -> None:
    for index, (found, expected) in enumerate(
        zip(run_append(kernels, call, shift=shift), call.expected(), strict=True)
    ):
        assert found.tobytes() == expected.tobytes(), f"tensor {index}"
