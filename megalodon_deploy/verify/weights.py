"""Which weights the reference computes with, and what that proves."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from megalodon_deploy.bundle import Bundle, Precision
from megalodon_deploy.errors import CheckpointError
from megalodon_deploy.export import load_bundle_model
from megalodon_deploy.export.codes import quantize_nearest
from megalodon_deploy.export.weights import folds
from megalodon_deploy.model.checkpoint import build_model, read_checkpoint
from megalodon_deploy.model.megalodon import Megalodon

_DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class WeightSource:
    """Where the reference's weights came from."""

    weights: str
    checks_mapping: bool  # whether the weights' way into the bundle is compared, too
    note: str = ""  # what a reader of the report should know


def load_reference(bundle: Bundle, ckpt: str | Path | None) -> tuple[Megalodon, WeightSource]:
    """A float32 model with the checkpoint's weights when there is one, else with the bundle's own.

    Raises `CheckpointError` when the checkpoint's configuration is not the bundle's, `ConfigError` for a variant that
    is never exported.
    """
    if ckpt is None:
        note = "weights read back from the bundle: how they came there was not checked, --ckpt does"
        return load_bundle_model(bundle), WeightSource(str(bundle.path), False, note)
    checkpoint = read_checkpoint(ckpt)
    config = replace(checkpoint.config.released(), kv_dtype=bundle.config.kv_dtype)  # as export does
    if config != bundle.config:
        raise CheckpointError(
            f"{ckpt}: its configuration is not that of {bundle.path} "
            f"({_difference(config.to_dict(), bundle.config.to_dict())}); name the checkpoint it was made of"
        )
    model = build_model(replace(checkpoint, config=bundle.config))
    _round_weights(model, bundle)
    notes = []
    if checkpoint.fingerprint != bundle.manifest.source.get("fingerprint"):
        notes.append(f"{ckpt} is not the file that the bundle was exported from")
    if _is_calibrated(bundle):
        notes.append("matrices were calibrated: they are read back from the bundle")
    return model, WeightSource(str(ckpt), True, "; ".join(notes))


def _is_calibrated(bundle: Bundle) -> bool:
    quantization = bundle.manifest.quantization
    return quantization is not None and quantization.method != "nearest"


def _round_weights(model: Megalodon, bundle: Bundle) -> None:
    """Round and quantise what the graph does not hold in float32; norms, CEMA and the like stay as they are."""
    parameters = dict(model.named_parameters())
    quantization, dtype = bundle.manifest.quantization, _DTYPES[bundle.manifest.precision]
    stored = dict(load_bundle_model(bundle).named_parameters()) if _is_calibrated(bundle) else None
    for fold in folds(model.config):
        target = fold.targets[0]
        form = quantization.format_of(target.name) if quantization else None
        given = [parameters[name].detach() for name in fold.sources]
        if form is None:
            rounded = [value.to(dtype).float() if target.is_activation else value for value in given]
        elif stored is not None:
            rounded = [stored[name].detach() for name in fold.sources]
        else:
            (matrix_KN,) = fold.fold(*(value.numpy() for value in given))
            codes = quantize_nearest(torch.from_numpy(matrix_KN), form, dtype)
            rounded = [torch.from_numpy(value) for value in fold.unfold(codes.dequantized().numpy())]
        for name, value in zip(fold.sources, rounded, strict=True):
            parameters[name].data = value


def _difference(checkpoint: dict[str, object], bundle: dict[str, object]) -> str:
    name = next(name for name in bundle if bundle[name] != checkpoint[name])
    return f"{name} is {checkpoint[name]}, the bundle has {bundle[name]}"
