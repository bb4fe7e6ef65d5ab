"""The one graph of a model, for prefill and decode: inputs and outputs are those of `megalodon_deploy.state`.

Letters as in `MegalodonConfig`. Emitted node by node from the configuration; scopes follow the names of the
checkpoint's tensors. In half precision, the residual stream, norms, CEMA, rotary embedding and softmax stay float32:
see `megalodon_deploy.model.half_precision`.
"""

from __future__ import annotations

import math
from typing import Protocol

import numpy as np
import onnx_ir as ir

from megalodon_deploy.bundle import LogitsMode, Precision
from megalodon_deploy.config import MegalodonConfig
from megalodon_deploy.export.builder import IR_VERSION, OPSET, GraphBuilder
from megalodon_deploy.export.context import CallValues, Context
from megalodon_deploy.export.layers import emit_block, emit_timestep_norm
from megalodon_deploy.export.operators import DOMAIN, DOMAIN_VERSION
from megalodon_deploy.export.operators.chunk_attention import chunk_attention_function
from megalodon_deploy.export.operators.complex_ema import complex_ema_function
from megalodon_deploy.export.operators.timestep_norm import timestep_norm_function
from megalodon_deploy.export.quantized_weights import Part, matrix_parts
from megalodon_deploy.export.weights import InitializerSpec, folds
from megalodon_deploy.quantization import EMBEDDING_WEIGHT, OUTPUT_WEIGHT, Quantization, WeightFormat
from megalodon_deploy.state import LOGITS, POSITION, TOKENS, Dim, state_specs

ACTIVATION = {"fp32": ir.DataType.FLOAT, "fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
FLOAT, INT64 = ir.DataType.FLOAT, ir.DataType.INT64
STATE_TYPES = {"float32": FLOAT, "fp8": ir.DataType.FLOAT8E4M3FN, "int8": ir.DataType.INT8}


class WeightSource(Protocol):
    """Gives the tensors of initializers, which may be lazy."""

    def tensor(self, spec: InitializerSpec, dtype: ir.DataType) -> ir.TensorProtocol: ...

    def part(self, spec: InitializerSpec, form: WeightFormat, dtype: ir.DataType, part: Part) -> ir.TensorProtocol:
        """Of the matrix `spec`, whose scales are of the type `dtype`."""
        ...


def build_model(
    config: MegalodonConfig,
    weights: WeightSource,
    *,
    precision: Precision = "fp32",
    logits: LogitsMode = "last",
    quantization: Quantization | None = None,
) -> ir.Model:
    """The model with these weights."""
    activation = ACTIVATION[precision]
    initializers = _initializers(config, weights, activation, quantization)
    inputs = _inputs(config, activation)
    context = Context(config, activation, initializers, GraphBuilder(), quantization=quantization)
    outputs = _emit(context, inputs, all_logits=logits == "all")
    _declare_outputs(config, activation, outputs, num_logits="T" if logits == "all" else 1)
    builder = context.builder
    graph = ir.Graph(
        list(inputs.values()),
        [outputs[name] for name in (LOGITS, *(spec.present for spec in state_specs(config)))],
        nodes=builder.nodes,
        initializers=[*initializers.values(), *builder.constants],
        opset_imports={"": OPSET, DOMAIN: DOMAIN_VERSION},
        name="megalodon",
    )
    functions = [
        complex_ema_function(config.chunk_size),
        timestep_norm_function(config.norm_num_groups, config.group_dim),
        chunk_attention_function(scaled=config.kv_dtype != "activation"),
    ]
    return ir.Model(graph, ir_version=IR_VERSION, producer_name="megalodon-deploy", functions=functions)


def _initializers(
    config: MegalodonConfig, weights: WeightSource, activation: ir.DataType, quantization: Quantization | None
) -> dict[str, ir.Value]:
    values: dict[str, ir.Value] = {}
    for spec in (spec for fold in folds(config) for spec in fold.targets):
        form = quantization.format_of(spec.name) if quantization else None
        if form is None:
            dtype = activation if spec.is_activation else FLOAT
            values[spec.name] = _typed(spec.name, dtype, spec.shape)
            values[spec.name].const_value = weights.tensor(spec, dtype)
            continue
        for part in matrix_parts(spec.name, spec.shape, form, activation):
            values[part.name] = _typed(part.name, part.dtype, part.shape)
            values[part.name].const_value = weights.part(spec, form, activation, part)
    return values


def _inputs(config: MegalodonConfig, activation: ir.DataType) -> dict[str, ir.Value]:
    values = {TOKENS: _typed(TOKENS, INT64, ("B", "T")), POSITION: _typed(POSITION, INT64, ("B",))}
    for spec in state_specs(config):
        values[spec.past] = _typed(spec.past, STATE_TYPES.get(spec.dtype, activation), spec.past_shape)
    return values


def _declare_outputs(
    config: MegalodonConfig, activation: ir.DataType, outputs: dict[str, ir.Value], num_logits: Dim
) -> None:
    shapes: dict[str, tuple[ir.DataType, tuple[Dim, ...]]] = {LOGITS: (FLOAT, ("B", num_logits, config.vocab_size))}
    for spec in state_specs(config):
        shapes[spec.present] = (STATE_TYPES.get(spec.dtype, activation), spec.present_shape)
    assert set(shapes) == set(outputs), "Bug: the graph's outputs are not those of the state table"
    for name, (dtype, shape) in shapes.items():
        outputs[name].name, outputs[name].dtype, outputs[name].shape = name, dtype, ir.Shape(shape)


def _typed(name: str, dtype: ir.DataType, shape: tuple[Dim, ...]) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))


def _emit(context: Context, inputs: dict[str, ir.Value], *, all_logits: bool) -> dict[str, ir.Value]:
    config, builder = context.config, context.builder
    with builder.scope("call"):
        call = _call_values(context, inputs)
    x_BTD = context.rows(EMBEDDING_WEIGHT, inputs[TOKENS], "embed")
    if config.scale_emb:
        factor = builder.scalar(math.sqrt(config.model_dim), np.float32, "embed_scale")
        x_BTD = builder.op("Mul", x_BTD, factor, name="embed_scaled")
    outputs: dict[str, ir.Value] = {}
    for layer in range(config.num_layers):
        with builder.scope(f"layers.{layer}"):
            x_BTD, new_state = emit_block(context, call, layer, x_BTD, inputs)
        outputs |= new_state
    with builder.scope("output"):
        normal_BTD, outputs["present_norm.final"] = emit_timestep_norm(
            context, call, "output.final_norm", x_BTD, inputs["past_norm.final"]
        )
        logits = _logits(context, normal_BTD, all_logits=all_logits)
    return {LOGITS: logits} | outputs


def _logits(context: Context, x_BTD: ir.Value, *, all_logits: bool) -> ir.Value:
    """[B, K, V] float32."""
    builder, config = context.builder, context.config
    if not all_logits:
        bounds = [builder.constant([n], name) for n, name in ((-1, "last"), (1 << 62, "end"), (1, "one"))]
        x_BTD = builder.op("Slice", x_BTD, *bounds, name="last_token")
        builder.typed(x_BTD, FLOAT, ("B", 1, config.model_dim))
    x_BTD = context.to_activation(x_BTD, "last_token_cast")
    if config.share_emb:
        matrix = builder.op("Transpose", context.weight("embed.weight"), perm=[1, 0], name="embed_transposed")
    else:
        matrix = context.matrix(OUTPUT_WEIGHT, "output")
    product = builder.op("MatMul", x_BTD, matrix, name="output")
    return builder.op("Cast", product, to=FLOAT, name=LOGITS)


def _call_values(context: Context, inputs: dict[str, ir.Value]) -> CallValues:
    builder, config = context.builder, context.config
    position_B = inputs[POSITION]
    zero, one = builder.scalar(0, np.int64, "zero"), builder.scalar(1, np.int64, "one")
    chunk = builder.scalar(config.chunk_size, np.int64, "chunk_size")
    filled_B = builder.op("Mod", position_B, chunk, name="filled_rows")
    filled_B1 = builder.op("Unsqueeze", filled_B, builder.constant([1], "axis_1"))
    num_tokens = builder.op("Shape", inputs[TOKENS], start=1, end=2, name="num_tokens")
    steps_T = builder.typed(
        builder.op("Range", zero, builder.op("Squeeze", num_tokens), one, name="steps"), INT64, ["T"]
    )
    rows_BT = builder.op("Add", filled_B1, steps_T, name="rows")
    return CallValues(position_B, rows_BT, *_rope_tables(context))


def _rope_tables(context: Context) -> tuple[ir.Value, ir.Value]:
    """cos and sin of row * base^(-2i/dz), [C, dz / 2], from float64 angles."""
    config = context.config
    pairs = np.arange(config.key_head_dim // 2, dtype=np.float64)
    frequencies = config.rope_base ** (-2 * pairs / config.key_head_dim)
    angles = np.arange(config.chunk_size, dtype=np.float64)[:, None] * frequencies
    constant = context.builder.constant
    return constant(np.cos(angles).astype(np.float32), "rope_cos"), constant(
        np.sin(angles).astype(np.float32), "rope_sin"
    )
