"""From a checkpoint to a model, and back."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Literal

import torch

from megalodon_deploy.errors import CheckpointError
from megalodon_deploy.files import atomic_directory
from megalodon_deploy.model.checkpoint.document import CONFIG_FILE
from megalodon_deploy.model.checkpoint.native import write_native
from megalodon_deploy.model.checkpoint.recognise import read_checkpoint
from megalodon_deploy.model.checkpoint.released_writer import write_released
from megalodon_deploy.model.checkpoint.types import Checkpoint, TokenizerSource
from megalodon_deploy.model.megalodon import Megalodon


def load_checkpoint(path: str | Path) -> Megalodon:
    """Load any supported layout into a model in evaluation mode, float32.

    float32 weights of one file stay memory-mapped: they are read when first used, and a change of the model never
    reaches the file. Raises `CheckpointError` as `read_checkpoint` does, and for values that are not finite.
    """
    return build_model(read_checkpoint(path))


def build_model(checkpoint: Checkpoint) -> Megalodon:
    """The model of an opened checkpoint. No weight exists before it is read, so nothing is held twice."""
    with torch.device("meta"):
        model = Megalodon(checkpoint.config)
    state = {name: checkpoint.tensor(name, torch.float32) for name in checkpoint.tensors}
    model.load_state_dict(state, assign=True)
    return model.eval()


def save_checkpoint(
    model: Megalodon,
    path: str | Path,
    layout: Literal["native", "released"] = "native",
    *,
    shards: int = 1,
    tokenizer: TokenizerSource | None = None,
    overwrite: bool = False,
) -> None:
    """Write a checkpoint directory, whole or not at all, with the model's own types.

    `shards` splits the released layout over so many model-parallel files. Raises `CheckpointError` when `path` exists
    and `overwrite` is false or it is no checkpoint, or when the model does not split.
    """
    target = Path(path)
    if layout not in ("native", "released"):
        raise CheckpointError(f"layout {layout!r} cannot be written; there are: native, released")
    if shards != 1 and layout == "native":
        raise CheckpointError(f"shards = {shards}: the native layout is one file; use layout='released'")
    if shards < 1:
        raise CheckpointError(f"shards = {shards}; expected 1 or more")
    if tokenizer and tokenizer.file and not tokenizer.file.is_file():
        raise CheckpointError(f"{tokenizer.file} does not exist; it is to be saved as the model's tokenizer")
    if target.exists() and not overwrite:
        raise CheckpointError(f"{target} exists already; choose another path or overwrite it")
    if target.exists() and not (target / CONFIG_FILE).is_file():
        raise CheckpointError(f"{target} is no checkpoint, so it is not overwritten; choose another path")
    state = model.state_dict()
    with atomic_directory(target, overwrite=overwrite) as directory:
        if layout == "native":
            write_native(directory, model.config, state, tokenizer)
        else:
            write_released(directory, model.config.released(), state, tokenizer, shards)
        if tokenizer and tokenizer.file:
            shutil.copyfile(tokenizer.file, directory / tokenizer.file.name)
