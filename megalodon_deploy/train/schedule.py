"""How far a run is, and the learning rate there."""

from __future__ import annotations

import math

from megalodon_deploy.train.config import OptimizerConfig, RunConfig


def run_fraction(run: RunConfig, step: int, seconds: float) -> float:
    """The part of the run, 0 to 1, that lies behind after `step` steps and `seconds` seconds."""
    if run.steps is not None:
        return min(step / run.steps, 1.0)
    assert run.minutes is not None, "Bug: a run without a length"
    return min(seconds / (60 * run.minutes), 1.0)


def learning_rate(optimizer: OptimizerConfig, fraction: float, step: int) -> float:
    """Linear warm-up to the peak, then half a cosine down to `final_lr_fraction` of it. Never zero at the start.

    A warm-up in steps overlays the cosine of the whole run.
    """
    in_steps = optimizer.warmup >= 1
    warmed = (step + 1 if in_steps else fraction) / optimizer.warmup if optimizer.warmup else 1.0
    if warmed < 1:
        first = 0.0 if in_steps else 1e-2  # a step with rate 0 would be wasted
        return optimizer.learning_rate * max(first, warmed)
    begin = 0.0 if in_steps else optimizer.warmup
    progress = (fraction - begin) / (1 - begin)
    cosine = (1 + math.cos(math.pi * progress)) / 2
    return optimizer.learning_rate * (optimizer.final_lr_fraction + (1 - optimizer.final_lr_fraction) * cosine)
