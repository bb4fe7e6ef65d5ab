"""One token: the recurrence itself."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from megalodon_deploy.export.builder import GraphBuilder
from megalodon_deploy.export.operators.complex_ema.coefficients import Coefficients


def emit_step(
    builder: GraphBuilder,
    u_BTD: ir.Value,
    direct_BTD: ir.Value,
    past_rows: ir.Value,
    level_0: ir.Value,
    coefficients: Coefficients,
) -> list[ir.Value]:
    """y [B, T, D] and the new state [B, D, N, 2], right for T = 1.

    TensorRT wants both branches of an If to be shape-valid for every T: the last token is taken, and the sum with
    `direct_BTD` (omega u) has all T.

    Args:
        past_rows: [B, 1, D, 2N]
        level_0: [B, D] int64, table rows of q
    """
    state_axes = builder.constant([2, 3], "state_axes")
    rotated = coefficients.rotate(builder, past_rows, level_0, "rotated")
    rotated_BDN2 = builder.op("Reshape", rotated, coefficients.state_shape, name="rotated_state")
    token_BD = builder.op("Gather", u_BTD, builder.scalar(-1, np.int64, "last"), axis=1, name="token")
    token_BD11 = builder.op("Unsqueeze", token_BD, state_axes, name="token_state")
    driven_BDN2 = builder.op("Mul", token_BD11, coefficients.drive_DN2, name="driven")
    present_BDN2 = builder.op("Add", rotated_BDN2, driven_BDN2, name="present")
    read_BDN2 = builder.op("Mul", present_BDN2, coefficients.readout_DN2, name="read")
    average_BD = builder.op("ReduceSum", read_BDN2, state_axes, keepdims=0, name="average")
    average_B1D = builder.op("Unsqueeze", average_BD, builder.constant([1], "time_axis"), name="average_token")
    return [builder.op("Add", direct_BTD, average_B1D, name="sum"), present_BDN2]
