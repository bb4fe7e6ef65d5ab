"""Key and value rows in 8 bits: what a stream keeps when `MegalodonConfig.kv_dtype` is fp8 or int8.

Each row of each head has one float32 scale, its largest magnitude over the largest code. Attention sees the rows as
they are kept, within the call that makes them too: the same tokens give the same logits however they are split.
Shapes: B rows of the batch, H heads, T tokens, w width of a head.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from megalodon_deploy.config import KeyValueType
from megalodon_deploy.state import QUANTIZED_ROW_MAX, SMALLEST_ROW_SCALE


class QuantizedRows(NamedTuple):
    """Codes [B, H, T, w] of fp8 e4m3 or int8, and scales [B, H, T] float32 (float64 of float64 rows)."""

    codes: Tensor
    scale: Tensor


def quantize_rows(x_BHTw: Tensor, kind: KeyValueType) -> QuantizedRows:
    """x / scale to the nearest code, halves to even; a row of zeros has the smallest scale."""
    largest = QUANTIZED_ROW_MAX[kind]
    wide = x_BHTw.to(torch.promote_types(x_BHTw.dtype, torch.float32))
    scale_BHT1 = (wide.abs().amax(-1, keepdim=True) / largest).clamp_min(SMALLEST_ROW_SCALE)
    scaled = (wide / scale_BHT1).clamp(-largest, largest)
    codes = scaled.float().to(torch.float8_e4m3fn) if kind == "fp8" else scaled.round().to(torch.int8)
    return QuantizedRows(codes, scale_BHT1.squeeze(-1))


def dequantize_rows(rows: QuantizedRows, dtype: torch.dtype) -> Tensor:
    """The rows [B, H, T, w] that attention sees, rounded to the activation type."""
    return (rows.codes.to(rows.scale.dtype) * rows.scale.unsqueeze(-1)).to(dtype)
