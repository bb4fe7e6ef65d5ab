"""Quantised matrices in the graph: the initializers of their parts, and the DequantizeLinear nodes behind them.

| part | shape | type |
| --- | --- | --- |
| `NAME.codes` | [K, N] | int8, int4, fp8 e4m3 or fp4 e2m1 |
| `NAME.scales` | [K / block, N], [N] for whole columns, or [K] for whole rows | activation; of nvfp4 fp8 e4m3 |
| `NAME.scale`, nvfp4 only | [] | activation |

Blocks lie along the axis that MatMul sums over: so ONNX Runtime fuses int8 and int4 to MatMulNBits, and TensorRT takes
the same nodes. Zero points are absent: TensorRT has none for these types.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from megalodon_deploy.export.arrays import as_numpy, as_torch
from megalodon_deploy.export.builder import GraphBuilder
from megalodon_deploy.export.codes import QuantizedMatrix, pack_nibbles, unpack_nibbles
from megalodon_deploy.quantization import WeightFormat

CODE_TYPES = {
    "int8": ir.DataType.INT8,
    "int4": ir.DataType.INT4,
    "fp8": ir.DataType.FLOAT8E4M3FN,
    "nvfp4": ir.DataType.FLOAT4E2M1,
}
_FOUR_BITS = ("int4", "nvfp4")


@dataclass(frozen=True)
class Part:
    """One initializer of a quantised matrix."""

    name: str
    shape: tuple[int, ...]
    dtype: ir.DataType

    @property
    def num_bytes(self) -> int:
        return -(-math.prod(self.shape) * int(self.dtype.bitwidth) // 8)


def matrix_parts(name: str, shape: tuple[int, ...], form: WeightFormat, activation: ir.DataType) -> list[Part]:
    """The initializers of the matrix `name` [K, N], in the order of DequantizeLinear's inputs."""
    num_in, num_out = shape
    scales = (form.blocks(num_in), num_out) if form.block_size else (num_in if form.by_rows else num_out,)
    is_nvfp4 = form.kind == "nvfp4"
    parts = [
        Part(f"{name}.codes", shape, CODE_TYPES[form.kind]),
        Part(f"{name}.scales", scales, ir.DataType.FLOAT8E4M3FN if is_nvfp4 else activation),
    ]
    return [*parts, Part(f"{name}.scale", (), activation)] if is_nvfp4 else parts


def part_tensor(matrix: QuantizedMatrix, part: Part) -> ir.TensorProtocol:
    """The content of one part."""
    if part.name.endswith(".codes"):
        if matrix.form.kind in _FOUR_BITS:
            return ir.PackedTensor(pack_nibbles(matrix.codes), part.dtype, shape=ir.Shape(part.shape), name=part.name)
        return ir.Tensor(as_numpy(matrix.codes), part.dtype, name=part.name)
    values = matrix.scale if part.name.endswith(".scale") else matrix.scales
    assert values is not None, f"Bug: {part.name} has no value"
    return ir.Tensor(as_numpy(values), part.dtype, name=part.name)


def read_matrix(tensors: Mapping[str, ir.TensorProtocol], parts: list[Part], form: WeightFormat) -> QuantizedMatrix:
    """The matrix of these parts; `tensors` by part name."""
    codes, scales, *scale = (tensors[part.name] for part in parts)
    if form.kind in _FOUR_BITS:
        read = unpack_nibbles(np.frombuffer(codes.tobytes(), np.uint8), parts[0].shape, form.kind)
    else:
        read = _read(codes)
    return QuantizedMatrix(form, read, _read(scales), _read(scale[0]) if scale else None)


def emit_matrix(builder: GraphBuilder, parts: list[ir.Value], form: WeightFormat, name: str) -> ir.Value:
    """The matrix [K, N] of the activation type."""
    codes, scales, *scale = parts
    if scale:
        scales = builder.op("DequantizeLinear", scales, *scale, name=f"{name}_scales")
    attributes: dict[str, Any] = {"axis": 0, "block_size": form.block_size} if form.block_size else {"axis": 1}
    return builder.op("DequantizeLinear", codes, scales, name=f"{name}_weight", **attributes)


def emit_rows(builder: GraphBuilder, parts: list[ir.Value], tokens_BT: ir.Value, name: str) -> ir.Value:
    """Rows [B, T, N] float32 of a matrix that is quantised by rows.

    Scale 1 converts the codes, for ONNX Runtime dequantises the whole matrix where DequantizeLinear comes first.
    """
    codes_KN, scales_K = parts
    unit = builder.scalar(1, np.float32, "unit_scale")
    codes_BTN = builder.op("Gather", codes_KN, tokens_BT, axis=0, name=f"{name}_rows")
    wide = builder.op("DequantizeLinear", codes_BTN, unit, name=f"{name}_rows_wide")
    scales_BT = builder.op("Gather", scales_K, tokens_BT, axis=0, name=f"{name}_rows_scale")
    scales = builder.op("Cast", scales_BT, to=ir.DataType.FLOAT, name=f"{name}_rows_scale_float")
    column = builder.op("Unsqueeze", scales, builder.constant([-1], "last_axis"), name=f"{name}_rows_scale_column")
    return builder.op("Mul", wide, column, name=name)


def _read(tensor: ir.TensorProtocol) -> torch.Tensor:
    return as_torch(np.array(tensor.numpy()))  # a copy: a tensor of the file may not be written to
