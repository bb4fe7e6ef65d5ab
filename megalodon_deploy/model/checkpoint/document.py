"""JSON documents of a checkpoint directory."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from megalodon_deploy.config import MegalodonConfig
from megalodon_deploy.errors import CheckpointError, ConfigError

CONFIG_FILE = "config.json"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; raises `CheckpointError` when the file is absent or is something else."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error
    except ValueError as error:  # JSON and UTF-8 alike
        raise CheckpointError(f"{path}: not JSON ({error})") from error
    if not isinstance(document, dict):
        raise CheckpointError(f"{path}: holds a {type(document).__name__}, expected a JSON object")
    return document


def read_json_if_present(path: Path) -> dict[str, Any] | None:
    return read_json(path) if path.is_file() else None


def model_settings(where: Path, stated: Mapping[str, Any], inert: Collection[str]) -> dict[str, Any]:
    """The settings of `stated` that shape the function, without those that are null.

    `inert` ones (of training, of kernels) are dropped. Raises `CheckpointError` for an unknown one that is switched
    on, and for an output of another size than the vocabulary.
    """
    values = {key: value for key, value in stated.items() if key not in inert and value is not None}
    output_size = values.pop("output_size", -1)
    if output_size not in (-1, values.get("vocab_size", output_size)):
        raise CheckpointError(
            f"{where}: output_size is {output_size}, expected -1 or vocab_size = {values['vocab_size']}"
        )
    known = set(MegalodonConfig.__dataclass_fields__)
    if unknown := [key for key in values if key not in known and values[key] is not False]:
        raise CheckpointError(
            f"{where}: setting {unknown[0]} = {values[unknown[0]]!r} is not known here; "
            "the model may not compute what its weights mean"
        )
    return {key: values[key] for key in values if key in known}


def build_config(where: Path, values: Mapping[str, Any]) -> MegalodonConfig:
    """A configuration whose mistakes are reported with the file they came from."""
    try:
        return MegalodonConfig.from_dict(values)
    except ConfigError as error:
        raise CheckpointError(f"{where}: {error}") from error


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
