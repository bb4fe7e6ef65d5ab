"""The training loop: AdamW in float32 on random windows, one process.

B windows of T tokens; V = 256 logits. Losses are in nats per byte: mean cross-entropy of the next byte.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch.nn import functional

from megalodon_deploy.cpus import usable_cpus
from megalodon_deploy.errors import CheckpointError, TrainError
from megalodon_deploy.model.checkpoint import TokenizerSource, read_checkpoint, save_checkpoint
from megalodon_deploy.model.megalodon import Megalodon
from megalodon_deploy.parameters import num_parameters
from megalodon_deploy.train.config import Measurement, TrainConfig, TrainResult
from megalodon_deploy.train.data import Corpus, check_length, random_windows, read_corpus, spread_windows
from megalodon_deploy.train.interrupt import stop_on_signal
from megalodon_deploy.train.schedule import learning_rate, run_fraction

Progress = Callable[[str, float], None]

ADAM_BETAS = (0.9, 0.95)
ADAM_EPSILON = 1e-8
_BYTES = TokenizerSource("bytes", None, ())
_SMOOTHED_STEPS = 50  # over which the reported training loss is a mean
_DIVERGED = 2.0  # times the loss of a uniform guess


def run(config: TrainConfig, progress: Progress | None) -> TrainResult:
    """Train as told, and write the native checkpoint at every evaluation and at the end, or when a signal stops it.

    Raises `TrainError` for data that cannot be used, an output that exists already, and for a loss that is not
    finite or far above that of a uniform guess; the last checkpoint then stays.
    """
    _check_out(config)
    report = progress or (lambda stage, fraction: None)
    report("reading the data", 0.0)
    corpus = read_corpus(
        config.data, glob=config.glob, exclude=config.exclude, held_out_fraction=config.held_out_fraction
    )
    check_length(corpus, config.seq_len + 1)
    with _threads(config.threads), stop_on_signal() as stop:
        trainer = Trainer(config, corpus)
        while not stop.is_set() and trainer.fraction < 1:
            trainer.step()
            if trainer.is_evaluation_due():
                trainer.evaluate()
                trainer.save()
            report(trainer.stage(), trainer.fraction)
        if trainer.saved_step != trainer.num_steps:
            if not stop.is_set():
                trainer.evaluate()
            trainer.save()
        return trainer.result(interrupted=stop.is_set())


class Trainer:
    """A run in progress: model, optimiser, random windows and what has been measured."""

    def __init__(self, config: TrainConfig, corpus: Corpus) -> None:
        self.config = config
        self.corpus = corpus
        torch.manual_seed(config.seed)
        self.model = Megalodon(config.model).train()
        # Decay acts on every stored weight, as released: norm weights are stored minus one, so it pulls scales to 1.
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), betas=ADAM_BETAS, eps=ADAM_EPSILON, weight_decay=config.weight_decay
        )
        self.rng = np.random.default_rng(config.seed)
        self.num_steps = 0
        self.first_loss: float | None = None
        self.recent_losses: deque[float] = deque(maxlen=_SMOOTHED_STEPS)
        self.curve: list[Measurement] = []
        self.next_mark = 1  # of `evaluations` evenly spaced ones
        self.saved_step: int | None = None
        self.started = time.monotonic()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    @property
    def fraction(self) -> float:
        return run_fraction(self.config, self.num_steps, self.seconds)

    @property
    def num_tokens(self) -> int:
        return self.num_steps * self.config.batch_size * self.config.seq_len

    @property
    def train_loss(self) -> float | None:
        return sum(self.recent_losses) / len(self.recent_losses) if self.recent_losses else None

    def step(self) -> None:
        """One update. Weights stay as they are when the loss or a gradient is not finite."""
        config = self.config
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(config, self.fraction)
        windows = random_windows(self.corpus.train, self.rng, count=config.batch_size, length=config.seq_len + 1)
        self.optimizer.zero_grad()
        loss = self._loss(windows)
        loss.backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.clip_norm)
        self._check(loss.item(), norm.item())
        self.optimizer.step()
        self.num_steps += 1
        self.recent_losses.append(loss.item())
        if self.first_loss is None:
            self.first_loss = loss.item()

    def is_evaluation_due(self) -> bool:
        """Whether the run has passed the next mark."""
        return self.fraction * self.config.evaluations >= self.next_mark

    @torch.no_grad()
    def evaluate(self) -> None:
        """Add the held-out loss to the curve."""
        config = self.config
        windows = spread_windows(self.corpus.held_out, count=config.evaluation_windows, length=config.seq_len + 1)
        parts = [windows[i : i + config.batch_size] for i in range(0, len(windows), config.batch_size)]
        loss = sum(self._loss(part).item() * len(part) for part in parts) / len(windows)
        self._check(loss)
        self.next_mark = int(self.fraction * config.evaluations) + 1
        assert self.train_loss is not None, "Bug: evaluated before the first step"
        self.curve.append(
            Measurement(step=self.num_steps, seconds=self.seconds, train_loss=self.train_loss, held_out_loss=loss)
        )

    def save(self) -> None:
        """Write the checkpoint, over the one of an earlier save or, when told so, of an earlier run."""
        overwrite = self.config.overwrite or self.saved_step is not None
        save_checkpoint(self.model, self.config.out, tokenizer=_BYTES, overwrite=overwrite)
        self.saved_step = self.num_steps

    def stage(self) -> str:
        """One line about the run, most important first: a narrow terminal cuts its end."""
        held_out = f" (held out {self.curve[-1].held_out_loss:.3f})" if self.curve else ""
        speed = self.num_tokens / self.seconds
        left_seconds = self.seconds * (1 / self.fraction - 1)
        times = f"{speed:,.0f} tokens/s, {left_seconds:.0f} s left, step {self.num_steps}"
        return f"loss {self.train_loss:.3f}{held_out}, {times}"

    def result(self, *, interrupted: bool) -> TrainResult:
        return TrainResult(
            path=self.config.out,
            num_parameters=num_parameters(self.config.model),
            num_train_files=self.corpus.num_train_files,
            num_train_bytes=len(self.corpus.train),
            num_held_out_bytes=len(self.corpus.held_out),
            steps=self.num_steps,
            tokens=self.num_tokens,
            seconds=self.seconds,
            first_loss=self.first_loss,
            train_loss=self.train_loss,
            held_out_loss=self.curve[-1].held_out_loss if self.curve else None,
            interrupted=interrupted,
            curve=tuple(self.curve),
        )

    def _loss(self, windows: np.ndarray) -> torch.Tensor:
        """Mean cross-entropy of windows [B, T + 1] int64."""
        tokens = torch.from_numpy(windows)
        logits_BTV, _ = self.model(tokens[:, :-1])
        return functional.cross_entropy(logits_BTV.flatten(0, 1), tokens[:, 1:].flatten())

    def _check(self, loss: float, gradient_norm: float = 0.0) -> None:
        limit = _DIVERGED * math.log(self.config.model.vocab_size)
        if loss <= limit and math.isfinite(gradient_norm):
            return
        kept = (
            f"{self.config.out} keeps the last good checkpoint"
            if self.saved_step is not None
            else "no checkpoint was written"
        )
        raise TrainError(
            f"training diverged at step {self.num_steps + 1}: loss {loss:.4g}, gradient norm {gradient_norm:.4g}; "
            f"{kept}; use a smaller --lr than {self.config.learning_rate:g}"
        )


def _check_out(config: TrainConfig) -> None:
    """Refuse, before hours of work, an output that cannot be written; only a checkpoint is ever overwritten."""
    if not config.out.exists():
        return
    if not config.overwrite:
        raise TrainError(f"{config.out} exists already; choose another --out or add --overwrite")
    try:
        read_checkpoint(config.out)
    except CheckpointError as error:
        raise TrainError(f"{config.out} is no checkpoint, so it is not overwritten; choose another --out") from error


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Let PyTorch use `count` threads for a while; None: its own choice, but no more than there are processors."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or min(before, usable_cpus()))
    try:
        yield
    finally:
        torch.set_num_threads(before)
