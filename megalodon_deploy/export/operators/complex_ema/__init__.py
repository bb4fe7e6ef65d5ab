"""`ComplexEMA`: complex exponential moving average as an ONNX function.

    h_t = q h_{t-1} + p u_t,    y_t = Re sum_n gamma h_t + omega u_t

One token is a plain step (`step.py`), more go block by block (`blocks.py`). A row at position 0 has a zero past
selected.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from megalodon_deploy.export.builder import GraphBuilder
from megalodon_deploy.export.operators.common import function_inputs, make_function, select_past
from megalodon_deploy.export.operators.complex_ema.blocks import emit_blocks
from megalodon_deploy.export.operators.complex_ema.coefficients import Coefficients
from megalodon_deploy.export.operators.complex_ema.step import emit_step

NAME = "ComplexEMA"
MAX_BLOCK = 16


def complex_ema_function(chunk_size: int) -> ir.Function:
    """The function for models with this chunk size."""
    builder = GraphBuilder()
    inputs = function_inputs("x", "past_cema", "position", "p", "q_powers", "gamma", "omega")
    x_BTD, past_BDN2, position_B, p_DN, q_powers, gamma_DN2, omega_D = inputs
    # L, the block length: a power of two within the chunk, so that q^L is an entry of q_powers.
    levels = min(MAX_BLOCK.bit_length(), chunk_size.bit_length()) - 1
    coefficients = Coefficients(builder, p_DN, q_powers, gamma_DN2, levels)
    u_BTD = builder.op("Cast", x_BTD, to=ir.DataType.FLOAT, name="u")
    direct_BTD = builder.op("Mul", u_BTD, omega_D, name="direct")
    past = select_past(builder, past_BDN2, position_B, rank=4)
    past_rows = builder.op("Reshape", past, coefficients.row_shape, name="past_rows")
    zeros_B = builder.op("Mul", position_B, builder.scalar(0, np.int64, "zero"), name="zeros")
    zeros_B1 = builder.op("Unsqueeze", zeros_B, builder.constant([1], "one"), name="zeros_rows")
    level_0 = builder.op("Add", zeros_B1, coefficients.first_level_1D, name="level_0")
    num_tokens = builder.op("Shape", x_BTD, start=1, end=2, name="num_tokens")
    is_step = builder.op("Squeeze", builder.op("Equal", num_tokens, builder.constant([1], "one")), name="is_step")
    arguments = (u_BTD, direct_BTD, past_rows, level_0, coefficients)
    inner = builder.inner("step")
    step = inner.subgraph("step", [], emit_step(inner, *arguments))
    inner = builder.inner("blocks")
    blocks = inner.subgraph("blocks", [], emit_blocks(inner, *arguments, levels=levels))
    y_BTD, present = builder.multi("If", is_step, names=["y_float", "present"], then_branch=step, else_branch=blocks)
    outputs = {"y": builder.op("CastLike", y_BTD, x_BTD), "present_cema": present}
    return make_function(builder, NAME, inputs, outputs)
