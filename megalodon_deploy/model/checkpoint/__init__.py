"""Checkpoints of four layouts: read all, write two.

| layout | what it is |
| --- | --- |
| native | `config.json` and `model.safetensors`, written by `save_checkpoint` |
| released | the published Megalodon code's directory, any number of model-parallel shards |
| megalodon-jax | the safetensors file of the package of that name |
| megalodon-hf | a Hugging Face directory of the package of that name |
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from megalodon_deploy.model.checkpoint.recognise import read_checkpoint
from megalodon_deploy.model.checkpoint.types import Checkpoint, LazyTensor, TokenizerSource

if TYPE_CHECKING:
    from megalodon_deploy.model.checkpoint.load import build_model, load_checkpoint, save_checkpoint

__all__ = [
    "Checkpoint",
    "LazyTensor",
    "TokenizerSource",
    "build_model",
    "load_checkpoint",
    "read_checkpoint",
    "save_checkpoint",
]


def __getattr__(name: str) -> Any:
    """Export reads checkpoints without the model's code."""
    if name not in ("build_model", "load_checkpoint", "save_checkpoint"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from megalodon_deploy.model.checkpoint import load

    return getattr(load, name)
