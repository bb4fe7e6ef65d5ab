"""The benchmark's choice of a token: its settings as the kernel reads them, and the same choice in plain PyTorch."""

from __future__ import annotations

import numpy as np
import torch

from megalodon_deploy.runtime.cuda.kernels import CHOICE_DTYPE
from megalodon_deploy.runtime.sampling import SamplingParams

SETTINGS = SamplingParams(temperature=0.8, top_k=200, top_p=0.95, min_p=0.01, repetition_penalty=1.1)
UNIFORM = 0.6  # the number that every row draws with


def choices_tensor(rows: int, num_recent: int, device: str) -> torch.Tensor:
    """struct mgd_choice [rows], as int64 [rows, 8]."""
    settings = np.zeros(rows, CHOICE_DTYPE)
    filters = (SETTINGS.temperature, SETTINGS.top_p, SETTINGS.min_p, SETTINGS.repetition_penalty)
    settings[:] = (*filters, UNIFORM, SETTINGS.top_k or 0, num_recent, 1)
    return torch.from_numpy(settings.view(np.int64).reshape(rows, -1)).to(device)


def choose_tokens(logits: torch.Tensor, recent: torch.Tensor) -> torch.Tensor:
    """Tokens [B] from logits [B, V] and recent [B, R]: `sampling.py` for a batch, whose top-k needs no sort of all."""
    seen = logits.gather(1, recent)
    penalty = SETTINGS.repetition_penalty
    logits = logits.scatter(1, recent, torch.where(seen > 0, seen / penalty, seen * penalty))
    best, tokens = logits.topk(min(SETTINGS.top_k or logits.shape[1], logits.shape[1]), dim=1)
    weights = ((best - best[:, :1]) / SETTINGS.temperature).exp()
    before = weights.cumsum(1) - weights
    kept = (before < SETTINGS.top_p * weights.sum(1, keepdim=True)) & (weights >= SETTINGS.min_p)
    tokens, order = tokens.sort(1)
    cumulative = torch.where(kept, weights, 0.0).gather(1, order).cumsum(1)
    drawn = torch.searchsorted(cumulative, UNIFORM * cumulative[:, -1:], right=True)
    return tokens.gather(1, drawn).squeeze(1)
