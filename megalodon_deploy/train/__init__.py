"""Training: text in, checkpoint out.

`train` needs PyTorch; the rest of this package's surface does not.
"""

from __future__ import annotations

from collections.abc import Callable

from megalodon_deploy.errors import MissingDependencyError
from megalodon_deploy.train.config import (
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    LogConfig,
    Measurement,
    OptimizerConfig,
    RunConfig,
    TrainConfig,
    TrainResult,
    byte_model,
)

__all__ = [
    "CheckpointConfig",
    "DataConfig",
    "EvaluationConfig",
    "LogConfig",
    "Measurement",
    "OptimizerConfig",
    "RunConfig",
    "TrainConfig",
    "TrainResult",
    "byte_model",
    "train",
]


def train(
    config: TrainConfig,
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: Callable[[str, float], None] | None = None,
) -> TrainResult:
    """Train a model and write its checkpoints: see `megalodon_deploy.train.loop.run`."""
    try:
        import torch  # noqa: F401  # asked for here, so that its absence is a line and not a traceback
    except ImportError as error:
        raise MissingDependencyError(
            "training needs PyTorch, which is not installed: pip install 'megalodon-deploy[train]'"
        ) from error
    from megalodon_deploy.train.loop import run

    return run(config, progress, resume=resume, overwrite=overwrite)
