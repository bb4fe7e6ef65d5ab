"""Models in which no weight is left at zero, so that a term that is dropped shows."""

from __future__ import annotations

import numpy as np
import torch
from helpers import small_config

from megalodon_deploy.config import MegalodonConfig
from megalodon_deploy.model.megalodon import Megalodon, ModelState

CONFIGS = {
    "plain": small_config(),
    "no_affine_tied": small_config(norm_affine=False, share_emb=True, chunk_size=7),
    "swiglu_rescaled": small_config(swiglu=True, rescale_nffn=True, scale_emb=True, rope_base=500.0, cema_ndim=5),
    "one_head_wide_block": small_config(num_heads=1, chunk_size=100, cema_ndim=1, num_layers=1, norm_num_groups=24),
    "chunk_of_one": small_config(chunk_size=1, num_layers=1, norm_num_groups=1),
}


def random_model(config: MegalodonConfig, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Megalodon:
    """The released initialisation with noise on every parameter, in evaluation mode."""
    torch.manual_seed(seed)
    model = Megalodon(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model.to(dtype).eval()


def numpy_weights(model: Megalodon) -> dict[str, np.ndarray]:
    return {name: tensor.double().numpy() for name, tensor in model.state_dict().items()}


def random_tokens(config: MegalodonConfig, batch: int, num_tokens: int, *, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(config.vocab_size, (batch, num_tokens), generator=generator)


def run_in_calls(
    model: Megalodon, tokens: torch.Tensor, lengths: list[int], state: ModelState | None = None
) -> tuple[torch.Tensor, ModelState]:
    """Feed `tokens` in calls of the given lengths; what the lengths leave over goes in one last call."""
    pieces: list[torch.Tensor] = []
    start = 0
    for length in [*lengths, tokens.shape[1]]:
        piece = tokens[:, start : start + length]
        if piece.shape[1] == 0:
            break
        logits, state = model(piece, state)
        pieces.append(logits)
        start += length
    assert state is not None
    return torch.cat(pieces, 1), state
