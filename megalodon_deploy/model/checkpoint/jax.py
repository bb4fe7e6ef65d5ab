"""The safetensors file of megalodon-jax, format versions 2 and 3: configuration and conventions are in its metadata.

The two versions differ in one setting of the training loss.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from megalodon_deploy.config import MegalodonConfig
from megalodon_deploy.errors import CheckpointError
from megalodon_deploy.model.checkpoint.document import build_config, model_settings
from megalodon_deploy.model.checkpoint.recipes import lazy_tensor, shared_recipe
from megalodon_deploy.model.checkpoint.tensor_file import TensorFile
from megalodon_deploy.model.checkpoint.tokenizer import find_tokenizer
from megalodon_deploy.model.checkpoint.types import Checkpoint, TokenizerSource
from megalodon_deploy.model.checkpoint.validate import check_tensors
from megalodon_deploy.parameters import parameter_specs

FORMAT = "megalodon-jax"
_VERSIONS = ("2", "3")
_CONVENTIONS = {"rope_layout": "adjacent_pair", "normalization_storage": "plus_one", "bias_schema": "upstream"}
_INERT = {
    "dropout",
    "attention_dropout",
    "attention_dropout_mode",
    "hidden_dropout",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "init_mode",
    "use_checkpoint",
    "use_associative_segment_scan",
    "param_dtype",
    "compute_dtype",
    "accum_dtype",
    "attention_softmax_dtype",
    "loss_softmax_dtype",
}


def read_jax(path: Path, file: TensorFile) -> Checkpoint:
    """Open the checkpoint whose one weight file is `file`."""
    _check_metadata(file)
    stated = _stated_config(file)
    if stated.get("attention_window") is not None:
        raise CheckpointError(
            f"{file.path}: attention_window = {stated['attention_window']} is sliding attention; "
            "only attention within chunks (null) is supported"
        )
    config = build_config(file.path, model_settings(file.path, stated, _INERT))
    recipes = {spec: shared_recipe(spec) for spec in parameter_specs(config)}
    expected = {name: shape for recipe in recipes.values() for name, shape in recipe.parts.items()}
    check_tensors(file.path, file.entries, expected)
    files = dict.fromkeys(file.entries, file)
    tensors = {spec.name: lazy_tensor(spec, recipe, files) for spec, recipe in recipes.items()}
    return Checkpoint(path, "megalodon-jax", config, _tokenizer(file, config, stated), (file,), tensors)


def _check_metadata(file: TensorFile) -> None:
    version = file.metadata.get("format_version")
    if file.metadata.get("format") != FORMAT or version not in _VERSIONS:
        raise CheckpointError(
            f"{file.path}: is {file.metadata.get('format')} format version {version}, "
            f"expected a {FORMAT} model of version {' or '.join(_VERSIONS)}"
        )
    for key, expected in _CONVENTIONS.items():
        if file.metadata.get(key) != expected:
            raise CheckpointError(f"{file.path}: {key} is {file.metadata.get(key)!r}, expected {expected!r}")


def _stated_config(file: TensorFile) -> dict[str, object]:
    try:
        stated = json.loads(file.metadata["config_json"])
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{file.path}: its metadata has no readable config_json ({error})") from error
    if not isinstance(stated, dict):
        raise CheckpointError(f"{file.path}: its config_json is not an object")
    return stated


def _tokenizer(file: TensorFile, config: MegalodonConfig, stated: Mapping[str, object]) -> TokenizerSource | None:
    eos = stated.get("eos_token_id")
    stop_tokens = (eos,) if isinstance(eos, int) else ()
    return find_tokenizer(file.path.parent, vocab_size=config.vocab_size, stop_tokens=stop_tokens)
