"""The released layout: `config.json`, `consolidate_config.json` and one file of tensors per model-parallel rank.

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
from megalodon_deploy.model.checkpoint.document import (
    CONFIG_FILE,
    build_config,
    model_settings,
    read_json,
    read_json_if_present,
    write_json,
)
from megalodon_deploy.model.checkpoint.tensor_file import TensorFile, open_tensor_file
from megalodon_deploy.model.checkpoint.tokenizer import find_tokenizer
from megalodon_deploy.model.checkpoint.types import Checkpoint, LazyTensor, TokenizerSource
from megalodon_deploy.model.checkpoint.validate import PRIOR_COUNT, Shape, check_tensors, read_checked
from megalodon_deploy.parameters import ParameterSpec, parameter_specs, timestep_norm_prefixes

CONSOLIDATE_FILE = "consolidate_config.json"
WEIGHTS_GLOB = "consolidated*.pth"
_SHARD_NAME = re.compile(r"consolidated\.(\d+)\.pth")
_LAYER = re.compile(r"layers\.(\d+)\.")
_EMBEDDING = "embed.weight"
_OUTPUT = "output.output.weight"
_FREQS = "rope.freqs"
_FREQS_TOLERANCE = 1e-5  # relative; float32 powers are this far off, another base is much further
_DTYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}

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
    files = [open_tensor_file(file) for file in _weight_paths(path)]
    config_path = directory / CONFIG_FILE
    document = read_json(config_path)
    config = _config(config_path, document.get("model"), files)
    for file in files:
        _check_shard(file, config, len(files))
        _check_buffers(file, config)
    tensors = {spec.name: _lazy(spec, files) for spec in parameter_specs(config)}
    if config.share_emb:
        tensors[_EMBEDDING] = _tied(tensors[_EMBEDDING], files)
    named = document.get("tokenizer", {}).get("path") if isinstance(document.get("tokenizer"), dict) else None
    tokenizer = find_tokenizer(directory, vocab_size=config.vocab_size, named=named)
    return Checkpoint(path, "released", config, tokenizer, tuple(files), tensors)


def _weight_paths(path: Path) -> list[Path]:
    """The files of all ranks, in order; their number must be what `consolidate_config.json` says."""
    if path.is_file() and not _SHARD_NAME.fullmatch(path.name):
        return [path]
    directory = path if path.is_dir() else path.parent
    found = sorted(directory.glob(WEIGHTS_GLOB))
    if not found:
        raise CheckpointError(f"{directory}: no consolidated.pth and no consolidated.00.pth; the weights are missing")
    num_shards = _stated_shards(directory) or len(found)
    expected = [directory / name for name in _shard_names(num_shards)]
    if missing := [file for file in expected if file not in found]:
        raise CheckpointError(
            f"{missing[0]} is missing; expected {num_shards} model-parallel shard(s), "
            f"found {', '.join(file.name for file in found)}"
        )
    if extra := [file for file in found if file not in expected]:
        raise CheckpointError(
            f"{extra[0]}: unexpected shard; {CONSOLIDATE_FILE} says {num_shards} model-parallel shard(s)"
        )
    return expected


def _stated_shards(directory: Path) -> int | None:
    document = read_json_if_present(directory / CONSOLIDATE_FILE)
    if document is None:
        return None
    size = document.get("model_parallel_size")
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise CheckpointError(f"{directory / CONSOLIDATE_FILE}: model_parallel_size is {size!r}, expected 1 or more")
    return size


def _shard_names(num_shards: int) -> list[str]:
    return ["consolidated.pth"] if num_shards == 1 else [f"consolidated.{rank:02d}.pth" for rank in range(num_shards)]


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
        "vocab_size": (_EMBEDDING, 0, 1),
        "model_dim": (_EMBEDDING, 1, ranks),
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
        found["num_heads"] = z_dim // (2 * _axis(first, _FREQS, 0))
    return found


def _axis(file: TensorFile, name: str, axis: int) -> int:
    entry = file.entries.get(name)
    if entry is None or len(entry.shape) <= axis or entry.shape[axis] < 1:
        problem = "is missing" if entry is None else f"has shape {list(entry.shape)}"
        raise CheckpointError(f"{file.path}: tensor {name} {problem}; it gives a dimension that {CONFIG_FILE} omits")
    return entry.shape[axis]


def _buffers(config: MegalodonConfig, num_shards: int) -> dict[str, Shape]:
    """Shapes on one rank of what the released code stores beside the weights: all of it follows from the config."""
    shapes: dict[str, Shape] = {_FREQS: (config.key_head_dim // 2,)}
    for prefix in timestep_norm_prefixes(config):
        groups = (config.norm_num_groups // num_shards,)
        shapes |= {f"{prefix}{PRIOR_COUNT}": (), f"{prefix}.prior_mean": groups, f"{prefix}.prior_logv": groups}
    return shapes


def _check_shard(file: TensorFile, config: MegalodonConfig, num_shards: int) -> None:
    check_divisible(config, num_shards, file.path)
    expected = {spec.name: _shard_shape(spec, num_shards) for spec in parameter_specs(config)}
    buffers = _buffers(config, num_shards)
    optional = set(buffers)
    if config.share_emb:
        expected[_OUTPUT] = expected[_EMBEDDING]
        optional.add(_OUTPUT)
    check_tensors(file.path, file.entries, expected | buffers, optional)


def check_divisible(config: MegalodonConfig, num_shards: int, where: Path) -> None:
    """Raises `CheckpointError` unless heads, groups and widths split evenly over `num_shards`."""
    for name in ("num_heads", "norm_num_groups", "model_dim", "z_dim", "value_dim", "ffn_hidden_dim"):
        value = getattr(config, name)
        if value % num_shards:
            raise CheckpointError(f"{where}: {name} = {value} does not split over {num_shards} shards")


def _shard_shape(spec: ParameterSpec, num_shards: int) -> Shape:
    return tuple(size // num_shards if axis == spec.shard_dim else size for axis, size in enumerate(spec.shape))


def _check_buffers(file: TensorFile, config: MegalodonConfig) -> None:
    """The stored rotary frequencies are those of `rope_base`, and no norm starts from a prior (NaN is not zero)."""
    for prefix in timestep_norm_prefixes(config):
        for name in (f"{prefix}{PRIOR_COUNT}", f"{prefix}.prior_mean", f"{prefix}.prior_logv"):
            if name in file.entries and bool((file.read(name) != 0).any()):
                raise CheckpointError(
                    f"{file.path}: tensor {name} is not zero; a norm that starts from a prior is not supported"
                )
    if _FREQS in file.entries:
        _check_freqs(file, config)


def rope_freqs(config: MegalodonConfig) -> torch.Tensor:
    """The released `rope.freqs` buffer [dz / 2]: base^(-2 i / dz), computed as the released code does."""
    dim = config.key_head_dim
    powers = [config.rope_base ** (even / dim) for even in range(0, dim, 2)]
    return 1.0 / torch.tensor(powers, dtype=torch.float32)


def _check_freqs(file: TensorFile, config: MegalodonConfig) -> None:
    found = read_checked(file, _FREQS)
    expected = rope_freqs(config)
    precision = torch.finfo(found.dtype)
    error = (found.double() - expected.double()).abs() / expected.double().clamp(min=precision.tiny)
    if not bool((error <= max(2 * precision.eps, _FREQS_TOLERANCE)).all()):
        last = len(expected) - 1
        base = float(found[last].double()) ** (-config.key_head_dim / (2 * last)) if last and found[last] > 0 else None
        hint = f" (they look like base {base:.6g})" if base else ""
        raise CheckpointError(
            f"{file.path}: tensor {_FREQS} is not that of rope_base = {config.rope_base:g}{hint}; correct {CONFIG_FILE}"
        )


def _lazy(spec: ParameterSpec, files: Sequence[TensorFile]) -> LazyTensor:
    dtypes = {file.entries[spec.name].dtype for file in files}
    if len(dtypes) > 1:
        raise CheckpointError(
            f"{files[-1].path}: tensor {spec.name} is {files[-1].entries[spec.name].dtype}, "
            f"{files[0].path.name} has {files[0].entries[spec.name].dtype}"
        )
    return LazyTensor(spec.shape, dtypes.pop(), partial(_join, spec.name, spec.shard_dim, files))


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
            if _OUTPUT in file.entries:
                _check_equal(file, _OUTPUT, read_checked(file, _OUTPUT), read_checked(file, _EMBEDDING), _EMBEDDING)
        return embedding.load()

    return LazyTensor(embedding.shape, embedding.dtype, load)


def write_released(
    directory: Path,
    config: MegalodonConfig,
    state: Mapping[str, torch.Tensor],
    tokenizer: TokenizerSource | None,
    num_shards: int,
) -> None:
    """Write `state` (released names) as `num_shards` model-parallel files into `directory`."""
    check_divisible(config, num_shards, directory)
    dtype = state[_EMBEDDING].dtype
    if dtype not in _DTYPE_NAMES:
        raise CheckpointError(f"{directory}: the released layout has no {dtype}; convert the model to float32")
    document = {
        "model": config.to_dict() | {"output_size": -1, "efficient_attn": None, "init_mode": "he"},
        "tokenizer": {
            "path": tokenizer.file.name if tokenizer and tokenizer.file else None,
            "additional_vocab_size": 0,
            "data_tokenized": False,
        },
    }
    write_json(directory / CONFIG_FILE, document)
    consolidation = {"model_parallel_size": num_shards, "dtype": _DTYPE_NAMES[dtype]}
    write_json(directory / CONSOLIDATE_FILE, consolidation)
    for rank, name in enumerate(_shard_names(num_shards)):
        torch.save(_shard(config, state, rank, num_shards), directory / name)


def _shard(
    config: MegalodonConfig, state: Mapping[str, torch.Tensor], rank: int, num_shards: int
) -> dict[str, torch.Tensor]:
    """The tensors of one rank, buffers included; parts that lie together in memory are not copied."""
    tensors = {
        spec.name: _exact_storage(
            state[spec.name] if spec.shard_dim is None else state[spec.name].chunk(num_shards, spec.shard_dim)[rank]
        )
        for spec in parameter_specs(config)
    }
    if config.share_emb:
        tensors[_OUTPUT] = tensors[_EMBEDDING]
    for name, shape in _buffers(config, num_shards).items():
        tensors[name] = torch.zeros(shape, dtype=torch.int64 if name.endswith(PRIOR_COUNT) else torch.float32)
    return tensors | {_FREQS: rope_freqs(config)}


def _exact_storage(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as a storage of its own: `torch.save` writes the whole storage that a view belongs to."""
    flat = tensor.detach().cpu().contiguous().view(-1)
    if flat.dtype == torch.bfloat16:  # NumPy does not know it
        return torch.from_numpy(flat.view(torch.int16).numpy()).view(torch.bfloat16).view(tensor.shape)
    return torch.from_numpy(flat.numpy()).view(tensor.shape)
