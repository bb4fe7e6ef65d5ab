"""`TimestepNorm`: cumulative group normalisation as an ONNX function.

With token moments (m, v), state (n, mean, var) at the call's start and c tokens of the call consumed:

    mean_c = mean + sum(m - mean) / (n + c)
    var_c  = var  + sum(v + delta^2 (n + c - 1)/(n + c) - var) / (n + c),   delta = m - (mean one token earlier)

Sums of differences from the state lose nothing to a large mean, and CumSum takes them over all tokens at once. A row
at position 0 has mean = var = 0 selected, and n = 0 takes their weight away.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from megalodon_deploy.export.builder import GraphBuilder
from megalodon_deploy.export.operators.common import function_inputs, make_function, select_past

NAME = "TimestepNorm"
FLOAT, DOUBLE = ir.DataType.FLOAT, ir.DataType.DOUBLE
DEFAULT_EPSILON = 1e-5


def timestep_norm_function() -> ir.Function:
    """The function; its attribute `epsilon` defaults to 1e-5."""
    builder = GraphBuilder()
    inputs = function_inputs("x", "past_norm", "position", "weight", "bias")
    x_BTD, past_BG4, position_B, weight_D, bias_D = inputs
    x_BTGs = _grouped(builder, x_BTD, past_BG4)
    moments = _token_moments(builder, x_BTGs)
    past = _past_statistics(builder, select_past(builder, past_BG4, position_B, rank=3))
    mean_BTG1, var_BTG1 = _cumulate(builder, moments, past, *_counts(builder, x_BTD, position_B))
    normal_BTGs = _normalise(builder, x_BTGs, mean_BTG1, var_BTG1)
    normal_BTD = builder.op("Reshape", normal_BTGs, builder.op("Shape", x_BTD), name="normal")
    scaled = builder.op("Add", builder.op("Mul", normal_BTD, weight_D), bias_D)
    y_BTD = builder.op("CastLike", scaled, x_BTD)
    present_BG4 = _present(builder, mean_BTG1, var_BTG1)
    outputs = {"y": y_BTD, "present_norm": present_BG4}
    return make_function(builder, NAME, inputs, outputs, [ir.AttrFloat32("epsilon", DEFAULT_EPSILON)])


def _grouped(builder: GraphBuilder, x_BTD: ir.Value, past_BG4: ir.Value) -> ir.Value:
    """x as float32 [B, T, G, s]."""
    groups = builder.op("Shape", past_BG4, start=1, end=2, name="groups")
    shape = builder.op("Concat", builder.constant([0, 0], "keep"), groups, builder.constant([-1], "rest"), axis=0)
    return builder.op("Reshape", builder.op("Cast", x_BTD, to=FLOAT), shape, name="grouped")


def _token_moments(builder: GraphBuilder, x_BTGs: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Mean and variance over the scalars of each token and group, float64 [B, T, G, 1]."""
    last = builder.constant([-1], "last_axis")
    mean = builder.op("ReduceMean", x_BTGs, last, keepdims=1, name="token_mean")
    difference = builder.op("Sub", x_BTGs, mean)
    var = builder.op("ReduceMean", builder.op("Mul", difference, difference), last, keepdims=1, name="token_var")
    return builder.op("Cast", mean, to=DOUBLE), builder.op("Cast", var, to=DOUBLE)


def _past_statistics(builder: GraphBuilder, past_BG4: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Mean and variance of the state, float64 [B, 1, G, 1] each."""
    past = builder.op("Unsqueeze", builder.op("Cast", past_BG4, to=DOUBLE), builder.constant([1], "time_axis"))
    mean_hi, mean_lo, var_hi, var_lo = builder.multi(
        "Split", past, names=["mean_hi", "mean_lo", "var_hi", "var_lo"], axis=-1, num_outputs=4
    )
    return builder.op("Add", mean_hi, mean_lo, name="past_mean"), builder.op("Add", var_hi, var_lo, name="past_var")


def _counts(builder: GraphBuilder, x_BTD: ir.Value, position_B: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Tokens seen before and after each token of the call, float64 [B, T, 1, 1]."""
    num_tokens = builder.op("Squeeze", builder.op("Shape", x_BTD, start=1, end=2), name="num_tokens")
    zero, one = builder.scalar(0, np.int64, "zero"), builder.scalar(1, np.int64, "one")
    steps_T = builder.op("Range", zero, num_tokens, one, name="steps")
    position_B1 = builder.op("Unsqueeze", position_B, builder.constant([1], "time_axis"))
    before_BT = builder.op("Add", position_B1, steps_T)
    before_BT11 = builder.op("Unsqueeze", before_BT, builder.constant([2, 3], "group_axes"))
    before = builder.op("Cast", before_BT11, to=DOUBLE, name="seen_before")
    return before, builder.op("Add", before, builder.scalar(1.0, np.float64, "one_double"), name="seen_after")


def _cumulate(
    builder: GraphBuilder,
    moments: tuple[ir.Value, ir.Value],
    past: tuple[ir.Value, ir.Value],
    before: ir.Value,
    after: ir.Value,
) -> tuple[ir.Value, ir.Value]:
    """Mean and variance after each token, float64 [B, T, G, 1]."""
    (token_mean, token_var), (past_mean, past_var) = moments, past
    time, one = builder.scalar(1, np.int64, "one"), builder.scalar(1.0, np.float64, "one_double")
    shift = builder.op("Sub", token_mean, past_mean, name="shift")
    total = builder.op("CumSum", shift, time, name="shift_sum")
    mean = builder.op("Add", past_mean, builder.op("Div", total, after), name="mean")
    earlier = builder.op("Div", builder.op("Sub", total, shift), builder.op("Max", before, one), name="earlier")
    delta = builder.op("Sub", shift, earlier, name="delta")
    between = builder.op("Mul", builder.op("Mul", delta, delta), builder.op("Div", before, after), name="between")
    spread = builder.op("Sub", builder.op("Add", token_var, between), past_var, name="spread")
    spread_sum = builder.op("CumSum", spread, time, name="spread_sum")
    return mean, builder.op("Add", past_var, builder.op("Div", spread_sum, after), name="var")


def _normalise(builder: GraphBuilder, x_BTGs: ir.Value, mean: ir.Value, var: ir.Value) -> ir.Value:
    """(x - mean) / sqrt(var + epsilon), float32 [B, T, G, s]."""
    reference = ir.RefAttr("value_float", "epsilon", ir.AttributeType.FLOAT)
    epsilon = builder.op("Cast", builder.op("Constant", name="epsilon", value_float=reference), to=DOUBLE)
    deviation = builder.op("Sqrt", builder.op("Add", var, epsilon), name="deviation")
    scale = builder.op("Cast", builder.op("Reciprocal", deviation), to=FLOAT, name="scale")
    return builder.op("Mul", builder.op("Sub", x_BTGs, builder.op("Cast", mean, to=FLOAT)), scale, name="normal_groups")


def _present(builder: GraphBuilder, mean: ir.Value, var: ir.Value) -> ir.Value:
    """The statistics after the last token as (mean hi, mean lo, var hi, var lo), float32 [B, G, 4]."""
    both_BTG2 = builder.op("Concat", mean, var, axis=-1, name="statistics")
    last_BG2 = builder.op("Gather", both_BTG2, builder.scalar(-1, np.int64, "last"), axis=1, name="last_statistics")
    exact = builder.op("Unsqueeze", last_BG2, builder.constant([-1], "last_axis"))
    hi = builder.op("Cast", exact, to=FLOAT, name="hi")
    lo = builder.op("Cast", builder.op("Sub", exact, builder.op("Cast", hi, to=DOUBLE)), to=FLOAT, name="lo")
    pairs = builder.op("Concat", hi, lo, axis=-1, name="pairs")
    return builder.op("Reshape", pairs, builder.constant([0, 0, 4], "state_shape"), name="present")
