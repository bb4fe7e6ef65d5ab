"""Reads the released layout: `config.json`, `consolidate_config.json` and one file per model-parallel rank.

Dimensions come from `config.json` where it states them (every tensor is then checked against it) and from the tensors'
shapes where it does not; switches that no shape shows have the defaults of the released code.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megalodon_deploy.config import MegalodonConfig
from megalodon_deploy.errors import CheckpointError
from megalodon_deploy.model.checkpoint.document import CONFIG_FILE, build_config, model_settings, read_json
from megalodon_deploy.model.checkpoint.shards import (
    EMBEDDING,
    OUTPUT,
    ROPE_FREQS,
    buffer_shapes,
    check_divisible,
    rope_freqs,
    shard_shape,
    weight_paths,
)
from megalodon_deploy.model.checkpoint.tensor_file import TensorFile, open_tensor_file
from megalodon_deploy.model.checkpoint.tokenizer import find_tokenizer
from megalodon_deploy.model.checkpoint.types import Checkpoint, LazyTensor
from megalodon_deploy.model.checkpoint.validate import PRIOR_COUNT, check_tensors, read_checked
from megalodon_deploy.parameters import ParameterSpec, parameter_specs, timestep_norm_prefixes

_LAYER = re.compile(r"layers\.(\d+)\.")
_FREQS_TOLERANCE = 1e-5  # relative; float32 powers are this far off, another base is much further

# What the released code takes when config.json does not say; dimensions that the tensors show are not here.
_DEFAULTS: dict[str, Any] = {
    "chunk_size": 2048,
    "norm_eps": 1e-5,
    "norm_affine": True,
    "rope_base": 10000.0,
    "swiglu": False,
    "rescale_nffn": False,
    "scale_emb": False,
    "share_emb": False,
}
# Settings of training and of kernels: the function of a loaded model is the same whatever they say.
_INERT = {
    "efficient_attn",
    "init_mode",
    "dropout",
    "hidden_dropout",
    "attention_dropout",
    "layerwise_ckpt",
    "custom_bwd",
    "loss_parallel",
}


def read_released(path: Path) -> Checkpoint:
    """Open a directory, or one `.pth` file with its `config.json` beside it."""
    directory = path if path.is_dir() else path.parent
    files = [open_tensor_file(file) for file in weight_paths(path)]
    config_path = directory / CONFIG_FILE
    document = read_json(config_path)
    config = _config(config_path, document.get("model"), files)
    for file in files:
        _check_shard(file, config, len(files))
        _check_buffers(file, config)
    tensors = {spec.name: _lazy(spec, files) for spec in parameter_specs(config)}
    if config.share_emb:
        tensors[EMBEDDING] = _tied(tensors[EMBEDDING], files)
    named = document.get("tokenizer", {}).get("path") if isinstance(document.get("tokenizer"), dict) else None
    tokenizer = find_tokenizer(directory, vocab_size=config.vocab_size, named=named)
    return Checkpoint(path, "released", config, tokenizer, tuple(files), tensors)


def _config(where: Path, stated: Any, files: Sequence[TensorFile]) -> MegalodonConfig:
    if not isinstance(stated, dict):
        raise CheckpointError(f'{where}: has no "model" section; expected the released layout')
    by_tokenizer = {"vocab_size"} if stated.get("vocab_size") == -1 else set()  # so do old checkpoints
    values = model_settings(where, stated, _INERT | by_tokenizer)
    return build_config(where, _DEFAULTS | _dimensions(files, values) | values)


def _dimensions(files: Sequence[TensorFile], stated: Mapping[str, Any]) -> dict[str, int]:
    """The dimensions that `stated` leaves out, from the shapes in the first shard."""
    ranks, first = len(files), files[0]
    sources = {  # dimension: tensor, its axis, and whether that axis is split over the ranks
        "vocab_size": (EMBEDDING, 0, 1),
        "model_dim": (EMBEDDING, 1, ranks),
        "z_dim": ("layers.0.mega.wz.weight", 0, ranks),
        "value_dim": ("layers.0.mega.wv.weight", 0, ranks),
        "ffn_hidden_dim": ("layers.0.nffn.fc1.weight", 0, ranks),
        "cema_ndim": ("layers.0.mega.cema.alpha", 1, 1),
        "norm_num_groups": ("layers.0.mega.timenorm.prior_mean", 0, ranks),
    }
    found = {
        name: _axis(first, tensor, axis) * split
        for name, (tensor, axis, split) in sources.items()
        if name not in stated
    }
    if "num_layers" not in stated:
        layers = (int(match[1]) for match in map(_LAYER.match, first.entries) if match)
        found["num_layers"] = 1 + max(layers, default=-1)
    if "num_heads" not in stated:
        z_dim = _axis(first, "layers.0.mega.wz.weight", 0) * ranks
        found["num_heads"] = z_dim // (2 * _axis(first, ROPE_FREQS, 0))
    return found


def _axis(file: TensorFile, name: str, axis: int) -> int:
    entry = file.entries.get(name)
    if entry is None or len(entry.shape) <= axis or entry.shape[axis] < 1:
        problem = "is missing" if entry is None else f"has shape {list(entry.shape)}"
        raise CheckpointError(f"{file.path}: tensor {name} {problem}; it gives a dimension that {CONFIG_FILE} omits")
    return entry.shape[axis]


def _check_shard(file: TensorFile, config: MegalodonConfig, num_shards: int) -> None:
    check_divisible(config, num_shards, file.path)
    expected = {spec.name: shard_shape(spec, num_shards) for spec in parameter_specs(config)}
    buffers = buffer_shapes(config, num_shards)
    optional = set(buffers)
    if config.share_emb:
        expected[OUTPUT] = expected[EMBEDDING]
        optional.add(OUTPUT)
    check_tensors(file.path, file.entries, expected | buffers, optional)


def _check_buffers(file: TensorFile, config: MegalodonConfig) -> None:
    """The stored rotary frequencies are those of `rope_base`, and no norm starts from a prior (NaN is not zero)."""
    for prefix in timestep_norm_prefixes(config):
        for name in (f"{prefix}{PRIOR_COUNT}", f"{prefix}.prior_mean", f"{prefix}.prior_logv"):
            if name in file.entries and bool((file.read(name) != 0).any()):
                raise CheckpointError(
                    f"{file.path}: tensor {name} is not zero; a norm that starts from a prior is not supported"
                )
    if ROPE_FREQS in file.entries:
        _check_freqs(file, config)


def _check_freqs(file: TensorFile, config: MegalodonConfig) -> None:
    found = read_checked(file, ROPE_FREQS)
    expected = rope_freqs(config)
    precision = torch.finfo(found.dtype)
    error = (found.double() - expected.double()).abs() / expected.double().clamp(min=precision.tiny)
    if not bool((error <= max(2 * precision.eps, _FREQS_TOLERANCE)).all()):
        last = len(expected) - 1
        base = float(found[last].double()) ** (-config.key_head_dim / (2 * last)) if last and found[last] > 0 else None
        hint = f" (they look like base {base:.6g})" if base else ""
        raise CheckpointError(
            f"{file.path}: tensor {ROPE_FREQS} is not that of rope_base = {config.rope_base:g}{hint}; "
            f"correct {CONFIG_FILE}"
        )


def _lazy(spec: ParameterSpec, files: Sequence[TensorFile]) -> LazyTensor:
    dtype = files[0].entries[spec.name].dtype
    for file in files:
        if (found := file.entries[spec.name].dtype) != dtype:
            raise CheckpointError(f"{file.path}: tensor {spec.name} is {found}, {files[0].path.name} has {dtype}")
    return LazyTensor(spec.shape, dtype, partial(_join, spec.name, spec.shard_dim, files))


def _join(name: str, shard_dim: int | None, files: Sequence[TensorFile]) -> torch.Tensor:
    parts = [read_checked(file, name) for file in files]
    if len(parts) == 1:
        return parts[0]
    if shard_dim is None:
        for file, part in zip(files, parts, strict=True):
            _check_equal(file, name, part, parts[0], files[0].path.name)
        return parts[0]
    joined = torch.cat(parts, dim=shard_dim)
    for file, part in zip(files, parts, strict=True):
        file.copied(part.nbytes)
    return joined


def _check_equal(file: TensorFile, name: str, found: torch.Tensor, expected: torch.Tensor, reference: str) -> None:
    differs = found != expected
    if bool(differs.any()):
        position = differs.nonzero()[0].tolist()
        here, there = found[tuple(position)].item(), expected[tuple(position)].item()
        raise CheckpointError(
            f"{file.path}: tensor {name} is {here:.9g} at {position}, expected {there:.9g} as in {reference}; "
            "replicas must be equal"
        )


def _tied(embedding: LazyTensor, files: Sequence[TensorFile]) -> LazyTensor:
    """A shared embedding whose stored output matrix, where there is one, is checked to be the same."""

    def load() -> torch.Tensor:
        for file in files:
            if OUTPUT in file.entries:
                _check_equal(file, OUTPUT, read_checked(file, OUTPUT), read_checked(file, EMBEDDING), EMBEDDING)
        return embedding.load()

    return LazyTensor(embedding.shape, embedding.dtype, load)
