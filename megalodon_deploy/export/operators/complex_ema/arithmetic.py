"""Complex arithmetic on pairs of real values: ONNX has no complex type that executors support."""

from __future__ import annotations

import onnx_ir as ir

from megalodon_deploy.export.builder import GraphBuilder

Complex = tuple[ir.Value, ir.Value]  # real and imaginary part, equal shapes


def split_pairs(builder: GraphBuilder, pairs: ir.Value, name: str) -> Complex:
    """[..., 2] -> parts [..., 1]."""
    real, imaginary = builder.multi("Split", pairs, names=[f"{name}_re", f"{name}_im"], axis=-1, num_outputs=2)
    return real, imaginary


def multiply(builder: GraphBuilder, a: Complex, b: Complex, name: str) -> Complex:
    """The product, by broadcasting."""
    real = builder.op("Sub", builder.op("Mul", a[0], b[0]), builder.op("Mul", a[1], b[1]), name=f"{name}_re")
    imaginary = builder.op("Add", builder.op("Mul", a[0], b[1]), builder.op("Mul", a[1], b[0]), name=f"{name}_im")
    return real, imaginary


def conjugate(builder: GraphBuilder, a: Complex) -> Complex:
    return a[0], builder.op("Neg", a[1])


def concat(builder: GraphBuilder, a: Complex, b: Complex, axis: int, name: str) -> Complex:
    """a before b, part by part."""
    real = builder.op("Concat", a[0], b[0], axis=axis, name=f"{name}_re")
    return real, builder.op("Concat", a[1], b[1], axis=axis, name=f"{name}_im")
