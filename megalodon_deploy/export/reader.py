"""The PyTorch model of a bundle: initializers unfolded to released tensors."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import torch

from megalodon_deploy.bundle import Bundle
from megalodon_deploy.errors import BundleError
from megalodon_deploy.export.weights import InitializerSpec, folds
from megalodon_deploy.model.megalodon import Megalodon


def read_model(bundle: Bundle) -> Megalodon:
    """See `load_bundle_model`."""
    initializers = ir.load(bundle.model_path).graph.initializers
    state: dict[str, torch.Tensor] = {}
    for fold in folds(bundle.config):
        values = fold.unfold(*(_read(bundle, initializers.get(spec.name), spec) for spec in fold.targets))
        for name, value in zip(fold.sources, values, strict=True):
            state[name] = torch.from_numpy(np.array(value, np.float32))
    with torch.device("meta"):
        model = Megalodon(bundle.config)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    model.load_state_dict({name: value.reshape(shapes[name]) for name, value in state.items()}, assign=True)
    return model.eval()


def _read(bundle: Bundle, value: ir.Value | None, spec: InitializerSpec) -> np.ndarray:
    tensor = value.const_value if value is not None else None
    found = tuple(tensor.shape.numpy()) if tensor is not None else None
    if tensor is None or found != spec.shape:
        raise BundleError(
            f"{bundle.model_path}: weight {spec.name} has shape {found}, expected {spec.shape}; "
            "export the checkpoint again"
        )
    values: np.ndarray = tensor.numpy().astype(np.float32)
    if isinstance(tensor, ir.ExternalTensor):
        tensor.release()  # its mapping of the file, whose pages would count beside the copy
    return values
