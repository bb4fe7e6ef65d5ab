"""What the function bodies of both operators share."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from megalodon_deploy.export.builder import OPSET, GraphBuilder
from megalodon_deploy.export.operators import DOMAIN


def function_inputs(*names: str) -> list[ir.Value]:
    return [ir.Value(name=name) for name in names]


def make_function(
    builder: GraphBuilder,
    name: str,
    inputs: Sequence[ir.Value],
    outputs: dict[str, ir.Value],
    attributes: Sequence[ir.Attr] = (),
) -> ir.Function:
    """Close a body; `outputs` renames its values."""
    for output_name, value in outputs.items():
        value.name = output_name
    graph = ir.Graph(
        inputs,
        list(outputs.values()),
        nodes=builder.all_nodes(),
        opset_imports={"": OPSET},
        name=name,
    )
    return ir.Function(DOMAIN, name, graph=graph, attributes=list(attributes))


def select_past(builder: GraphBuilder, past: ir.Value, position_B: ir.Value, rank: int) -> ir.Value:
    """`past` [B, ...] of `rank` axes, with zeros selected (not multiplied: it may hold NaN) where position is 0."""
    fresh_B = builder.op("Equal", position_B, builder.scalar(0, np.int64, "zero"), name="is_fresh")
    shape = builder.constant([-1] + [1] * (rank - 1), f"batch_shape_{rank}")
    fresh = builder.op("Reshape", fresh_B, shape, name="is_fresh_rows")
    return builder.op("Where", fresh, builder.scalar(0.0, np.float32, "zero_float"), past, name="past_or_zero")
