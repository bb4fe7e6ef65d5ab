"""What a training run is told and what it reports. Nothing here imports PyTorch."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megalodon_deploy.config import MegalodonConfig
from megalodon_deploy.errors import ConfigError

BYTE_VOCABULARY = 256  # a token is a byte


def byte_model(
    *,
    preset: str | None = None,
    layers: int | None = None,
    dim: int | None = None,
    heads: int | None = None,
    chunk_size: int | None = None,
) -> MegalodonConfig:
    """A byte-level model: a preset, or a small one whose widths follow `dim` D as Z = D/2, E = 2D, F = 3D.

    The default has about one million parameters, which two CPU cores train in two minutes. Raises `ConfigError` when
    a preset is mixed with dimensions, or when the dimensions contradict each other.
    """
    dims = {"layers": layers, "dim": dim, "heads": heads, "chunk_size": chunk_size}
    if preset is not None:
        if given := [name for name, value in dims.items() if value is not None]:
            raise ConfigError(f"preset {preset} fixes every dimension; leave out {', '.join(given)}, or the preset")
        return MegalodonConfig.preset(preset, vocab_size=BYTE_VOCABULARY)
    width = 128 if dim is None else dim
    group_dim = 16
    if width < group_dim or width % group_dim:
        raise ConfigError(f"dim = {width} is not a multiple of {group_dim}")
    return MegalodonConfig(
        vocab_size=BYTE_VOCABULARY,
        model_dim=width,
        num_layers=4 if layers is None else layers,
        num_heads=1 if heads is None else heads,
        z_dim=width // 2,
        value_dim=2 * width,
        ffn_hidden_dim=3 * width,
        chunk_size=128 if chunk_size is None else chunk_size,
        norm_num_groups=width // group_dim,
    )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run. Raises `ConfigError` when a number makes no sense.

    The optimiser's defaults are those of the paper's runs, but for the learning rate, which suits small models.
    """

    data: tuple[Path, ...]  # files, and directories that are searched for `glob`
    out: Path  # the checkpoint directory to write
    model: MegalodonConfig = dataclasses.field(default_factory=byte_model)
    glob: str = "**/*.py"
    exclude: tuple[str, ...] = ()  # names of files and folders to leave out; shell wildcards
    overwrite: bool = False  # whether a checkpoint at `out` may be replaced
    steps: int | None = None  # the length of the run: this
    minutes: float | None = None  # or this
    batch_size: int = 4  # windows of a step
    seq_len: int = 512  # tokens of a window
    learning_rate: float = 6e-3  # the peak
    warmup_fraction: float = 0.05  # of the run
    final_lr_fraction: float = 0.1  # of the peak
    weight_decay: float = 0.1
    clip_norm: float = 1.0  # on the norm of all gradients
    seed: int = 0
    threads: int | None = None  # None: one for each processor that this process may use
    held_out_fraction: float = 0.05  # of the files
    evaluations: int = 10  # times that the held-out loss is measured and the checkpoint written
    evaluation_windows: int = 32

    def __post_init__(self) -> None:
        if not self.data:
            raise ConfigError("no data: give at least one file or directory")
        if (self.steps is None) == (self.minutes is None):
            raise ConfigError("give the length of the run either in steps or in minutes")
        if self.model.vocab_size != BYTE_VOCABULARY:
            raise ConfigError(f"vocab_size = {self.model.vocab_size}, bytes take {BYTE_VOCABULARY}")
        for name in ("steps", "batch_size", "seq_len", "threads", "evaluations", "evaluation_windows"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} = {value} is not a positive number")
        for name in ("minutes", "learning_rate", "clip_norm"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(f"{name} = {value} is not a positive number")
        for name in ("warmup_fraction", "final_lr_fraction", "weight_decay", "held_out_fraction"):
            value = getattr(self, name)
            if not 0 <= value < 1:
                raise ConfigError(f"{name} = {value} is not in 0 <= {name} < 1")


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One point of the learning curve; losses in nats per byte."""

    step: int
    seconds: float  # since the first step
    train_loss: float  # mean over the latest steps
    held_out_loss: float


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What a run did; losses in nats per byte."""

    path: Path  # the checkpoint
    num_parameters: int
    num_train_files: int
    num_train_bytes: int
    num_held_out_bytes: int
    steps: int
    tokens: int
    seconds: float
    first_loss: float | None  # None: interrupted before the first step
    train_loss: float | None  # mean over the latest steps
    held_out_loss: float | None  # None: interrupted before the first evaluation
    interrupted: bool  # stopped by a signal; the checkpoint is there
    curve: tuple[Measurement, ...]

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dataclasses.asdict(self) | {"path": str(self.path), "tokens_per_second": self.tokens_per_second}
