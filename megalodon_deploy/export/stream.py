"""Weights from a checkpoint, one fold at a time: a tensor is read, folded and dropped when its bytes are written."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import torch

from megalodon_deploy.errors import CheckpointError
from megalodon_deploy.export.arrays import as_numpy, as_torch
from megalodon_deploy.export.codes import QuantizedMatrix, quantize_nearest
from megalodon_deploy.export.quantized_weights import Part, part_tensor
from megalodon_deploy.export.weights import Fold, InitializerSpec, folds
from megalodon_deploy.model.checkpoint import Checkpoint
from megalodon_deploy.quantization import WeightFormat

_TORCH_DTYPE = {
    ir.DataType.FLOAT: torch.float32,
    ir.DataType.FLOAT16: torch.float16,
    ir.DataType.BFLOAT16: torch.bfloat16,
}


Calibrated = Callable[[str, WeightFormat], QuantizedMatrix]  # by the matrix's name, in the order of `folds`


class WeightStream:
    """Lazy initializers of a checkpoint, to be made in the order of `folds`, each once.

    Matrices are quantised to the nearest codes, unless `calibrated` has better ones. What only moves is moved in the
    type that it has in the end, or is quantised from.
    """

    def __init__(self, checkpoint: Checkpoint, calibrated: Calibrated | None = None) -> None:
        self._checkpoint = checkpoint
        self._calibrated = calibrated
        self._fold_of = {spec.name: fold for fold in folds(checkpoint.config) for spec in fold.targets}
        self._recent: tuple[Fold, tuple[np.ndarray, ...]] | None = None  # of a fold with several targets
        self._matrix: tuple[InitializerSpec, QuantizedMatrix] | None = None  # whose parts are being written

    def tensor(self, spec: InitializerSpec, dtype: ir.DataType) -> ir.LazyTensor:
        """The tensor of `spec`."""
        return ir.LazyTensor(lambda: self._load(spec, dtype), dtype, ir.Shape(spec.shape), name=spec.name)

    def part(self, spec: InitializerSpec, form: WeightFormat, dtype: ir.DataType, part: Part) -> ir.LazyTensor:
        """A part of the quantised matrix `spec`; the matrix is quantised when its first part is written."""
        return ir.LazyTensor(
            lambda: self._load_part(spec, form, dtype, part), part.dtype, ir.Shape(part.shape), name=part.name
        )

    def _load(self, spec: InitializerSpec, dtype: ir.DataType) -> ir.Tensor:
        fold = self._fold_of[spec.name]
        value = self._folded(fold, _TORCH_DTYPE[dtype])[fold.targets.index(spec)]
        assert value.shape == spec.shape, f"Bug: {spec.name} has shape {value.shape}, expected {spec.shape}"
        return ir.Tensor(value, dtype, name=spec.name)

    def _load_part(
        self, spec: InitializerSpec, form: WeightFormat, dtype: ir.DataType, part: Part
    ) -> ir.TensorProtocol:
        if self._matrix is None or self._matrix[0] != spec:
            self._matrix = None  # before the next one is made
            self._matrix = (spec, self._quantized(spec, form, _TORCH_DTYPE[dtype]))
        return part_tensor(self._matrix[1], part)

    def _quantized(self, spec: InitializerSpec, form: WeightFormat, dtype: torch.dtype) -> QuantizedMatrix:
        if self._calibrated is not None and not form.by_rows:
            return self._calibrated(spec.name, form)
        fold = self._fold_of[spec.name]
        stored = {self._checkpoint.tensors[name].dtype for name in fold.sources}
        is_half = stored in ({torch.bfloat16}, {torch.float16})
        (matrix_KN,) = self._folded(fold, stored.pop() if is_half else torch.float32)
        return quantize_nearest(as_torch(matrix_KN), form, dtype)

    def _folded(self, fold: Fold, dtype: torch.dtype) -> tuple[np.ndarray, ...]:
        """All targets of a fold, of type `dtype`; those that are computed are float32 always."""
        if self._recent is not None and self._recent[0] is fold:
            return self._recent[1]
        assert fold.only_moves or dtype == torch.float32, f"Bug: {fold.targets[0].name} is computed in {dtype}"
        sources = [self._read(name, dtype) for name in fold.sources]
        values = fold.fold(*(as_numpy(tensor) for tensor in sources))
        for file in self._checkpoint.files:
            file.copied(sum(tensor.nbytes for tensor in sources) // len(self._checkpoint.files))
        self._recent = (fold, values) if len(fold.targets) > 1 else None
        return values

    def _read(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        tensor = self._checkpoint.tensor(name, dtype)
        if dtype == torch.float32 or dtype == self._checkpoint.tensors[name].dtype:
            return tensor
        if not all(bool(torch.isfinite(extreme)) for extreme in torch.aminmax(tensor)):
            largest = self._checkpoint.tensor(name).abs().max().item()
            raise CheckpointError(f"{name}: largest value {largest:.3g} is beyond {dtype}; export in bf16 or fp32")
        return tensor
