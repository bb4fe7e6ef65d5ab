"""Schemas of the operators, with shape inference: onnx then checks their nodes and knows the shapes behind them."""

from __future__ import annotations

from collections.abc import Callable

import onnx
from onnx.defs import OpSchema

from megalodon_deploy.export.operators import DOMAIN, DOMAIN_VERSION
from megalodon_deploy.export.operators.chunk_attention import NAME as CHUNK_ATTENTION
from megalodon_deploy.export.operators.complex_ema import NAME as COMPLEX_EMA
from megalodon_deploy.export.operators.timestep_norm import DEFAULT_EPSILON
from megalodon_deploy.export.operators.timestep_norm import NAME as TIMESTEP_NORM
from megalodon_deploy.state import CHUNK_SIZE, TIMESTEP_NORM_COMPLEX_EMA

# Inputs in order: (name, type, dimensions). A dimension is a letter of `MegalodonConfig`, the width of a head or a
# number; equal letters are equal sizes.
Signature = tuple[tuple[str, str, tuple[str | int, ...]], ...]
ACTIVATION, MEMORY, FLOAT, INT64 = "A", "M", "tensor(float)", "tensor(int64)"

SIGNATURES: dict[str, Signature] = {
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
    CHUNK_ATTENTION: (
        ("q", ACTIVATION, ("B", "H", "T", "dz")),
        ("k", ACTIVATION, ("B", "H", "T", "dz")),
        ("v", ACTIVATION, ("B", "H", "T", "dv")),
        ("past_key", MEMORY, ("B", "H", "S", "dz")),
        ("past_value", MEMORY, ("B", "H", "S", "dv")),
        ("position", INT64, ("B",)),
        ("past_key_scale", FLOAT, ("B", "H", "S")),
        ("past_value_scale", FLOAT, ("B", "H", "S")),
    ),
}
# The two operators one after the other: a node that engines are built with, and that no exported graph has.
SIGNATURES[TIMESTEP_NORM_COMPLEX_EMA] = (
    *SIGNATURES[TIMESTEP_NORM],
    *(entry for entry in SIGNATURES[COMPLEX_EMA] if entry[0] not in ("x", "position")),
)
_NUM_OPTIONAL = {CHUNK_ATTENTION: 2}  # of the last inputs
# Outputs in order: (name, index of the input whose type and shape it has).
_OUTPUTS = {
    COMPLEX_EMA: (("y", 0), ("present_cema", 1)),
    TIMESTEP_NORM: (("y", 0), ("present_norm", 1)),
    CHUNK_ATTENTION: (("out", 2),),
    TIMESTEP_NORM_COMPLEX_EMA: (("u", 0), ("present_norm", 1), ("y", 0), ("present_cema", 5)),
}
_ACTIVATIONS = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"]
_CONSTRAINTS = {
    ACTIVATION: (_ACTIVATIONS, "the model's activation type"),
    MEMORY: ([*_ACTIVATIONS, "tensor(float8e4m3fn)", "tensor(int8)"], "the type of key/value memory"),
}


def register_schemas() -> None:
    """Make the operators known to onnx in this process; a second call does nothing."""
    for name in SIGNATURES:
        if not onnx.defs.has(name, DOMAIN):
            onnx.defs.register_schema(_schema(name))


def _attributes(name: str) -> list[OpSchema.Attribute]:
    if name in (TIMESTEP_NORM, TIMESTEP_NORM_COMPLEX_EMA):
        default = onnx.helper.make_attribute("epsilon", DEFAULT_EPSILON)
        return [OpSchema.Attribute("epsilon", default, "added to variances")]
    if name == CHUNK_ATTENTION:
        return [OpSchema.Attribute(CHUNK_SIZE, OpSchema.AttrType.INT, "tokens of a chunk", required=True)]
    return []


def _schema(name: str) -> OpSchema:
    signature = SIGNATURES[name]
    num_required = len(signature) - _NUM_OPTIONAL.get(name, 0)
    options = OpSchema.FormalParameterOption
    inputs = [
        OpSchema.FormalParameter(
            parameter, kind, param_option=options.Single if index < num_required else options.Optional
        )
        for index, (parameter, kind, _) in enumerate(signature)
    ]
    used = [kind for kind in _CONSTRAINTS if any(kind == other for _, other, _ in signature)]
    schema = OpSchema(
        name,
        DOMAIN,
        DOMAIN_VERSION,
        inputs=inputs,
        outputs=[OpSchema.FormalParameter(output, signature[like][1]) for output, like in _OUTPUTS[name]],
        type_constraints=[(kind, *_CONSTRAINTS[kind]) for kind in used],
        attributes=_attributes(name),
    )
    schema.set_type_and_shape_inference_function(_inference(name))
    return schema


def _inference(name: str) -> Callable[[onnx.shape_inference.InferenceContext], None]:
    def infer(context: onnx.shape_inference.InferenceContext) -> None:
        sizes: dict[str | int, int] = {}
        for index in range(context.get_num_inputs()):
            parameter, _, dims = SIGNATURES[name][index]
            _check(context.get_input_type(index), parameter, dims, sizes)
        for index, (_, like) in enumerate(_OUTPUTS[name]):
            context.set_output_type(index, context.get_input_type(like))

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
