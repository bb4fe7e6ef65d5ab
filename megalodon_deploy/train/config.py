"""What a training run is told and what it reports. Nothing here imports PyTorch.

A run is described by one TOML file with a table for each section below, and `[model]` with the fields of
`MegalodonConfig`; `section.key=value` overrides single settings.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megalodon_deploy.config import MegalodonConfig
from megalodon_deploy.errors import ConfigError
from megalodon_deploy.train.settings import (
    Section,
    Table,
    fields,
    override,
    read_toml,
    refuse_unknown,
    section_values,
    setting,
    to_toml,
)

CONFIG_FILE = "config.toml"  # of a run, in its folder
BYTES = "bytes"  # the tokenizer that needs no file
BYTE_VOCABULARY = 256  # a token is a byte
_GROUP_DIM = 16  # scalars of a norm group of a model that follows its width
_PRESET = "preset"  # the key of [model] that is no field


@dataclass(frozen=True, kw_only=True)
class DataConfig(Section):
    """Text: where it is and how it becomes tokens and rows."""

    paths: tuple[Path, ...] = setting("text files, JSON Lines, Arrow data sets, or folders of them")
    glob: str = setting("files taken in a folder", "**/*")
    exclude: tuple[str, ...] = setting("names of files and folders to leave out; shell wildcards", ())
    text_field: str = setting("the field of a JSON line or data set row that holds the text", "text")
    invalid_utf8: Literal["refuse", "replace", "skip"] = setting("what to do with a file that is not UTF-8", "refuse")
    tokenizer: str = setting("bytes, or the path of a tokenizer.json or SentencePiece model", BYTES)
    end_token: int | None = setting("token put behind each document; generation stops there", None, least=0)
    held_out_fraction: float = setting("of the documents, never trained on", 0.05, least=0, below=1)
    rows: Literal["documents", "windows", "streams"] = setting(
        "documents: packed, each as if it were alone; windows: random places of the joined text; "
        "streams: long documents from begin to end, state carried from step to step",
        "documents",
    )
    cache: Path | None = setting("folder of tokenised data; default: the user's cache folder", None)
    workers: int = setting("threads that tokenise", 2, least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.paths:
            raise ConfigError("data.paths is empty: give at least one file or folder")


@dataclass(frozen=True, kw_only=True)
class RunConfig(Section):
    """Length, shape and place of the run."""

    out: Path = setting("folder of the run: checkpoints, logs, plot")
    steps: int | None = setting("length of the run in steps; or:", None, least=1)
    minutes: float | None = setting("length of the run in minutes", None, above=0)
    seq_len: int = setting("tokens of a row", 512, least=1)
    batch_size: int = setting("rows of a step, over all ranks", 4, least=1)
    micro_batch_size: int | None = setting("rows computed at once on a rank; default: all", None, least=1)
    start_from: Path | None = setting("checkpoint whose weights the run begins with", None)
    seed: int = setting("of weights, order of the data and samples", 0, least=0)
    threads: int | None = setting("CPU threads; default: the processors that the process may use", None, least=1)
    device: str = setting("PyTorch device", "cpu")
    precision: Literal["float32", "bfloat16"] = setting(
        "of matrix products; bfloat16 is autocast: weights, norms, moving averages and their state stay float32",
        "float32",
    )
    checkpoint_activations: bool = setting("recompute each block in the backward pass, to save memory", False)
    compile: bool = setting("compile the blocks with torch.compile", False)
    logits_at_once: int = setting("positions whose logits are held at a time", 2048, least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.steps is None) == (self.minutes is None):
            raise ConfigError("give the length of the run either as run.steps or as run.minutes")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig(Section):
    """AdamW as in the paper's runs; the learning rate suits small models (the paper's 7B run: 3.5e-4)."""

    learning_rate: float = setting("the peak", 6e-3, above=0)
    warmup: float = setting("linear warm-up: below 1 a fraction of the run, else steps", 0.05, least=0)
    final_lr_fraction: float = setting("of the peak, at the end of the cosine", 0.1, least=0, below=1)
    betas: tuple[float, float] = setting("decay of the two moments", (0.9, 0.95), least=0, below=1)
    epsilon: float = setting("added to the root of the second moment", 1e-8, above=0)
    weight_decay: float = setting("on all weights as stored; norm scales are stored minus one", 0.1, least=0)
    clip_norm: float = setting("most that the norm of all gradients may be", 1.0, above=0)


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig(Section):
    """What is kept on disk."""

    every_steps: int | None = setting(
        "write a checkpoint so often, and at each best evaluation; default: at each evaluation", None, least=1
    )
    keep: int = setting("latest checkpoints that are kept, and the best one besides", 2, least=1)
    sharded: bool | None = setting("each process writes its part; default: where weights are shared out", None)


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig(Section):
    """Loss on text that is held out."""

    times: int = setting("evaluations of the whole run, evenly spaced", 10, least=1)
    every_steps: int | None = setting("evaluate so often instead", None, least=1)
    rows: int = setting("rows of an evaluation, the same each time", 32, least=1)


@dataclass(frozen=True, kw_only=True)
class LogConfig(Section):
    """What is written beside the checkpoints: log.csv always."""

    every_steps: int = setting("a line of log.csv", 1, least=1)
    plot: bool = setting("draw loss.svg (needs matplotlib)", False)
    tensorboard: bool = setting("write TensorBoard's files (needs tensorboard)", False)
    sample_prompt: str = setting("text that the samples go on from", "")
    sample_tokens: int = setting("length of the sample written at each evaluation; 0: none", 0, least=0)
    peak_tflops: float | None = setting(
        "of the device at the run's precision, for the share of peak; default: known GPUs", None, above=0
    )


@dataclass(frozen=True, kw_only=True)
class ParallelConfig(Section):
    """How the processes that torchrun starts share the work; those left over by other axes share the rows."""

    chunk: int = setting("processes that each hold a part of every sequence, cut at chunk edges", 1, least=1)
    pipeline: int = setting("processes that each hold some of the layers; micro-batches go through them", 1, least=1)
    tensor: int = setting("processes that each hold a part of every layer's wide matrices", 1, least=1)
    shard: bool = setting(
        "share out weights, gradients and moments over processes that would have the same (FSDP2)", False
    )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run."""

    data: DataConfig
    run: RunConfig
    model: MegalodonConfig = dataclasses.field(default_factory=lambda: byte_model())
    optimizer: OptimizerConfig = OptimizerConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    log: LogConfig = LogConfig()
    parallel: ParallelConfig = ParallelConfig()

    def __post_init__(self) -> None:
        seq_len, chunk_size = self.run.seq_len, self.model.chunk_size
        if self.data.rows == "streams" and seq_len % chunk_size and chunk_size % seq_len:
            raise ConfigError(
                f"run.seq_len = {seq_len}: streams need a multiple or a divisor of model.chunk_size = {chunk_size}"
            )
        if self.data.end_token is not None and self.data.end_token >= self.model.vocab_size:
            raise ConfigError(f"data.end_token = {self.data.end_token} is not below vocab_size {self.model.vocab_size}")

    @classmethod
    def from_tables(cls, tables: Table) -> TrainConfig:
        """Raises `ConfigError` for unknown sections and settings, naming the nearest."""
        refuse_unknown(tables, ["model", *SECTIONS])
        for name, table in tables.items():
            if not isinstance(table, dict):
                raise ConfigError(f"{name} = {table!r}: expected a table, [{name}]")
        sections: dict[str, Any] = {
            name: section.from_table(tables.get(name, {})) for name, section in SECTIONS.items()
        }
        model = _model(tables.get("model", {}), sections["data"], sections["run"])
        return cls(model=model, **sections)

    @classmethod
    def load(cls, path: Path | None = None, assignments: Sequence[str] = ()) -> TrainConfig:
        """From a file, if any, and `section.key=value` texts."""
        return cls.from_tables(override(read_toml(path) if path else {}, assignments))

    def to_toml(self) -> str:
        """All settings, with their documentation; `load` reads it back."""
        sections = {name: section_values(getattr(self, name)) for name in SECTIONS}
        return to_toml({"model": (self.model.to_dict(), {}), **sections})


SECTIONS: dict[str, type[Section]] = {
    "data": DataConfig,
    "run": RunConfig,
    "optimizer": OptimizerConfig,
    "checkpoint": CheckpointConfig,
    "evaluation": EvaluationConfig,
    "log": LogConfig,
    "parallel": ParallelConfig,
}
assert list(SECTIONS) == [section.title() for section in SECTIONS.values()], "Bug: a section's name"


def byte_model(preset: str | None = None, **values: Any) -> MegalodonConfig:
    """A byte-level model: a preset, or a small one whose widths follow D as Z = D/2, E = 2D, F = 3D, G = D/16.

    `values` replaces single fields of `MegalodonConfig`. The default has about one million parameters, which two CPU
    cores train in two minutes. Raises `ConfigError` when the dimensions contradict each other.
    """
    return model_config({**({} if preset is None else {_PRESET: preset}), **values}, BYTE_VOCABULARY)


def model_config(table: Mapping[str, Any], vocab_size: int) -> MegalodonConfig:
    """The model of a `[model]` table; `vocab_size` is the tokenizer's."""
    refuse_unknown(table, [_PRESET, *MegalodonConfig.__dataclass_fields__], "model")
    values = {key: value for key, value in table.items() if key != _PRESET}
    if table.get(_PRESET) is not None:
        return MegalodonConfig.preset(str(table[_PRESET]), **({"vocab_size": vocab_size} | values))
    dim = values.setdefault("model_dim", 128)
    if isinstance(dim, bool) or not isinstance(dim, int) or dim < _GROUP_DIM or dim % _GROUP_DIM:
        raise ConfigError(f"model.model_dim = {dim!r} is not a multiple of {_GROUP_DIM}; give a preset or all widths")
    small = {
        "vocab_size": vocab_size,
        "num_layers": 4,
        "num_heads": 1,
        "z_dim": dim // 2,
        "value_dim": 2 * dim,
        "ffn_hidden_dim": 3 * dim,
        "chunk_size": 128,
        "norm_num_groups": dim // _GROUP_DIM,
    }
    return MegalodonConfig.from_dict(small | values)


def _model(table: Mapping[str, Any], data: DataConfig, run: RunConfig) -> MegalodonConfig:
    from megalodon_deploy.train.data.tokens import open_training_tokenizer

    if run.start_from is not None:
        from megalodon_deploy.model.checkpoint import read_checkpoint

        config = read_checkpoint(run.start_from).config
        if differing := [key for key, value in table.items() if config.to_dict().get(key) != value]:
            raise ConfigError(f"model.{differing[0]} is not that of run.start_from = {run.start_from}; leave it out")
        return config
    num_tokens = open_training_tokenizer(data.tokenizer).num_tokens
    return model_config(table, max(num_tokens, 0 if data.end_token is None else data.end_token + 1))


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One point of the learning curve; losses in nats per token."""

    step: int
    seconds: float  # of training, without what came before a resumption
    train_loss: float  # mean over the latest steps
    held_out_loss: float
    bits_per_byte: float  # of held-out text


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What a run did; losses in nats per token."""

    path: Path  # the run's folder, which is a checkpoint too: the latest
    num_parameters: int
    num_train_tokens: int  # in the data set
    num_held_out_tokens: int
    steps: int
    tokens: int  # trained on
    seconds: float
    first_loss: float | None  # None: interrupted before the first step
    train_loss: float | None  # mean over the latest steps
    held_out_loss: float | None  # None: interrupted before the first evaluation
    bits_per_byte: float | None
    interrupted: bool  # stopped by a signal; the checkpoint is there
    curve: tuple[Measurement, ...]

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dataclasses.asdict(self) | {"path": str(self.path), "tokens_per_second": self.tokens_per_second}


def setting_docs() -> list[tuple[str, str, str]]:
    """(section.key, default, documentation) of every setting but the model's."""
    rows = []
    for title, section in SECTIONS.items():
        for field, _ in fields(section):
            default = "required" if field.default is dataclasses.MISSING else repr(field.default)
            rows.append((f"{title}.{field.name}", default, field.metadata["doc"]))
    return rows
