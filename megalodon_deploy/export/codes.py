"""Matrices as codes and scales, and back: DequantizeLinear's arithmetic, w = code * scale, always symmetric.

Letters: K inputs and N outputs of a matrix [K, N], G scales along a column, each for K / G weights. A scale is rounded
to the type in which it is stored before a code is chosen. Integer codes use the one code more on the negative side.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megalodon_deploy.export.arrays import on_all_processors
from megalodon_deploy.quantization import WHOLE_COLUMN, WeightFormat, WeightKind

_INTEGERS: dict[WeightKind, tuple[int, int]] = {"int8": (-128, 127), "int4": (-8, 7)}
_LARGEST: dict[WeightKind, float] = {"fp8": 448.0, "nvfp4": 6.0}
_LARGEST_FP8 = 448.0
# e2m1 codes 0..7 and the middles between them; a tie goes to the even code, which only the first, third, ... are
_FP4_VALUES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
_FP4_MIDDLES = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
_CODES: dict[WeightKind, torch.dtype] = {
    "int8": torch.int8,
    "int4": torch.int8,
    "fp8": torch.float8_e4m3fn,
    "nvfp4": torch.uint8,
}
_SLICE_SCALARS = 1 << 18  # of a matrix at a time: its temporaries stay in the caches


@dataclass(frozen=True)
class QuantizedMatrix:
    """`codes` [K, N]: int8 (also of int4), fp8 e4m3, or fp4 as indices of the 16 values in uint8.

    `scales` [G, N] ([N] for whole columns, [K] for whole rows) in the stored type; of nvfp4 e4m3, and then `scale` []
    multiplies them.
    """

    form: WeightFormat
    codes: Tensor
    scales: Tensor
    scale: Tensor | None = None

    def dequantized(self) -> Tensor:
        """[K, N] float32."""
        return decoded(self.codes, self.form.kind).mul_(_expanded(self.full_scales(), self.codes.shape[0]))

    def full_scales(self) -> Tensor:
        """[G, N] float32; [K, 1] for whole rows."""
        if self.form.by_rows:
            return self.scales.float()[:, None]
        scales = self.scales.float() if self.scale is None else self.scales.float() * self.scale.float()
        return scales if scales.ndim == 2 else scales[None]


def quantize_nearest(matrix_KN: Tensor, form: WeightFormat, dtype: torch.dtype) -> QuantizedMatrix:
    """Every weight to the nearest code; `matrix_KN` of any floating-point type, scales of type `dtype`."""
    if form.by_rows:
        columns = quantize_nearest(matrix_KN.t(), WeightFormat(form.kind, WHOLE_COLUMN), dtype)
        return QuantizedMatrix(form, columns.codes.t().contiguous(), columns.scales)
    num_in, num_out = matrix_KN.shape
    stored = choose_scales(matrix_KN, form, dtype)
    full_GN = stored.full_scales()
    codes_KN = torch.empty(num_in, num_out, dtype=_CODES[form.kind])
    block = form.block_size or 1
    rows = max(1, _SLICE_SCALARS // num_out // block) * block

    def encode(start: int) -> None:
        part = matrix_KN[start : start + rows].float().reshape(-1, block, num_out)
        scales = full_GN[start // block : start // block + len(part), None] if form.block_size else full_GN
        codes_KN[start : start + rows] = encoded(part / scales, form.kind).reshape(-1, num_out)

    on_all_processors(encode, range(0, num_in, rows))
    return QuantizedMatrix(form, codes_KN, stored.scales, stored.scale)


def choose_scales(matrix_KN: Tensor, form: WeightFormat, dtype: torch.dtype) -> QuantizedMatrix:
    """The scales of a matrix, without codes: so that the largest weight of a block has the largest code."""
    num_in, num_out = matrix_KN.shape
    blocks = matrix_KN.reshape(form.blocks(num_in), -1, num_out)
    greatest, smallest = blocks.amax(1).float(), blocks.amin(1).float()
    if form.kind in _INTEGERS:
        least, most = _INTEGERS[form.kind]
        wanted = torch.maximum(greatest / most, smallest / least)
    else:
        wanted = torch.maximum(greatest, -smallest) / _LARGEST[form.kind]
    none = torch.empty(0)
    if form.kind == "nvfp4":
        scale = (wanted.max() / _LARGEST_FP8).clamp_min(torch.finfo(dtype).tiny).to(dtype)
        block_scales = (wanted / scale.float()).clamp(2.0**-6, _LARGEST_FP8).to(torch.float8_e4m3fn)
        return QuantizedMatrix(form, none, block_scales, scale)
    scales = wanted.clamp_min(torch.finfo(dtype).tiny).to(dtype)
    return QuantizedMatrix(form, none, scales if form.block_size else scales[0])


def encoded(scaled: Tensor, kind: WeightKind) -> Tensor:
    """Codes of weights that were divided by their scales; may overwrite its argument."""
    if kind in _INTEGERS:
        return scaled.round_().clamp_(*_INTEGERS[kind]).to(torch.int8)
    scaled.clamp_(-_LARGEST[kind], _LARGEST[kind])
    if kind == "fp8":
        return scaled.to(torch.float8_e4m3fn)
    magnitude = torch.bucketize(scaled.abs(), _FP4_MIDDLES).to(torch.uint8)
    return magnitude | (torch.signbit(scaled).to(torch.uint8) << 3)


def decoded(codes: Tensor, kind: WeightKind) -> Tensor:
    """float32 values of codes, before scales."""
    if kind != "nvfp4":
        return codes.float()
    return torch.cat([_FP4_VALUES, -_FP4_VALUES])[codes.int()]


def pack_nibbles(codes: Tensor) -> np.ndarray:
    """Codes of 4 bits, two to a byte, the first in the low half: uint8 [K * N / 2, rounded up]."""
    flat = codes.reshape(-1).view(torch.uint8)
    if flat.numel() % 2:
        flat = torch.cat([flat, flat.new_zeros(1)])
    pairs = flat.view(torch.int16)  # the first code in the low byte
    packed = torch.empty(len(pairs), dtype=torch.uint8)

    def pack(start: int) -> None:
        part = pairs[start : start + _SLICE_SCALARS]
        packed[start : start + _SLICE_SCALARS] = (part & 0xF).bitwise_or_((part >> 4).bitwise_and_(0xF0))

    on_all_processors(pack, range(0, len(pairs), _SLICE_SCALARS))
    array: np.ndarray = packed.numpy()
    return array


def unpack_nibbles(packed: np.ndarray, shape: tuple[int, ...], kind: WeightKind) -> Tensor:
    """The inverse: int8 for int4, uint8 for nvfp4."""
    halves = np.stack([packed & 0xF, packed >> 4], axis=-1).reshape(-1)[: int(np.prod(shape))].reshape(shape)
    if kind == "nvfp4":
        return torch.from_numpy(halves)
    return torch.from_numpy((halves ^ 8).astype(np.int8) - 8)


def _expanded(scales_GN: Tensor, num_rows: int) -> Tensor:
    """A scale for every weight, [K, N]."""
    return scales_GN.repeat_interleave(num_rows // scales_GN.shape[0], 0) if scales_GN.shape[0] > 1 else scales_GN
