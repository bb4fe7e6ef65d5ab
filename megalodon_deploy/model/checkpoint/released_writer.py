"""Writes the released layout, so that the released code loads it: weights, buffers, one file per rank."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from megalodon_deploy.config import MegalodonConfig
from megalodon_deploy.errors import CheckpointError
from megalodon_deploy.model.checkpoint.document import CONFIG_FILE, write_json
from megalodon_deploy.model.checkpoint.shards import (
    CONSOLIDATE_FILE,
    EMBEDDING,
    OUTPUT,
    ROPE_FREQS,
    buffer_shapes,
    check_divisible,
    rope_freqs,
    shard_names,
)
from megalodon_deploy.model.checkpoint.types import TokenizerSource
from megalodon_deploy.model.checkpoint.validate import PRIOR_COUNT
from megalodon_deploy.parameters import parameter_specs

_DTYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def write_released(
    directory: Path,
    config: MegalodonConfig,
    state: Mapping[str, torch.Tensor],
    tokenizer: TokenizerSource | None,
    num_shards: int,
) -> None:
    """Write `state` (released names) as `num_shards` model-parallel files into `directory`."""
    check_divisible(config, num_shards, directory)
    dtype = state[EMBEDDING].dtype
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
    for rank, name in enumerate(shard_names(num_shards)):
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
        tensors[OUTPUT] = tensors[EMBEDDING]
    for name, shape in buffer_shapes(config, num_shards).items():
        tensors[name] = torch.zeros(shape, dtype=torch.int64 if name.endswith(PRIOR_COUNT) else torch.float32)
    return tensors | {ROPE_FREQS: rope_freqs(config)}


def _exact_storage(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as a storage of its own: `torch.save` writes the whole storage that a view belongs to."""
    flat = tensor.detach().cpu().contiguous().view(-1)
    if flat.dtype == torch.bfloat16:  # NumPy does not know it
        return torch.from_numpy(flat.view(torch.int16).numpy()).view(torch.bfloat16).view(tensor.shape)
    return torch.from_numpy(flat.numpy()).view(tensor.shape)
