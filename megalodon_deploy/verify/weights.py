"""Which weights the reference computes with, and what that proves."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from megalodon_deploy.bundle import Bundle, Precision
from megalodon_deploy.errors import CheckpointError
from megalodon_deploy.export import load_bundle_model
from megalodon_deploy.export.weights import folds
from megalodon_deploy.model.checkpoint import build_model, read_checkpoint
from megalodon_deploy.model.megalodon import Megalodon

_DTYPES: dict[Precision, torch.dtype] = {"fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class WeightSource:
    """Where the reference's weights came from."""

    weights: str
    checks_mapping: bool  # whether the weights' way into the bundle is compared, too
    note: str = ""  # what a reader of the report should know


def load_reference(bundle: Bundle, ckpt: str | Path | None) -> tuple[Megalodon, WeightSource]:
    """A float32 model with the checkpoint's weights when there is one, else with the bundle's own.

    Raises `CheckpointError` when the checkpoint's configuration is not the bundle's.
    """
    if ckpt is None:
        note = "weights read back from the bundle: how they came there was not checked, --ckpt does"
        return load_bundle_model(bundle), WeightSource(str(bundle.path), False, note)
    checkpoint = read_checkpoint(ckpt)
    if replace(checkpoint.config, kv_dtype=bundle.config.kv_dtype) != bundle.config:
        raise CheckpointError(
            f"{ckpt}: its configuration is not that of {bundle.path} "
            f"({_difference(checkpoint.config.to_dict(), bundle.config.to_dict())}); name the checkpoint it was made of"
        )
    model = build_model(replace(checkpoint, config=bundle.config))
    if bundle.manifest.precision != "fp32":
        _round_weights(model, bundle.manifest.precision)
    same = checkpoint.fingerprint == bundle.manifest.source.get("fingerprint")
    note = "" if same else f"{ckpt} is not the file that the bundle was exported from"
    return model, WeightSource(str(ckpt), True, note)


def _round_weights(model: Megalodon, precision: Precision) -> None:
    """Round what the graph holds in the activation type; norms, CEMA and the like stay float32."""
    parameters = dict(model.named_parameters())
    for fold in folds(model.config):
        if not fold.targets[0].is_activation:
            continue
        for name in fold.sources:
            parameters[name].data = parameters[name].data.to(_DTYPES[precision]).float()


def _difference(checkpoint: dict[str, object], bundle: dict[str, object]) -> str:
    name = next(name for name in bundle if bundle[name] != checkpoint[name])
    return f"{name} is {checkpoint[name]}, the bundle has {bundle[name]}"
