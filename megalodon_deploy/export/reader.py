"""The PyTorch model of a bundle: initializers unfolded to released tensors."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
import torch

from megalodon_deploy.bundle import Bundle
from megalodon_deploy.errors import BundleError
from megalodon_deploy.export.graph import ACTIVATION
from megalodon_deploy.export.quantized_weights import matrix_parts, read_matrix
from megalodon_deploy.export.weights import InitializerSpec, folds
from megalodon_deploy.model.megalodon import Megalodon
from megalodon_deploy.quantization import WeightFormat


def read_model(bundle: Bundle) -> Megalodon:
    """See `load_bundle_model`."""
    initializers = ir.load(bundle.model_path).graph.initializers
    quantization = bundle.manifest.quantization
    state: dict[str, torch.Tensor] = {}
    for fold in folds(bundle.config):
        forms = [quantization.format_of(spec.name) if quantization else None for spec in fold.targets]
        read = [
            _read(bundle, initializers.get(spec.name), spec.name, spec.shape)
            if form is None
            else _read_quantized(bundle, initializers, spec, form)
            for spec, form in zip(fold.targets, forms, strict=True)
        ]
        values = fold.unfold(*read)
        for name, value in zip(fold.sources, values, strict=True):
            state[name] = torch.from_numpy(np.array(value, np.float32))
    with torch.device("meta"):
        model = Megalodon(bundle.config)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    model.load_state_dict({name: value.reshape(shapes[name]) for name, value in state.items()}, assign=True)
    return model.eval()


def _read(bundle: Bundle, value: ir.Value | None, name: str, shape: tuple[int, ...]) -> np.ndarray:
    tensor = _tensor(bundle, value, name, shape)
    values: np.ndarray = tensor.numpy().astype(np.float32)
    _release(tensor)
    return values


def _read_quantized(
    bundle: Bundle, initializers: Mapping[str, ir.Value], spec: InitializerSpec, form: WeightFormat
) -> np.ndarray:
    parts = matrix_parts(spec.name, spec.shape, form, ACTIVATION[bundle.manifest.precision])
    tensors = {part.name: _tensor(bundle, initializers.get(part.name), part.name, part.shape) for part in parts}
    matrix = read_matrix(tensors, parts, form).dequantized().numpy()
    for tensor in tensors.values():
        _release(tensor)
    return matrix


def _tensor(bundle: Bundle, value: ir.Value | None, name: str, shape: tuple[int, ...]) -> ir.TensorProtocol:
    tensor = value.const_value if value is not None else None
    found = tuple(tensor.shape.numpy()) if tensor is not None else None
    if tensor is None or found != shape:
        raise BundleError(
            f"{bundle.model_path}: weight {name} has shape {found}, expected {shape}; export the checkpoint again"
        )
    return tensor


def _release(tensor: ir.TensorProtocol) -> None:
    if isinstance(tensor, ir.ExternalTensor):
        tensor.release()  # its mapping of the file, whose pages would count beside the copy
