"""`TimestepNorm`: cumulative group normalisation as an ONNX function.

With token moments (m, v), state (n, mean, var) at the call's start and c tokens of the call consumed:

    mean_c = mean + sum(m - mean) / (n + c)
    var_c  = var  + sum(v + e^2 (n + c)/(n + c - 1) - var) / (n + c),   e = m - mean_c

e^2 (n + c)/(n + c - 1) is delta^2 (n + c - 1)/(n + c) of the usual form, delta = m - mean_{c-1}. Sums of differences
from the state lose nothing to a large mean, and CumSum takes them over all tokens at once. A row at position 0 has
mean = var = 0 selected, and n = 0 takes their weight away.

Statistics are float64 [B, T, G, 1, 1]. Decoding runs this body in every layer for every token, so it is short.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from megalodon_deploy.export.builder import GraphBuilder
from megalodon_deploy.export.operators.common import function_inputs, make_function, select_past
from megalodon_deploy.state import NORM_PARTS

NAME = "TimestepNorm"
FLOAT, DOUBLE = ir.DataType.FLOAT, ir.DataType.DOUBLE
DEFAULT_EPSILON = 1e-5

Pair = tuple[ir.Value, ir.Value]


def timestep_norm_function(num_groups: int, group_dim: int) -> ir.Function:
    """The function for models with G groups of s scalars; its attribute `epsilon` defaults to 1e-5."""
    builder = GraphBuilder()
    inputs = function_inputs("x", "past_norm", "position", "weight", "bias")
    x_BTD, past_BG4, position_B, weight_D, bias_D = inputs
    grouped = builder.constant([0, 0, num_groups, 1, group_dim], "grouped_shape")
    x_BTG1s = builder.op("Reshape", builder.op("Cast", x_BTD, to=FLOAT), grouped, name="grouped")
    moments = _token_moments(builder, x_BTG1s)
    past = _past_statistics(builder, select_past(builder, past_BG4, position_B, rank=3))
    mean, var = _cumulate(builder, moments, past, *_counts(builder, x_BTD, position_B))
    normal_BTG1s = _normalise(builder, x_BTG1s, mean, var)
    flat = builder.constant([0, 0, num_groups * group_dim], "flat_shape")
    normal_BTD = builder.op("Reshape", normal_BTG1s, flat, name="normal")
    scaled = builder.op("Add", builder.op("Mul", normal_BTD, weight_D), bias_D)
    outputs = {"y": builder.op("CastLike", scaled, x_BTD), "present_norm": _present(builder, mean, var, num_groups)}
    return make_function(builder, NAME, inputs, outputs, [ir.AttrFloat32("epsilon", DEFAULT_EPSILON)])


def _token_moments(builder: GraphBuilder, x_BTG1s: ir.Value) -> Pair:
    """Mean and variance over the scalars of each token and group."""
    last = builder.constant([-1], "last_axis")
    mean = builder.op("ReduceMean", x_BTG1s, last, keepdims=1, name="token_mean")
    centred = builder.op("Sub", x_BTG1s, mean, name="token_centred")
    var = builder.op("ReduceMean", builder.op("Mul", centred, centred), last, keepdims=1, name="token_var")
    return builder.op("Cast", mean, to=DOUBLE), builder.op("Cast", var, to=DOUBLE)


def _past_statistics(builder: GraphBuilder, past_BG4: ir.Value) -> Pair:
    """Mean and variance of the state, [B, 1, G, 1, 1] each."""
    axes = builder.constant([1, 3], "statistics_axes")
    past_B1G14 = builder.op("Unsqueeze", builder.op("Cast", past_BG4, to=DOUBLE), axes)
    names = ["mean_hi", "mean_lo", "var_hi", "var_lo"]
    parts = builder.multi("Split", past_B1G14, names=names, axis=-1, num_outputs=NORM_PARTS)
    return builder.op("Add", *parts[:2], name="past_mean"), builder.op("Add", *parts[2:], name="past_var")


def _counts(builder: GraphBuilder, x_BTD: ir.Value, position_B: ir.Value) -> Pair:
    """Tokens seen before and after each token of the call, float64 [B, T, 1, 1, 1]."""
    zero, one = builder.scalar(0, np.int64, "zero"), builder.scalar(1, np.int64, "one")
    num_tokens = builder.op("Squeeze", builder.op("Shape", x_BTD, start=1, end=2), name="num_tokens")
    steps_T111 = builder.op(
        "Unsqueeze", builder.op("Range", zero, num_tokens, one), builder.constant([1, 2, 3], "step_axes"), name="steps"
    )
    position_B1111 = builder.op("Unsqueeze", position_B, builder.constant([1, 2, 3, 4], "position_axes"))
    before = builder.op("Cast", builder.op("Add", position_B1111, steps_T111), to=DOUBLE, name="seen_before")
    return before, builder.op("Add", before, builder.scalar(1.0, np.float64, "one_double"), name="seen_after")


def _cumulate(builder: GraphBuilder, moments: Pair, past: Pair, before: ir.Value, after: ir.Value) -> Pair:
    """Mean and variance after each token."""
    (token_mean, token_var), (past_mean, past_var) = moments, past
    time, one = builder.scalar(1, np.int64, "one"), builder.scalar(1.0, np.float64, "one_double")
    shift = builder.op("Sub", token_mean, past_mean, name="shift")
    moved = builder.op("Div", builder.op("CumSum", shift, time), after, name="mean_shift")
    error = builder.op("Sub", shift, moved, name="error")
    ratio = builder.op("Div", after, builder.op("Max", before, one), name="count_ratio")
    between = builder.op("Mul", builder.op("Mul", error, error), ratio, name="between")
    spread = builder.op("Sub", builder.op("Add", token_var, between), past_var, name="spread")
    widened = builder.op("Div", builder.op("CumSum", spread, time), after, name="var_shift")
    return builder.op("Add", past_mean, moved, name="mean"), builder.op("Add", past_var, widened, name="var")


def _normalise(builder: GraphBuilder, x_BTG1s: ir.Value, mean: ir.Value, var: ir.Value) -> ir.Value:
    """(x - mean) / sqrt(var + epsilon), float32."""
    reference = ir.RefAttr("value_float", "epsilon", ir.AttributeType.FLOAT)
    epsilon = builder.op("Cast", builder.op("Constant", name="epsilon", value_float=reference), to=DOUBLE)
    deviation = builder.op("Sqrt", builder.op("Add", var, epsilon))
    centred = builder.op("Sub", x_BTG1s, builder.op("Cast", mean, to=FLOAT), name="centred")
    return builder.op("Div", centred, builder.op("Cast", deviation, to=FLOAT), name="normal_groups")


def _present(builder: GraphBuilder, mean: ir.Value, var: ir.Value, num_groups: int) -> ir.Value:
    """The statistics after the last token as (mean hi, mean lo, var hi, var lo), float32 [B, G, 4]."""
    both_BTG21 = builder.op("Concat", mean, var, axis=3, name="statistics")
    exact_BG21 = builder.op("Gather", both_BTG21, builder.scalar(-1, np.int64, "last"), axis=1, name="last_statistics")
    hi = builder.op("Cast", exact_BG21, to=FLOAT, name="hi")
    lo = builder.op("Cast", builder.op("Sub", exact_BG21, builder.op("Cast", hi, to=DOUBLE)), to=FLOAT, name="lo")
    pairs_BG22 = builder.op("Concat", hi, lo, axis=-1, name="pairs")
    return builder.op("Reshape", pairs_BG22, builder.constant([0, num_groups, NORM_PARTS], "state_shape"))
