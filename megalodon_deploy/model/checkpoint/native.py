"""Our own layout: `config.json` and `model.safetensors`, tensors under their released names.

Where ranks of a training run wrote parts, `config.json` lists the files of the folder `weights` that hold them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast, get_args

import torch
from safetensors.torch import save_file

from megalodon_deploy.bundle import TokenizerKind
from megalodon_deploy.config import MegalodonConfig
from megalodon_deploy.errors import CheckpointError
from megalodon_deploy.model.checkpoint.document import CONFIG_FILE, build_config, read_json, write_json
from megalodon_deploy.model.checkpoint.parts import open_parts
from megalodon_deploy.model.checkpoint.tensor_file import open_tensor_file
from megalodon_deploy.model.checkpoint.types import Checkpoint, LazyTensor, TokenizerSource
from megalodon_deploy.model.checkpoint.validate import check_tensors, read_checked
from megalodon_deploy.parameters import parameter_specs

FORMAT = "megalodon-deploy"
FORMAT_VERSION = 1
WEIGHTS_FILE = "model.safetensors"
PARTS_FOLDER = "weights"


def read_native(path: Path) -> Checkpoint:
    """Open a directory, or a safetensors file with its `config.json` beside it."""
    weights_path = path / WEIGHTS_FILE if path.is_dir() else path
    config_path = weights_path.parent / CONFIG_FILE
    document = read_json(config_path)
    if document.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{config_path}: format version {document.get('format_version')!r}, this release reads {FORMAT_VERSION}"
        )
    if not isinstance(document.get("config"), dict):
        raise CheckpointError(f'{config_path}: has no "config" object')
    config = build_config(config_path, document["config"])
    shapes = {spec.name: spec.shape for spec in parameter_specs(config)}
    if document.get("parts") is None:
        file = open_tensor_file(weights_path)
        check_tensors(weights_path, file.entries, shapes)
        files = [file]
        tensors = {
            name: LazyTensor(shape, file.entries[name].dtype, partial(read_checked, file, name))
            for name, shape in shapes.items()
        }
    else:
        files, tensors = open_parts(_part_paths(config_path, document["parts"]), shapes)
        for file in files:
            known = {name: file.entries[name].shape for name in file.entries.keys() & shapes}
            check_tensors(file.path, file.entries, known)
    tokenizer = _tokenizer(config_path, document.get("tokenizer"))
    return Checkpoint(path, "native", config, tokenizer, tuple(files), tensors)


def _part_paths(config_path: Path, stated: Any) -> list[Path]:
    if not isinstance(stated, list) or not all(isinstance(name, str) and Path(name).name == name for name in stated):
        raise CheckpointError(f"{config_path}: parts is {stated!r}, expected a list of names of files")
    folder = config_path.parent / PARTS_FOLDER
    for name in stated:
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder / name} is missing; {CONFIG_FILE} lists {len(stated)} parts of the weights")
    return [folder / name for name in stated]


def _tokenizer(where: Path, stated: Any) -> TokenizerSource | None:
    if stated is None:
        return None
    if not isinstance(stated, dict) or stated.get("kind") not in get_args(TokenizerKind):
        raise CheckpointError(f"{where}: tokenizer is {stated!r}, expected kind {', '.join(get_args(TokenizerKind))}")
    name, stop_tokens = stated.get("file"), stated.get("stop_tokens", [])
    if not isinstance(stop_tokens, list) or not all(isinstance(token, int) for token in stop_tokens):
        raise CheckpointError(f"{where}: tokenizer.stop_tokens is {stop_tokens!r}, expected a list of integers")
    if (name is None) != (stated["kind"] == "bytes"):
        raise CheckpointError(f"{where}: tokenizer {stated['kind']} with file {name!r}")
    kind = cast(TokenizerKind, stated["kind"])
    if name is None:
        return TokenizerSource(kind, None, tuple(stop_tokens))
    if Path(str(name)).name != name or not (where.parent / name).is_file():
        raise CheckpointError(f"{where}: tokenizer file {name!r} is not in this directory")
    return TokenizerSource(kind, where.parent / name, tuple(stop_tokens))


def write_native(
    directory: Path, config: MegalodonConfig, state: Mapping[str, torch.Tensor], tokenizer: TokenizerSource | None
) -> None:
    """Write `state` (released names, its own types) into `directory`."""
    write_config(directory, config, tokenizer)
    tensors = {spec.name: state[spec.name].detach().cpu().contiguous() for spec in parameter_specs(config)}
    save_tensors(tensors, directory / WEIGHTS_FILE, metadata={"format": FORMAT})


def save_tensors(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file with the rights of any new file: safetensors itself lets nobody else read it."""
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata)
    path.chmod(mode)


def write_config(
    directory: Path, config: MegalodonConfig, tokenizer: TokenizerSource | None, parts: Sequence[str] | None = None
) -> None:
    """Write what describes the weights beside them; `parts` are the files of `PARTS_FOLDER`, where there are any."""
    stated = tokenizer and {
        "kind": tokenizer.kind,
        "file": tokenizer.file.name if tokenizer.file else None,
        "stop_tokens": list(tokenizer.stop_tokens),
    }
    document = {"format": FORMAT, "format_version": FORMAT_VERSION, "config": config.to_dict(), "tokenizer": stated}
    write_json(directory / CONFIG_FILE, document | ({} if parts is None else {"parts": list(parts)}))
