"""Key and value rows in 8 bits as ONNX nodes: the arithmetic of `megalodon_deploy.model.quantized_rows`.

QuantizeLinear and DequantizeLinear with scale 1 convert between float and the 8-bit type; a row's own scale multiplies.
Letters as in `MegalodonConfig`; w: width of a row of one head.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir

from megalodon_deploy.config import KeyValueType
from megalodon_deploy.export.context import Context
from megalodon_deploy.state import QUANTIZED_ROW_MAX, SMALLEST_ROW_SCALE

_CODES: dict[KeyValueType, np.dtype] = {"fp8": np.dtype(ml_dtypes.float8_e4m3fn), "int8": np.dtype(np.int8)}


def emit_quantized_rows(context: Context, rows: ir.Value, name: str) -> tuple[ir.Value, ir.Value]:
    """Rows [B, H, T, w] of the activation type -> codes [B, H, T, w] and float32 scales [B, H, T]."""
    builder, kind = context.builder, context.config.kv_dtype
    last = builder.constant([-1], "last_axis")
    wide = context.to_float(rows, name)
    magnitude = builder.op("Abs", wide, name=f"{name}_magnitude")
    largest = builder.op("ReduceMax", magnitude, last, keepdims=1, name=f"{name}_largest")
    most = builder.scalar(QUANTIZED_ROW_MAX[kind], np.float32, "largest_code")
    smallest = builder.scalar(SMALLEST_ROW_SCALE, np.float32, "smallest_row_scale")
    scale = builder.op("Max", builder.op("Div", largest, most), smallest, name=f"{name}_row_scale")
    scaled = builder.op("Div", wide, scale, name=f"{name}_scaled")
    codes = builder.op("QuantizeLinear", scaled, *_unit(context), name=f"{name}_codes")
    return codes, builder.op("Squeeze", scale, last, name=f"{name}_scale")


def emit_dequantized_rows(context: Context, codes: ir.Value, scale: ir.Value, name: str) -> ir.Value:
    """Codes [B, H, rows, w] and scales [B, H, rows] -> rows of the activation type, as attention sees them."""
    builder = context.builder
    wide = builder.op("DequantizeLinear", codes, *_unit(context), name=f"{name}_wide")
    column = builder.op("Unsqueeze", scale, builder.constant([-1], "last_axis"), name=f"{name}_scale_column")
    return context.to_activation(builder.op("Mul", wide, column, name=f"{name}_seen"), f"{name}_seen_cast")


def _unit(context: Context) -> tuple[ir.Value, ir.Value]:
    """Scale 1, and the zero point that says the type of the codes."""
    zero = np.zeros((), _CODES[context.config.kv_dtype])
    one = context.builder.scalar(1, np.float32, "unit_scale")
    return one, context.builder.constant(zero, "zero_code")
