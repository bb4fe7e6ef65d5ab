"""How far a run is, and the learning rate there."""

from __future__ import annotations

import math

from megalodon_deploy.train.config import TrainConfig


def run_fraction(config: TrainConfig, step: int, seconds: float) -> float:
    """The part of the run, 0 to 1, that lies behind after `step` steps and `seconds` seconds."""
    if config.steps is not None:
        return min(step / config.steps, 1.0)
    assert config.minutes is not None, "Bug: a run without a length"
    return min(seconds / (60 * config.minutes), 1.0)


def learning_rate(config: TrainConfig, fraction: float) -> float:
    """Linear warm-up to the peak, then half a cosine down to `final_lr_fraction` of it. Never zero at the start."""
    if fraction < config.warmup_fraction:
        first = 1e-2  # a step with rate 0 would be wasted
        return config.learning_rate * max(first, fraction / config.warmup_fraction)
    progress = (fraction - config.warmup_fraction) / (1 - config.warmup_fraction)
    cosine = (1 + math.cos(math.pi * progress)) / 2
    return config.learning_rate * (config.final_lr_fraction + (1 - config.final_lr_fraction) * cosine)
