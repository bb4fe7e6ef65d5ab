"""The tensors that enter and leave one call of a model: the one table that every part reads.

Letters as in `MegalodonConfig`, and: B rows (streams), T tokens of this call, S rows of key/value memory that the
caller holds (0 <= S <= C), K logits positions. A call never crosses a chunk edge: (position mod C) + T <= C in every
row. Key/value memory holds the open chunk; the call returns the new rows only and its caller writes them at
position mod C. A row at position 0 starts a fresh stream, whatever lies in its past tensors.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from megalodon_deploy.config import MegalodonConfig

TOKENS = "tokens"  # [B, T] int64
POSITION = "position"  # [B] int64, tokens that the row has consumed before this call
LOGITS = "logits"  # [B, K, V] float32

COMPLEX_PARTS = 2  # last axis of a CEMA state: (re, im)
RE, IM = range(COMPLEX_PARTS)
NORM_PARTS = 4  # last axis of a norm state: (mean hi, mean lo, var hi, var lo)
MEAN_HI, MEAN_LO, VAR_HI, VAR_LO = range(NORM_PARTS)

OPERATOR_DOMAIN = "megalodon"  # of the ONNX operators, which are also the plugins
OPERATOR_VERSION = 1
COMPLEX_EMA = "ComplexEMA"
TIMESTEP_NORM = "TimestepNorm"
CHUNK_ATTENTION = "ChunkAttention"
QUANTIZED_MATMUL = "QuantizedMatMul"  # in graphs for the CPU alone
TIMESTEP_NORM_COMPLEX_EMA = "TimestepNormComplexEMA"  # a plugin alone: the two operators where one reads the other
EPSILON = "epsilon"  # TimestepNorm's attribute
DEFAULT_EPSILON = 1e-5
CHUNK_SIZE = "chunk_size"  # ChunkAttention's attribute, C
BLOCK_SIZE = "block_size"  # QuantizedMatMul's attribute, 0 where scales are those of whole columns

Kind = Literal["key", "value", "key_scale", "value_scale", "cema", "norm"]
Dtype = Literal["activation", "float32", "fp8", "int8"]  # fp8: e4m3 without infinities
Dim = int | str

QUANTIZED_ROW_MAX: dict[str, float] = {"fp8": 448.0, "int8": 127.0}  # a row's scale is its largest magnitude over this
SMALLEST_ROW_SCALE = 1e-30  # of a row of zeros: a scale is divided by
ITEM_BYTES = {"float32": 4, "fp8": 1, "int8": 1}


@dataclass(frozen=True)
class StateSpec:
    """One recurrent tensor: its names, shapes and type going in and coming out.

    `is_rows`: the call returns the rows of its own tokens only, which its caller writes at position mod C along
    `ROW_AXIS`; otherwise it returns the whole tensor anew.
    """

    kind: Kind
    past: str  # input name
    present: str  # output name
    past_shape: tuple[Dim, ...]
    present_shape: tuple[Dim, ...]
    dtype: Dtype
    is_rows: bool

    @property
    def is_activation(self) -> bool:
        """Whether it has the model's activation type."""
        return self.dtype == "activation"

    def numpy_dtype(self, activation: np.dtype) -> np.dtype:
        """The type of its elements in memory."""
        if self.dtype == "fp8":
            import ml_dtypes

            fp8: np.dtype = np.dtype(ml_dtypes.float8_e4m3fn)
            return fp8
        return activation if self.is_activation else np.dtype(self.dtype)


ROW_AXIS = 2  # of the tensors with `is_rows`: [B, H, rows, ...]


def _rows(kind: Kind, layer: int, dtype: Dtype, heads: int, *width: int) -> StateSpec:
    past: tuple[Dim, ...] = ("B", heads, "S", *width)
    new: tuple[Dim, ...] = ("B", heads, "T", *width)
    return StateSpec(kind, f"past_{kind}.{layer}", f"new_{kind}.{layer}", past, new, dtype, True)


def _recurrent(kind: Kind, suffix: int | str, *dims: int) -> StateSpec:
    shape: tuple[Dim, ...] = ("B", *dims)
    return StateSpec(kind, f"past_{kind}.{suffix}", f"present_{kind}.{suffix}", shape, shape, "float32", False)


def state_specs(config: MegalodonConfig) -> Iterator[StateSpec]:
    """All state tensors in the graph's order: key, value, CEMA, norm of each layer, then the final norm.

    Quantised keys and values (`config.kv_dtype`) are followed by their scales, one for each row of each head.
    """
    heads = config.num_heads
    for layer in range(config.num_layers):
        yield _rows("key", layer, config.kv_dtype, heads, config.key_head_dim)
        yield _rows("value", layer, config.kv_dtype, heads, config.value_head_dim)
        if config.kv_dtype != "activation":
            yield _rows("key_scale", layer, "float32", heads)
            yield _rows("value_scale", layer, "float32", heads)
        yield _recurrent("cema", layer, config.model_dim, config.cema_ndim, COMPLEX_PARTS)
        yield _recurrent("norm", layer, config.norm_num_groups, NORM_PARTS)
    yield _recurrent("norm", "final", config.norm_num_groups, NORM_PARTS)


def concrete_shape(shape: tuple[Dim, ...], *, batch: int, tokens: int = 0, capacity: int = 0) -> tuple[int, ...]:
    """Replace the letters B, T and S by numbers."""
    sizes = {"B": batch, "T": tokens, "S": capacity}
    return tuple(sizes[dim] if isinstance(dim, str) else dim for dim in shape)


def zero_state(config: MegalodonConfig, *, batch: int, capacity: int, activation: np.dtype) -> dict[str, np.ndarray]:
    """Past tensors by input name, zero-filled; `capacity` is S."""
    return {
        spec.past: np.zeros(
            concrete_shape(spec.past_shape, batch=batch, capacity=capacity),
            spec.numpy_dtype(activation),
        )
        for spec in state_specs(config)
    }


def state_bytes(config: MegalodonConfig, *, activation_bytes: int, capacity: int | None = None) -> int:
    """Bytes of one stream's state with `capacity` key/value rows (default: a full chunk)."""
    rows = config.chunk_size if capacity is None else capacity
    return sum(
        int(np.prod(concrete_shape(spec.past_shape, batch=1, capacity=rows)))
        * (activation_bytes if spec.is_activation else ITEM_BYTES[spec.dtype])
        for spec in state_specs(config)
    )


def call_lengths(position: int, num_tokens: int, chunk_size: int) -> Iterator[int]:
    """Lengths of the calls that feed `num_tokens` from `position` on without crossing a chunk edge."""
    while num_tokens > 0:
        length = min(num_tokens, chunk_size - position % chunk_size)
        yield length
        position += length
        num_tokens -= length


def split_float64(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A float64 array as two float32 arrays (hi, lo) with hi + lo = values to about 2^-48."""
    hi = values.astype(np.float32)
    return hi, (values - hi.astype(np.float64)).astype(np.float32)


def pack_norm(mean: np.ndarray, var: np.ndarray) -> np.ndarray:
    """float64 mean and variance [..., G] -> norm state [..., G, 4] float32."""
    return np.stack([*split_float64(mean), *split_float64(var)], axis=-1)


def unpack_norm(state: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Norm state [..., G, 4] -> float64 mean and variance [..., G]."""
    parts = state.astype(np.float64)
    return parts[..., 0] + parts[..., 1], parts[..., 2] + parts[..., 3]
