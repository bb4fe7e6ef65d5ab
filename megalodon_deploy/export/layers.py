"""One block of the model as ONNX nodes: attention with its moving average, then the two-hop feed-forward part.

Letters as in `MegalodonConfig`, S past and T new rows of keys and values.
"""

from __future__ import annotations

import onnx_ir as ir

from megalodon_deploy.export.context import CallValues, Context
from megalodon_deploy.export.operators import DOMAIN
from megalodon_deploy.export.quantized_rows import emit_dequantized_rows, emit_quantized_rows
from megalodon_deploy.export.weights import merged_projection_sizes
from megalodon_deploy.state import CHUNK_ATTENTION, CHUNK_SIZE

State = dict[str, ir.Value]  # by name of the state table


def emit_block(
    context: Context, call: CallValues, layer: int, x_BTD: ir.Value, inputs: State
) -> tuple[ir.Value, State]:
    """Block `layer`: its output [B, T, D] and its state outputs."""
    builder = context.builder
    with builder.scope("mega"):
        hop_BTD, outputs = _emit_attention_part(context, call, layer, x_BTD, inputs)
    with builder.scope("nffn"):
        return _emit_ffn(context, f"layers.{layer}.nffn", hop_BTD, x_BTD), outputs


def emit_timestep_norm(
    context: Context, call: CallValues, prefix: str, x_BTD: ir.Value, past: ir.Value
) -> tuple[ir.Value, ir.Value]:
    name = prefix.rsplit(".", 1)[-1]
    y_BTD, present = context.builder.multi(
        "TimestepNorm",
        x_BTD,
        past,
        call.position,
        context.weight(f"{prefix}.scale"),
        context.weight(f"{prefix}.bias"),
        names=[name, f"{name}_present"],
        domain=DOMAIN,
        epsilon=context.config.norm_eps,
    )
    return context.builder.typed(y_BTD, ir.DataType.FLOAT, ("B", "T", context.config.model_dim)), present


def _emit_cema(
    context: Context, call: CallValues, prefix: str, x_BTD: ir.Value, past: ir.Value
) -> tuple[ir.Value, ir.Value]:
    coefficients = [context.weight(f"{prefix}.{name}") for name in ("p", "q_powers", "gamma", "omega")]
    y_BTD, present = context.builder.multi(
        "ComplexEMA", x_BTD, past, call.position, *coefficients, names=["cema", "cema_present"], domain=DOMAIN
    )
    return context.builder.typed(y_BTD, ir.DataType.FLOAT, ("B", "T", context.config.model_dim)), present


def _emit_attention_part(
    context: Context, call: CallValues, layer: int, x_BTD: ir.Value, inputs: State
) -> tuple[ir.Value, State]:
    """y = x + m wh1^T + bh1 + (attention * gate) wh2^T, and the state outputs of the layer."""
    builder, config, prefix = context.builder, context.config, f"layers.{layer}.mega"
    u_BTD, norm = emit_timestep_norm(context, call, f"{prefix}.timenorm", x_BTD, inputs[f"past_norm.{layer}"])
    average_BTD, cema = _emit_cema(context, call, f"{prefix}.cema", u_BTD, inputs[f"past_cema.{layer}"])
    scale = context.norm_scale(f"{prefix}.rmsnorm", config.model_dim)
    normal = builder.op("RMSNormalization", average_BTD, scale, axis=-1, epsilon=config.norm_eps, name="rmsnorm")
    m_BTD = context.to_activation(normal, "rmsnorm_cast")
    v_BTE = context.silu(context.linear(context.to_activation(u_BTD, "timenorm_cast"), f"{prefix}.wv", "wv"), "v")
    merged = context.linear(m_BTD, f"{prefix}.wz_wr_wh1", "wz_wr_wh1")
    sizes = merged_projection_sizes(config)
    z_BTZ, r_BTE, h1_BTD = builder.multi(
        "Split", merged, builder.constant(list(sizes.values()), "merged_sizes"), names=list(sizes), axis=-1
    )
    with builder.scope("attention"):
        context_BTE, rows = _emit_attention(context, call, layer, z_BTZ, v_BTE, inputs)
    gate_BTE = context.with_headroom(context.silu(r_BTE, "gate"), "gate")
    gated_BTE = builder.op("Mul", context_BTE, gate_BTE, name="gated")
    h1_BTD = context.to_float(h1_BTD, "wh1")
    h2_BTD = context.to_residual(context.linear(gated_BTE, f"{prefix}.wh2", "wh2"), "wh2")
    # One Sum: ONNX Runtime would fuse an Add with the LayerNormalization behind it into an operator ten times slower.
    hop_BTD = builder.op("Sum", x_BTD, h1_BTD, h2_BTD, name="hop")
    return hop_BTD, {**rows, f"present_cema.{layer}": cema, f"present_norm.{layer}": norm}


def _emit_attention(
    context: Context, call: CallValues, layer: int, z_BTZ: ir.Value, v_BTE: ir.Value, inputs: State
) -> tuple[ir.Value, State]:
    """Attention over past and new rows: [B, T, E], and the state outputs that hold the new rows."""
    builder, config = context.builder, context.config
    query, key = _emit_query_key(context, call, f"layers.{layer}.mega", z_BTZ)
    heads = builder.constant([0, 0, config.num_heads, config.value_head_dim], "value_heads")
    value = builder.op("Transpose", builder.op("Reshape", v_BTE, heads), perm=[0, 2, 1, 3], name="value")
    key, kept_key = _keep_rows(context, layer, "key", key)
    value, kept_value = _keep_rows(context, layer, "value", value)
    total = _attend(context, call, layer, (query, key, value), inputs)
    joined_heads = builder.op("Transpose", total, perm=[0, 2, 1, 3])
    flat = builder.constant([0, 0, config.value_dim], "value_width")
    context_BTE = builder.op("Reshape", joined_heads, flat, name="context")
    return builder.typed(context_BTE, context.activation, ("B", "T", config.value_dim)), kept_key | kept_value


def _keep_rows(context: Context, layer: int, kind: str, new: ir.Value) -> tuple[ir.Value, State]:
    """New rows as attention sees them, and the outputs that keep them."""
    kept = f"new_{kind}.{layer}"
    if context.config.kv_dtype == "activation":
        return new, {kept: new}
    codes, scale = emit_quantized_rows(context, new, kind)
    return emit_dequantized_rows(context, codes, scale, kind), {kept: codes, f"new_{kind}_scale.{layer}": scale}


def _attend(
    context: Context, call: CallValues, layer: int, new: tuple[ir.Value, ir.Value, ir.Value], inputs: State
) -> ir.Value:
    """Attention [B, H, T, dv] of `new` queries, keys and values."""
    past = [inputs[f"past_{kind}.{layer}"] for kind in ("key", "value")]
    scales = [inputs[name] for name in (f"past_{kind}_scale.{layer}" for kind in ("key", "value")) if name in inputs]
    attributes = {CHUNK_SIZE: context.config.chunk_size}
    values = [*new, *past, call.position, *scales]
    return context.builder.op(CHUNK_ATTENTION, *values, name="attended", domain=DOMAIN, **attributes)


def _emit_query_key(context: Context, call: CallValues, prefix: str, z_BTZ: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Rotated queries and keys [B, H, T, dz]: both come from the normalised z, with their own scale and bias."""
    builder, config = context.builder, context.config
    heads, width = config.num_heads, config.key_head_dim
    split = builder.constant([0, 0, 1, heads, width], "z_heads")
    z_BT1Hd = builder.op("Reshape", context.to_float(z_BTZ, "z"), split, name="z_heads")
    z_B1HTd = builder.op("Transpose", z_BT1Hd, perm=[0, 2, 3, 1, 4], name="z")
    epsilon = config.norm_eps
    normal = builder.op("RMSNormalization", z_B1HTd, context.ones(width), axis=-1, epsilon=epsilon, name="z_normal")
    scaled = builder.op("Mul", normal, context.weight(f"{prefix}.query_key.scale"), name="query_key_scaled")
    both_B2HTd = builder.op("Add", scaled, context.weight(f"{prefix}.query_key.bias"), name="query_key")
    joined = builder.op("Reshape", both_B2HTd, builder.constant([0, 2 * heads, -1, width], "query_key_heads"))
    tables = (call.rope_cos, call.rope_sin, call.rows)
    builder.typed(joined, ir.DataType.FLOAT, ("B", 2 * heads, "T", width))
    rotated = builder.op("RotaryEmbedding", joined, *tables, interleaved=1, name="rotated")
    cast = context.to_activation(rotated, "rotated_cast")
    query, key = builder.multi("Split", cast, names=["query", "key"], axis=1, num_outputs=2)
    return query, key


def _emit_ffn(context: Context, prefix: str, hop_BTD: ir.Value, x_BTD: ir.Value) -> ir.Value:
    """x + [alpha *] f fc2^T: the residual is the block's input again."""
    builder, config = context.builder, context.config
    scale = context.norm_scale(f"{prefix}.norm", config.model_dim)
    bias = [context.weight(f"{prefix}.norm.bias")] if config.norm_affine else []
    normal = builder.op("LayerNormalization", hop_BTD, scale, *bias, axis=-1, epsilon=config.norm_eps, name="norm")
    n_BTD = context.to_activation(normal, "norm_cast")
    if config.swiglu:
        both = context.linear(n_BTD, f"{prefix}.fc1_fc3", "fc1_fc3")
        gate, up = builder.multi("Split", both, names=["fc1", "fc3"], axis=-1, num_outputs=2)
        gate = context.with_headroom(context.silu(gate, "hidden_gate"), "hidden_gate")
        hidden = builder.op("Mul", gate, up, name="hidden")
    else:
        hidden = context.with_headroom(context.silu(context.linear(n_BTD, f"{prefix}.fc1", "fc1"), "hidden"), "hidden")
    second = context.to_residual(context.linear(hidden, f"{prefix}.fc2", "fc2"), "fc2")
    if config.rescale_nffn:
        second = builder.op("Mul", second, context.weight(f"{prefix}.alpha"), name="fc2_rescaled")
    return builder.typed(builder.op("Add", x_BTD, second, name="out"), ir.DataType.FLOAT, ("B", "T", config.model_dim))
