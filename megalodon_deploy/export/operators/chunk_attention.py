"""`ChunkAttention`: attention to the rows of the open chunk, past and new, as an ONNX function.

    out_t = sum_j w_tj value_j,   w_t = softmax over j of q_t . key_j

Token t of a row sees the past rows below position mod C and the call's own up to t. Scores have no further factor; the
softmax is float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from megalodon_deploy.export.builder import GraphBuilder
from megalodon_deploy.export.operators.common import function_inputs, make_function
from megalodon_deploy.state import CHUNK_ATTENTION, CHUNK_SIZE

NAME = CHUNK_ATTENTION
FLOAT, INT64 = ir.DataType.FLOAT, ir.DataType.INT64
ALL_ROWS = "S + T"  # name of the axis over past and new rows


@dataclass(frozen=True)
class VisibleRows:
    """Which rows the tokens of a call see."""

    mask: ir.Value  # [B, 1, T, S + T] bool
    counts: ir.Value  # [2] int64: S, T


@dataclass(frozen=True)
class Operands:
    """Queries, and new and past rows of keys and values."""

    query: ir.Value  # [B, H, T, dz]
    key: ir.Value  # [B, H, T, dz]
    value: ir.Value  # [B, H, T, dv]
    past_key: ir.Value  # [B, H, S, dz]
    past_value: ir.Value  # [B, H, S, dv]


def chunk_attention_function(*, scaled: bool = False) -> ir.Function:
    """The function, for any activation type; `chunk_size` is its attribute. `scaled`: past rows come with scales."""
    builder = GraphBuilder()
    names = ["q", "k", "v", "past_key", "past_value", "position"]
    inputs = function_inputs(*names, *(["past_key_scale", "past_value_scale"] if scaled else []))
    operands, position_B = Operands(*inputs[:5]), inputs[5]
    if scaled:
        past = [
            _widen(builder, rows, scale, operands.query) for rows, scale in zip(inputs[3:5], inputs[6:], strict=True)
        ]
        operands = Operands(*inputs[:3], *past)
    reference = ir.RefAttr("value_int", CHUNK_SIZE, ir.AttributeType.INT)
    chunk_size = builder.op("Constant", name="chunk_size", value_int=reference)
    filled_B = builder.op("Mod", position_B, chunk_size, name="filled_rows")
    filled_B1 = builder.op("Unsqueeze", filled_B, builder.constant([1], "axis_1"))
    visible = _visible_rows(builder, filled_B1, operands)
    scores = builder.op("Cast", _scores(builder, operands), to=FLOAT, name="scores_float")
    weights = builder.op("CastLike", _softmax(builder, scores, visible), operands.query, name="weights_cast")
    outputs = {"out": _weighted_sum(builder, operands, weights, visible)}
    return make_function(builder, NAME, inputs, outputs, [ir.Attr(CHUNK_SIZE, ir.AttributeType.INT, None)])


def _widen(builder: GraphBuilder, rows: ir.Value, scale_BHS: ir.Value, like: ir.Value) -> ir.Value:
    """Quantised rows [B, H, S, width] times their scales, in the type of `like`."""
    scale_BHS1 = builder.op("Unsqueeze", scale_BHS, builder.constant([3], "axis_3"))
    unit = builder.scalar(1, np.float32, "unit_scale")  # TensorRT lets nothing else read codes
    wide = builder.op("Mul", builder.op("DequantizeLinear", rows, unit), scale_BHS1)
    return builder.op("CastLike", wide, like, name="past_rows")


def _visible_rows(builder: GraphBuilder, filled_B1: ir.Value, operands: Operands) -> VisibleRows:
    """Past rows below `filled_B1`, and new rows up to the token's own."""
    zero, one = builder.scalar(0, np.int64, "zero"), builder.scalar(1, np.int64, "one")
    batch = builder.op("Shape", operands.query, start=0, end=1, name="batch")
    num_tokens = builder.op("Shape", operands.query, start=2, end=3, name="num_tokens")
    capacity = builder.op("Shape", operands.past_key, start=2, end=3, name="capacity")
    ranges = []
    for length, axis in ((capacity, "S"), (num_tokens, "T")):
        values = builder.op("Range", zero, builder.op("Squeeze", length), one, name=f"rows_{axis}")
        ranges.append(builder.typed(values, INT64, [axis]))
    past_S, steps_T = ranges
    filled_B111 = builder.op("Unsqueeze", filled_B1, builder.constant([2, 3], "axes_2_3"))
    past_B11S = builder.op("Less", past_S, filled_B111, name="past_is_filled")
    one_row = builder.constant([1], "axis_1")
    causal_TT = builder.op("LessOrEqual", steps_T, builder.op("Unsqueeze", steps_T, one_row), name="is_causal")
    parts = []
    for part, width, name in ((past_B11S, capacity, "past_mask"), (causal_TT, num_tokens, "new_mask")):
        shape = builder.op("Concat", batch, one_row, num_tokens, width, axis=0)
        parts.append(builder.op("Expand", part, shape, name=name))
    mask = builder.op("Concat", *parts, axis=-1, name="mask")
    builder.typed(mask, ir.DataType.BOOL, ("B", 1, "T", ALL_ROWS))
    return VisibleRows(mask, builder.op("Concat", capacity, num_tokens, axis=0, name="row_counts"))


def _scores(builder: GraphBuilder, operands: Operands) -> ir.Value:
    """Queries times past and new keys, [B, H, T, S + T]."""
    scores = [
        builder.op("MatMul", operands.query, builder.op("Transpose", rows, perm=[0, 1, 3, 2]), name=name)
        for rows, name in ((operands.past_key, "past_scores"), (operands.key, "new_scores"))
    ]
    return builder.op("Concat", *scores, axis=-1, name="scores")


def _softmax(builder: GraphBuilder, scores: ir.Value, visible: VisibleRows) -> ir.Value:
    """Weights of the visible rows from float32 scores."""
    hidden = builder.scalar(-np.inf, np.float32, "minus_infinity")
    masked = builder.op("Where", visible.mask, scores, hidden, name="masked_scores")
    return builder.op("Softmax", masked, axis=-1, name="weights")


def _weighted_sum(builder: GraphBuilder, operands: Operands, weights: ir.Value, visible: VisibleRows) -> ir.Value:
    """Weights [B, H, T, S + T] times the values of past and new rows: [B, H, T, dv]."""
    names = ["past_weights", "new_weights"]
    past_weights, new_weights = builder.multi("Split", weights, visible.counts, names=names, axis=-1)
    past_sum = builder.op("MatMul", past_weights, operands.past_value, name="past_context")
    return builder.op("Add", past_sum, builder.op("MatMul", new_weights, operands.value, name="new_context"))
