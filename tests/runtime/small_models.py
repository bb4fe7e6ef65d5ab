"""The two small models that this room's bundles are made of."""

from __future__ import annotations

import torch
from helpers import small_config

from megalodon_deploy.config import MegalodonConfig
from megalodon_deploy.model.megalodon import Megalodon

SHORT_CHUNKS = small_config(vocab_size=256)  # 12 tokens
LONG_CHUNKS = small_config(vocab_size=256, chunk_size=150, num_layers=1)  # longer than two buckets of memory


def make_model(config: MegalodonConfig) -> Megalodon:
    """Random weights, biases and norm weights included, so that nothing is exercised as zero."""
    torch.manual_seed(7)
    model = Megalodon(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith((".bias", ".beta", ".gamma")) or "norm" in name:
                parameter.normal_(std=0.3)
    return model
