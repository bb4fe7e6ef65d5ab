"""Checkpoints of four layouts: read all, write two.

| layout | what it is |
| --- | --- |
| native | `config.json` and `model.safetensors`, written by `save_checkpoint` |
| released | the published Megalodon code's directory, any number of model-parallel shards |
| megalodon-jax | the safetensors file of the package of that name |
| megalodon-hf | a Hugging Face directory of the package of that name |
"""

from __future__ import annotations

from megalodon_deploy.model.checkpoint.load import build_model, load_checkpoint, save_checkpoint
from megalodon_deploy.model.checkpoint.recognise import read_checkpoint
from megalodon_deploy.model.checkpoint.types import Checkpoint, CheckpointWarning, LazyTensor, TokenizerSource

__all__ = [
    "Checkpoint",
    "CheckpointWarning",
    "LazyTensor",
    "TokenizerSource",
    "build_model",
    "load_checkpoint",
    "read_checkpoint",
    "save_checkpoint",
]
