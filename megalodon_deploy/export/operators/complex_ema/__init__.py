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
from megalodon_deploy.export.operators.complex_ema.blocks import block_length, emit_blocks
from megalodon_deploy.export.operators.complex_ema.coefficients import Coefficients
from megalodon_deploy.export.operators.complex_ema.step import emit_step

NAME = "ComplexEMA"


def complex_ema_function(chunk_size: int) -> ir.Function:
    """The function for models with this chunk size."""
    builder = GraphBuilder()
    inputs = function_inputs("x", "past_cema", "position", "p", "q_powers", "gamma", "omega")
    x_BTD, past_BDN2, position_B, p_DN, q_powers, gamma_DN2, omega_D = inputs
    u_BTD = builder.op("Cast", x_BTD, to=ir.DataType.FLOAT, name="u")
    past = select_past(builder, past_BDN2, position_B, rank=4)
    num_tokens = builder.op("Shape", x_BTD, start=1, end=2, name="num_tokens")
    is_step = builder.op("Squeeze", builder.op("Equal", num_tokens, builder.constant([1], "one_token")), name="is_step")
    coefficients = Coefficients(p_DN, q_powers, gamma_DN2)
    length = block_length(chunk_size)
    step = builder.subgraph("step", lambda inner: emit_step(inner, u_BTD, past, coefficients))
    blocks = builder.subgraph("blocks", lambda inner: emit_blocks(inner, u_BTD, past, coefficients, length))
    average, present = builder.multi("If", is_step, names=["average", "present"], then_branch=step, else_branch=blocks)
    y_BTD = builder.op("Add", builder.op("Mul", u_BTD, omega_D), average)
    outputs = {"y": builder.op("CastLike", y_BTD, x_BTD), "present_cema": present}
    return make_function(builder, NAME, inputs, outputs)
