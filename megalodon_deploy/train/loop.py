"""From a configuration to a trained checkpoint: the order of things, and what can go wrong before and during them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from megalodon_deploy.cpus import usable_cpus
from megalodon_deploy.errors import TrainError
from megalodon_deploy.model.checkpoint import TokenizerSource
from megalodon_deploy.parameters import num_parameters
from megalodon_deploy.tokenizers import Tokenizer
from megalodon_deploy.train.checkpoints import BackgroundWriter, RunFolder
from megalodon_deploy.train.config import BYTES, TrainConfig, TrainResult
from megalodon_deploy.train.data.rows import split
from megalodon_deploy.train.data.tokens import TokenStore, open_tokens, open_training_tokenizer
from megalodon_deploy.train.interrupt import stop_on_signal
from megalodon_deploy.train.log import RunLog, check_packages
from megalodon_deploy.train.parallel.launch import open_plan
from megalodon_deploy.train.plan import Plan
from megalodon_deploy.train.sample import sample_text
from megalodon_deploy.train.trainer import Trainer

Progress = Callable[[str, float], None]


def run(config: TrainConfig, progress: Progress | None, *, resume: bool, overwrite: bool) -> TrainResult:
    """Train as told; checkpoints and logs go to `config.run.out`, described in `train.checkpoints`.

    With `resume` an earlier run there goes on exactly where its latest checkpoint was; with `overwrite` it is
    removed. Raises `TrainError` for data that cannot be used, for an output that exists already, and for a loss that
    is not finite or far above that of a uniform guess; the last checkpoint then stays.
    """
    report = progress or (lambda stage, fraction: None)
    folder = RunFolder(config.run.out, config.checkpoint.keep)
    _check_out(folder, resume=resume, overwrite=overwrite)
    check_packages(config.log)
    tokenizer = open_training_tokenizer(config.data.tokenizer)
    if tokenizer.num_tokens > config.model.vocab_size:
        raise TrainError(
            f"model.vocab_size = {config.model.vocab_size}, but data.tokenizer = {config.data.tokenizer} has "
            f"{tokenizer.num_tokens} tokens; raise the one or change the other"
        )
    with (
        open_plan(config, _device(config.run.device)) as plan,
        _threads(config.run.threads),
        stop_on_signal() as stop,
    ):
        session = Session(config, folder, _open_tokens_once(config, plan, report), tokenizer, plan)
        session.start(resume=resume)
        try:
            while not (interrupted := plan.any(stop.is_set())) and session.trainer.fraction < 1:
                session.step(report)
            session.finish(interrupted=interrupted)
        finally:
            session.close()
        return session.result(interrupted=interrupted)


def _open_tokens_once(config: TrainConfig, plan: Plan, report: Progress) -> TokenStore:
    """Rank 0 tokenises, the others read what it wrote."""
    if plan.rank != 0:
        plan.barrier()
    store = open_tokens(config.data, report)
    if plan.rank == 0:
        plan.barrier()
    return store


class Session:
    """One process's part of a run from start, or resumption, to end."""

    def __init__(
        self, config: TrainConfig, folder: RunFolder, store: TokenStore, tokenizer: Tokenizer, plan: Plan
    ) -> None:
        self.config, self.folder, self.store, self.tokenizer, self.plan = config, folder, store, tokenizer, plan
        self.train_part, self.held_out_part = split(store, config.data.held_out_fraction)
        self.trainer = Trainer(config, self.train_part, self.held_out_part, plan)
        self.writer = BackgroundWriter()
        self.saved_step: int | None = None
        self.log: RunLog | None = None  # on rank 0

    def start(self, *, resume: bool) -> None:
        """Everything that could refuse the data has happened: only now an earlier run is removed or continued."""
        steps = self.folder.steps()
        if resume and steps:
            progress = self.folder.read_progress(steps[-1])
            _check_same_run(progress["identity"], self._identity())
            self.trainer.restore(self.folder, progress)
            self.saved_step = steps[-1]
        if self.plan.rank == 0:
            if not resume:
                self.folder.clear()
            self.folder.begin(self.config.to_toml())
            if self.saved_step is not None:
                self.folder.link(self.trainer.best_step)  # a kill may have come between checkpoint and link
            self.log = RunLog(self.config.run.out, self.config.log, self.trainer.num_steps)
        self.plan.barrier()

    def step(self, report: Progress) -> None:
        trainer = self.trainer
        try:
            trainer.step()
            evaluated = trainer.is_evaluation_due()
            if evaluated:
                trainer.evaluate()
        except TrainError as error:
            raise self._diverged(error) from error
        if trainer.is_checkpoint_due(evaluated=evaluated):
            self._save()
        self._write_log(evaluated=evaluated)
        report(trainer.stage(), trainer.fraction)

    def finish(self, *, interrupted: bool) -> None:
        """The last checkpoint, after a last evaluation unless a signal asks for haste."""
        trainer = self.trainer
        evaluated = trainer.is_evaluated
        if self.saved_step != trainer.num_steps or not (evaluated or interrupted):
            if not (evaluated or interrupted):
                trainer.evaluate()
                self._write_log(evaluated=True)
            self._save()
        self.writer.wait()

    def close(self) -> None:
        self.writer.close()
        if self.log:
            self.log.close()

    def _write_log(self, *, evaluated: bool) -> None:
        trainer, settings = self.trainer, self.config.log
        if self.log and (evaluated or trainer.num_steps % settings.every_steps == 0):
            self.log.write(trainer.log_line())
        if self.log and evaluated:
            self.log.draw()
        if evaluated and settings.sample_tokens:  # on every rank: none may have the whole model
            seed = self.config.run.seed + trainer.num_steps
            with self.plan.reading():
                text = sample_text(trainer.model, self.tokenizer, settings.sample_prompt, settings.sample_tokens, seed)
            if self.log:
                self.log.sample(trainer.num_steps, text)

    def _save(self) -> None:
        """Copy the state now, write it in the background."""
        trainer = self.trainer
        snapshot = trainer.capture()
        self.saved_step = trainer.num_steps
        if snapshot is None:
            return
        progress = {"identity": self._identity(), **trainer.progress()}
        described = self.config.model, snapshot, progress, _tokenizer_source(self.config), trainer.best_step
        self.writer.submit(self.folder.write, trainer.num_steps, *described, self.plan.checkpoint_group)

    def _identity(self) -> dict[str, Any]:
        """What a resumed run must have in common with the one before."""
        config = self.config
        return {
            "model": config.model.to_dict(),
            "data": self.store.name,
            "data.held_out_fraction": config.data.held_out_fraction,
            "data.rows": config.data.rows,
            "run.seq_len": config.run.seq_len,
            "run.batch_size": config.run.batch_size,
            "run.seed": config.run.seed,
        }

    def _diverged(self, error: TrainError) -> TrainError:
        self.writer.wait()
        steps = self.folder.steps()
        kept = f"{self.folder.path(steps[-1])} keeps the last good checkpoint" if steps else "no checkpoint was written"
        return TrainError(f"{error}; {kept}")

    def result(self, *, interrupted: bool) -> TrainResult:
        trainer = self.trainer
        latest = trainer.curve[-1] if trainer.curve else None
        return TrainResult(
            path=self.config.run.out,
            num_parameters=num_parameters(self.config.model),
            num_train_tokens=self.train_part.num_tokens,
            num_held_out_tokens=self.held_out_part.num_tokens,
            steps=trainer.num_steps,
            tokens=trainer.num_tokens,
            seconds=trainer.seconds,
            first_loss=trainer.first_loss,
            train_loss=trainer.train_loss,
            held_out_loss=latest.held_out_loss if latest else None,
            bits_per_byte=latest.bits_per_byte if latest else None,
            interrupted=interrupted,
            curve=tuple(trainer.curve),
        )


def _check_out(folder: RunFolder, *, resume: bool, overwrite: bool) -> None:
    """Refuse, before hours of work, an output that cannot be written; only a run is ever removed."""
    if resume and overwrite:
        raise TrainError("--resume goes on with an earlier run, --overwrite removes it; choose one")
    if not folder.out.exists() or (folder.out.is_dir() and not any(folder.out.iterdir())):
        return
    if not folder.is_run:
        raise TrainError(f"{folder.out} exists and is no training run; choose another run.out")
    if not (resume or overwrite):
        raise TrainError(f"{folder.out} exists already; choose another run.out, or add --resume or --overwrite")


def _check_same_run(before: dict[str, Any], now: dict[str, Any]) -> None:
    for name, value in now.items():
        if before.get(name) != value:
            raise TrainError(
                f"{name} = {value}, the earlier run had {before.get(name)}; keep that, or choose another run.out"
            )


def _tokenizer_source(config: TrainConfig) -> TokenizerSource:
    stop_tokens = () if config.data.end_token is None else (config.data.end_token,)
    if config.data.tokenizer == BYTES:
        return TokenizerSource("bytes", None, stop_tokens)
    path = Path(config.data.tokenizer)
    return TokenizerSource("tokenizer.json" if path.suffix == ".json" else "sentencepiece", path, stop_tokens)


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise TrainError(f"run.device = {name!r}: PyTorch cannot use it here ({str(error).splitlines()[0]})") from error
    return device


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Let PyTorch use `count` threads for a while; None: its own choice, but no more than there are processors."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or min(before, usable_cpus()))
    try:
        yield
    finally:
        torch.set_num_threads(before)
