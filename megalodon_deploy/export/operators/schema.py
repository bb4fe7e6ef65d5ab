"""Schemas of the operators, with shape inference: onnx then checks their nodes and knows the shapes behind them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import onnx
from onnx.defs import OpSchema

from megalodon_deploy.export.operators import DOMAIN, DOMAIN_VERSION
from megalodon_deploy.export.operators.complex_ema import NAME as COMPLEX_EMA
from megalodon_deploy.export.operators.timestep_norm import DEFAULT_EPSILON
from megalodon_deploy.export.operators.timestep_norm import NAME as TIMESTEP_NORM

# Inputs in order: (name, type, dimensions). The first two give the outputs' types and shapes. A dimension is a letter
# of `MegalodonConfig` or a number; equal letters are equal sizes.
Signature = tuple[tuple[str, str, tuple[str | int, ...]], ...]
ACTIVATION, FLOAT, INT64 = "A", "tensor(float)", "tensor(int64)"

SIGNATURES: Mapping[str, Signature] = {
    COMPLEX_EMA: (
        ("x", ACTIVATION, ("B", "T", "D")),
        ("past_cema", FLOAT, ("B", "D", "N", 2)),
        ("position", INT64, ("B",)),
        ("p", FLOAT, ("D", "N")),
        ("q_powers", FLOAT, ("K", "D", "N", 2)),
        ("gamma", FLOAT, ("D", "N", 2)),
        ("omega", FLOAT, ("D",)),
    ),
    TIMESTEP_NORM: (
        ("x", ACTIVATION, ("B", "T", "D")),
        ("past_norm", FLOAT, ("B", "G", 4)),
        ("position", INT64, ("B",)),
        ("weight", FLOAT, ("D",)),
        ("bias", FLOAT, ("D",)),
    ),
}
_OUTPUTS = {COMPLEX_EMA: ("y", "present_cema"), TIMESTEP_NORM: ("y", "present_norm")}
_ACTIVATIONS = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"]


def register_schemas() -> None:
    """Make the operators known to onnx in this process; a second call does nothing."""
    for name in SIGNATURES:
        if not onnx.defs.has(name, DOMAIN):
            onnx.defs.register_schema(_schema(name))


def _schema(name: str) -> OpSchema:
    signature = SIGNATURES[name]
    types = (signature[0][1], signature[1][1])
    epsilon = OpSchema.Attribute(
        "epsilon", onnx.helper.make_attribute("epsilon", DEFAULT_EPSILON), "added to variances"
    )
    schema = OpSchema(
        name,
        DOMAIN,
        DOMAIN_VERSION,
        inputs=[OpSchema.FormalParameter(parameter, kind) for parameter, kind, _ in signature],
        outputs=[OpSchema.FormalParameter(*output) for output in zip(_OUTPUTS[name], types, strict=True)],
        type_constraints=[(ACTIVATION, _ACTIVATIONS, "the model's activation type")],
        attributes=[epsilon] if name == TIMESTEP_NORM else [],
    )
    schema.set_type_and_shape_inference_function(_inference(signature))
    return schema


def _inference(signature: Signature) -> Callable[[onnx.shape_inference.InferenceContext], None]:
    def infer(context: onnx.shape_inference.InferenceContext) -> None:
        sizes: dict[str | int, int] = {}
        for index, (parameter, _, dims) in enumerate(signature):
            _check(context.get_input_type(index), parameter, dims, sizes)
        for index in range(2):
            context.set_output_type(index, context.get_input_type(index))

    return infer


def _check(
    given: onnx.TypeProto | None, parameter: str, dims: tuple[str | int, ...], sizes: dict[str | int, int]
) -> None:
    """Rank and sizes of one input, as far as they are known."""
    if given is None or not given.tensor_type.HasField("shape"):
        return
    shape = given.tensor_type.shape.dim
    if len(shape) != len(dims):
        raise onnx.shape_inference.InferenceError(f"{parameter} has rank {len(shape)}, expected {list(dims)}")
    for dim, size in zip(dims, shape, strict=True):
        if not size.HasField("dim_value"):
            continue
        expected = dim if isinstance(dim, int) else sizes.setdefault(dim, size.dim_value)
        if size.dim_value != expected:
            raise onnx.shape_inference.InferenceError(
                f"{parameter}: dimension {dim} is {size.dim_value}, expected {expected}"
            )
