"""One token: the recurrence itself."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from megalodon_deploy.export.builder import GraphBuilder
from megalodon_deploy.export.operators.complex_ema.arithmetic import multiply, split_pairs
from megalodon_deploy.export.operators.complex_ema.coefficients import Coefficients


def emit_step(
    builder: GraphBuilder, u_BTD: ir.Value, past_BDN2: ir.Value, coefficients: Coefficients
) -> list[ir.Value]:
    """Average [B, T, D] without the omega term, and the new state [B, D, N, 2]; right for T = 1.

    TensorRT wants both branches of an If to be shape-valid for every T: the last token is taken, the result expanded.
    """
    u_BD = builder.op("Gather", u_BTD, builder.scalar(-1, np.int64, "last"), axis=1, name="token")
    u_BD11 = builder.op("Unsqueeze", u_BD, builder.constant([2, 3], "state_axes"))
    rotated_re, rotated_im = multiply(
        builder, split_pairs(builder, past_BDN2, "past"), coefficients.power(builder, 0), "rotated"
    )
    driven_re = builder.op("Add", rotated_re, builder.op("Mul", u_BD11, coefficients.drive(builder)), name="driven")
    gamma_re, gamma_im = coefficients.readout(builder)
    read = builder.op("Sub", builder.op("Mul", driven_re, gamma_re), builder.op("Mul", rotated_im, gamma_im))
    summed_BD = builder.op("ReduceSum", read, builder.constant([2, 3], "state_axes"), keepdims=0, name="summed")
    average_B1D = builder.op("Unsqueeze", summed_BD, builder.constant([1], "time_axis"))
    average_BTD = builder.op("Expand", average_B1D, builder.op("Shape", u_BTD), name="average")
    return [average_BTD, builder.op("Concat", driven_re, rotated_im, axis=-1, name="present")]
