"""What long streams are fed with, and where along a stream its error is looked at."""

from __future__ import annotations

import numpy as np

from megalodon_deploy.errors import UserError

SIGNALS = ("steady", "drifting", "ramp", "far from zero")
"""Groups of the norm's input, in units of its own noise: mean 0; a mean that swings by 10 around 30; a mean that climbs
from 0 to 100; mean 1,000."""
GROUP_SIZE = 8
_SWINGS = 3  # of the drifting mean over the whole stream
_SUFFIXES = {"K": 10**3, "M": 10**6, "G": 10**9}


def parse_count(text: str) -> int:
    """`10M` -> 10,000,000; K, M and G are powers of ten. Raises `UserError` for what is no positive number."""
    plain = text.strip().replace("_", "").replace(",", "").upper()
    factor = _SUFFIXES.get(plain[-1:], 1)
    digits = plain[:-1] if factor > 1 else plain
    if not digits.isdecimal() or int(digits) == 0:
        raise UserError(f"number of tokens {text!r} is not a positive number such as 500000, 500K or 10M")
    return int(digits) * factor


def signal(position: int, num_tokens: int, total: int, seed: int) -> np.ndarray:
    """float32 [T, D]: tokens from `position` on of a stream of `total`; a group of `GROUP_SIZE` channels each."""
    random = np.random.default_rng([seed, position])
    time_T = np.arange(position, position + num_tokens, dtype=np.float64)
    means = (
        np.zeros(num_tokens),
        30 + 10 * np.sin(2 * np.pi * _SWINGS * time_T / total),
        100 * time_T / total,
        np.full(num_tokens, 1000.0),
    )
    noise = random.standard_normal((num_tokens, len(means), GROUP_SIZE))
    signal_TD: np.ndarray = (noise + np.stack(means, 1)[:, :, None]).reshape(num_tokens, -1).astype(np.float32)
    return signal_TD


def checkpoints(total: int, step: int) -> list[int]:
    """Positions at which errors are taken: multiples of `step`, four to a factor of ten, the last one the end."""
    wanted = step * 10 ** np.arange(0, np.log10(max(total / step, 1)) + 0.25, 0.25)
    multiples = {min(total, round(position / step) * step) for position in wanted}
    return sorted(multiples | {total})


def drifting_tokens(position: int, num_tokens: int, total: int, vocab_size: int, seed: int) -> np.ndarray:
    """int64 [T]: random tokens around a centre that moves through the vocabulary and back, three times in all."""
    random = np.random.default_rng([seed, position])
    time_T = np.arange(position, position + num_tokens, dtype=np.float64)
    centre_T = (0.5 - 0.5 * np.cos(2 * np.pi * _SWINGS * time_T / total)) * vocab_size
    spread_T = random.standard_normal(num_tokens) * vocab_size / 16
    tokens_T: np.ndarray = (centre_T + spread_T).astype(np.int64) % vocab_size
    return tokens_T
