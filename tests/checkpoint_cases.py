"""Random weights in directories of every layout that we write, and ways to damage them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from megalodon_deploy.config import MegalodonConfig
from megalodon_deploy.model.checkpoint.native import write_native
from megalodon_deploy.model.checkpoint.released_writer import write_released
from megalodon_deploy.parameters import parameter_specs

State = dict[str, torch.Tensor]


def random_state(config: MegalodonConfig, seed: int = 0, dtype: torch.dtype = torch.float32) -> State:
    generator = torch.Generator().manual_seed(seed)
    return {spec.name: torch.randn(spec.shape, generator=generator).to(dtype) for spec in parameter_specs(config)}


def write_case(directory: Path, layout: str, config: MegalodonConfig, state: State, shards: int = 1) -> Path:
    directory.mkdir(parents=True)
    if layout == "native":
        write_native(directory, config, state, None)
    else:
        write_released(directory, config, state, None, shards)
    return directory


def edit_torch(path: Path, change: Callable[[State], object]) -> None:
    """Rewrite a `.pth` file after `change` has altered its dictionary."""
    state = torch.load(path, weights_only=True)
    change(state)
    torch.save(state, path)
