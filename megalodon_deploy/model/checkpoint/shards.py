"""The files of the released layout: their names, and what each model-parallel rank holds."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from megalodon_deploy.config import MegalodonConfig
from megalodon_deploy.errors import CheckpointError
from megalodon_deploy.model.checkpoint.document import read_json_if_present
from megalodon_deploy.model.checkpoint.validate import PRIOR_COUNT, Shape
from megalodon_deploy.parameters import ParameterSpec, timestep_norm_prefixes

CONSOLIDATE_FILE = "consolidate_config.json"
WEIGHTS_GLOB = "consolidated*.pth"
EMBEDDING = "embed.weight"
OUTPUT = "output.output.weight"
ROPE_FREQS = "rope.freqs"
_SHARD_NAME = re.compile(r"consolidated\.(\d+)\.pth")


def weight_paths(path: Path) -> list[Path]:
    """The files of all ranks, in order; their number must be what `consolidate_config.json` says."""
    if path.is_file() and not _SHARD_NAME.fullmatch(path.name):
        return [path]
    directory = path if path.is_dir() else path.parent
    found = sorted(directory.glob(WEIGHTS_GLOB))
    if not found:
        raise CheckpointError(f"{directory}: no consolidated.pth and no consolidated.00.pth; the weights are missing")
    num_shards = _stated_shards(directory) or len(found)
    expected = [directory / name for name in shard_names(num_shards)]
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


def shard_names(num_shards: int) -> list[str]:
    return ["consolidated.pth"] if num_shards == 1 else [f"consolidated.{rank:02d}.pth" for rank in range(num_shards)]


def buffer_shapes(config: MegalodonConfig, num_shards: int) -> dict[str, Shape]:
    """Shapes on one rank of what the released code stores beside the weights: all of it follows from the config."""
    shapes: dict[str, Shape] = {ROPE_FREQS: (config.key_head_dim // 2,)}
    for prefix in timestep_norm_prefixes(config):
        groups = (config.norm_num_groups // num_shards,)
        shapes |= {f"{prefix}{PRIOR_COUNT}": (), f"{prefix}.prior_mean": groups, f"{prefix}.prior_logv": groups}
    return shapes


def check_divisible(config: MegalodonConfig, num_shards: int, where: Path) -> None:
    """Raises `CheckpointError` unless heads, groups and widths split evenly over `num_shards`."""
    for name in ("num_heads", "norm_num_groups", "model_dim", "z_dim", "value_dim", "ffn_hidden_dim"):
        value = getattr(config, name)
        if value % num_shards:
            raise CheckpointError(f"{where}: {name} = {value} does not split over {num_shards} shards")


def shard_shape(spec: ParameterSpec, num_shards: int) -> Shape:
    return tuple(size // num_shards if axis == spec.shard_dim else size for axis, size in enumerate(spec.shape))


def rope_freqs(config: MegalodonConfig) -> torch.Tensor:
    """The released `rope.freqs` buffer [dz / 2]: base^(-2 i / dz), computed as the released code does."""
    dim = config.key_head_dim
    powers = [config.rope_base ** (even / dim) for even in range(0, dim, 2)]
    return 1.0 / torch.tensor(powers, dtype=torch.float32)
