"""Weights from a checkpoint, one fold at a time: a tensor is read, folded and dropped when its bytes are written."""

from __future__ import annotations

import math
from collections.abc import Callable

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch

from megalodon_deploy.errors import CheckpointError
from megalodon_deploy.export.codes import QuantizedMatrix, quantize_nearest
from megalodon_deploy.export.quantized_weights import Part, matrix_parts, part_tensor
from megalodon_deploy.export.weights import Fold, InitializerSpec, folds
from megalodon_deploy.model.checkpoint import Checkpoint
from megalodon_deploy.quantization import WeightFormat

_TORCH_DTYPE = {
    ir.DataType.FLOAT: torch.float32,
    ir.DataType.FLOAT16: torch.float16,
    ir.DataType.BFLOAT16: torch.bfloat16,
}
INLINE_BYTES = 256  # tensors up to this size lie in the graph file, not beside it


Calibrated = Callable[[str, WeightFormat], QuantizedMatrix]  # by the matrix's name, in the order of `folds`


class WeightStream:
    """Lazy initializers of a checkpoint, to be written in the order of `folds`.

    Matrices are quantised to the nearest codes, unless `calibrated` has better ones.
    """

    def __init__(self, checkpoint: Checkpoint, calibrated: Calibrated | None = None) -> None:
        self._checkpoint = checkpoint
        self._calibrated = calibrated
        self._fold_of = {spec.name: fold for fold in folds(checkpoint.config) for spec in fold.targets}
        self._recent: tuple[Fold, tuple[np.ndarray, ...]] | None = None  # of a fold with several targets
        self._matrix: tuple[InitializerSpec, QuantizedMatrix] | None = None  # whose parts are being written
        self._small: dict[str, ir.TensorProtocol] = {}  # parts that go into the graph file, which is written last

    def tensor(self, spec: InitializerSpec, dtype: ir.DataType) -> ir.TensorProtocol:
        """The tensor of `spec`; one that goes into the graph file is read at once."""
        if math.prod(spec.shape) * _TORCH_DTYPE[dtype].itemsize <= INLINE_BYTES:
            return self._load(spec, dtype)
        return ir.LazyTensor(lambda: self._load(spec, dtype), dtype, ir.Shape(spec.shape), name=spec.name)

    def part(self, spec: InitializerSpec, form: WeightFormat, dtype: ir.DataType, part: Part) -> ir.TensorProtocol:
        """A part of the quantised matrix `spec`; the matrix is quantised when its first part is written."""
        return ir.LazyTensor(
            lambda: self._load_part(spec, form, dtype, part), part.dtype, ir.Shape(part.shape), name=part.name
        )

    def _load_part(
        self, spec: InitializerSpec, form: WeightFormat, dtype: ir.DataType, part: Part
    ) -> ir.TensorProtocol:
        if part.name in self._small:
            return self._small[part.name]
        if self._matrix is None or self._matrix[0] != spec:
            self._matrix = None  # before the next one is made
            self._matrix = (spec, self._quantized(spec, form, _TORCH_DTYPE[dtype]))
            parts = matrix_parts(spec.name, spec.shape, form, dtype)
            small = [each for each in parts if each.num_bytes <= INLINE_BYTES]
            self._small |= {each.name: part_tensor(self._matrix[1], each) for each in small}
        return part_tensor(self._matrix[1], part)

    def _quantized(self, spec: InitializerSpec, form: WeightFormat, dtype: torch.dtype) -> QuantizedMatrix:
        if self._calibrated is not None and not form.by_rows:
            return self._calibrated(spec.name, form)
        (matrix_KN,) = self._folded(self._fold_of[spec.name])
        return quantize_nearest(torch.from_numpy(matrix_KN), form, dtype)

    def _load(self, spec: InitializerSpec, dtype: ir.DataType) -> ir.Tensor:
        fold = self._fold_of[spec.name]
        value = self._folded(fold)[fold.targets.index(spec)]
        assert value.shape == spec.shape, f"Bug: {spec.name} has shape {value.shape}, expected {spec.shape}"
        return ir.Tensor(_rounded(value, _TORCH_DTYPE[dtype], fold), dtype, name=spec.name)

    def _folded(self, fold: Fold) -> tuple[np.ndarray, ...]:
        if self._recent is not None and self._recent[0] is fold:
            return self._recent[1]
        sources = [self._checkpoint.tensor(name, torch.float32) for name in fold.sources]
        values = fold.fold(*(tensor.numpy() for tensor in sources))
        for file in self._checkpoint.files:
            file.copied(sum(tensor.nbytes for tensor in sources) // len(self._checkpoint.files))
        self._recent = (fold, values) if len(fold.targets) > 1 else None
        return values


def _rounded(value: np.ndarray, dtype: torch.dtype, fold: Fold) -> np.ndarray:
    """The value in `dtype`; PyTorch rounds to half precision many times faster than NumPy."""
    rounded = torch.from_numpy(np.ascontiguousarray(value)).to(dtype)
    if dtype != torch.float32 and not all(bool(torch.isfinite(extreme)) for extreme in torch.aminmax(rounded)):
        raise CheckpointError(
            f"{', '.join(fold.sources)}: largest value {np.abs(value).max():.3g} is beyond {dtype}; "
            "export in bf16 or fp32"
        )
    if dtype == torch.bfloat16:  # NumPy has it from ml_dtypes only
        return rounded.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return rounded.numpy()
