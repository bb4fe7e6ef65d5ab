"""Many tokens: matrix products inside blocks of L tokens, a short scan from block to block.

    inside a block       y = Toeplitz(k) u,  k_j = Re sum_n gamma p q^j
    a block's sum        S = sum_j p q^(L-1-j) u_j
    from block to block  h' = q^L h + S
    into a block         y_t += Re sum_n gamma q^t (q h)

Lines one and two are one MatMul for each channel, line four another. The last block may be partial: its r tokens are
moved to the block's end, where zeros before them add nothing, and the state after it is q^r h + S.

Powers are products of entries of `q_powers`, so their error does not grow with the exponent. The tables of powers are
made when the function runs: stored, they would take more memory than the coefficients by far.

Letters: L tokens of a block, M = B times the number of blocks, m = 2N.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from megalodon_deploy.export.builder import GraphBuilder
from megalodon_deploy.export.operators.complex_ema.coefficients import Coefficients
from megalodon_deploy.export.operators.complex_ema.layout import BlockLayout
from megalodon_deploy.export.operators.complex_ema.tables import BlockTables


def emit_blocks(
    builder: GraphBuilder,
    u_BTD: ir.Value,
    direct_BTD: ir.Value,
    past_rows: ir.Value,
    level_0: ir.Value,
    coefficients: Coefficients,
    *,
    levels: int,
) -> list[ir.Value]:
    """y [B, T, D] and the new state [B, D, N, 2], for any T from 1.

    Args:
        direct_BTD: omega u
        past_rows: [B, 1, D, 2N]
        level_0: [B, D] int64, table rows of q
        levels: L = 2^levels
    """
    layout = BlockLayout(builder, u_BTD, coefficients, 1 << levels)
    tables = BlockTables(builder, coefficients, levels, layout.one)
    block, row_axis = builder.constant([1 << levels], "block"), builder.constant([1], "one")
    both = builder.op("MatMul", layout.blocks(), tables.inside_DLX, name="inside")
    sizes = builder.op("Concat", block, tables.num_sums, axis=0, name="inside_sizes")
    inner_DML, sums_DMm = builder.multi("Split", both, sizes, names=["inner", "sums"], axis=-1)
    entering = _scan(builder, past_rows, level_0, layout.to_rows(sums_DMm), coefficients, levels)
    readout_DmL = builder.op("Transpose", tables.readout_DLm, perm=[0, 2, 1])
    into_DML = builder.op("MatMul", layout.from_rows(entering), readout_DmL, name="into")
    average_BTD = layout.unblock(builder.op("Add", inner_DML, into_DML))
    last = builder.op("Gather", entering, builder.scalar(-1, np.int64, "last"), axis=0, name="entering_last")
    decayed = _decay(builder, last, layout.last_tokens, level_0, coefficients, levels)
    last_sums = builder.op("MatMul", layout.last_block(), tables.sums_DLm, name="last_sums")
    rows = builder.op("Unsqueeze", builder.op("Transpose", last_sums, perm=[1, 0, 2]), row_axis)
    state = builder.op("Add", decayed, rows, name="last_state")
    return [
        builder.op("Add", direct_BTD, average_BTD, name="sum"),
        builder.op("Reshape", state, coefficients.state_shape, name="present"),
    ]


def _scan(
    builder: GraphBuilder,
    past_rows: ir.Value,
    level_0: ir.Value,
    sums: ir.Value,
    coefficients: Coefficients,
    levels: int,
) -> ir.Value:
    """q h for the state h that enters each block, [blocks, B, 1, D, 2N]."""
    inner = builder.inner("scan")
    state, addend = (ir.Value(name=inner.unique(name)) for name in ("state", "block_sum"))
    level_L = coefficients.level(builder, level_0, levels)
    after = inner.op("Add", coefficients.rotate(inner, state, level_L, "moved"), addend, name="after")
    entering = coefficients.rotate(inner, state, level_0, "entering")
    body = inner.subgraph("scan", [state, addend], [after, entering])
    names = ["after_padding", "entering"]
    return builder.multi("Scan", past_rows, sums, names=names, body=body, num_scan_inputs=1)[1]


def _decay(
    builder: GraphBuilder,
    state: ir.Value,
    count: ir.Value,
    level_0: ir.Value,
    coefficients: Coefficients,
    levels: int,
) -> ir.Value:
    """state [B, 1, D, 2N] times q^(count - 1), 1 <= count <= L: a factor for each bit."""
    exponent = builder.op("Sub", count, builder.constant([1], "one"), name="exponent")
    for level in range(levels):
        shifted = builder.op("Div", exponent, builder.constant([1 << level], f"bit_{level}"))
        remainder = builder.op("Mod", shifted, builder.constant([2], "pair"))
        is_set = builder.op("Cast", remainder, to=ir.DataType.BOOL, name=f"has_bit_{level}")
        level_k = coefficients.level(builder, level_0, level)
        state = builder.op(
            "Where", is_set, coefficients.rotate(builder, state, level_k, "raised"), state, name="decayed"
        )
    return state
