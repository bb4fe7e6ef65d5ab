"""A run's folder on disk, written so that a kill at any moment loses nothing but the steps since the last checkpoint.

    config.toml                    what the run was told
    checkpoints/step-00000100/     a native checkpoint: config.json, model.safetensors, tokenizer
        training/progress.json     step, place in the data, random numbers, curve
        training/moments.safetensors    AdamW's moments by weight
        training/stream.safetensors     state of the rows, where it is carried from step to step
    latest, best                   links to two of them
    log.csv, loss.svg, samples/, tensorboard/

A checkpoint appears by one rename, so it is whole or absent; what a killed run left half-written has a name that
begins with a dot and is removed when the run goes on.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from megalodon_deploy.config import MegalodonConfig
from megalodon_deploy.errors import TrainError
from megalodon_deploy.files import atomic_directory, atomic_file
from megalodon_deploy.model.checkpoint import TokenizerSource
from megalodon_deploy.model.checkpoint.native import WEIGHTS_FILE, write_native
from megalodon_deploy.model.checkpoint.recognise import LATEST_OF_RUN
from megalodon_deploy.train.plan import Snapshot

CONFIG_FILE = "config.toml"
LATEST, BEST = LATEST_OF_RUN, "best"
_CHECKPOINTS, _TRAINING = "checkpoints", "training"
_PROGRESS, _MOMENTS, _STREAM = "progress.json", "moments.safetensors", "stream.safetensors"
_PREFIX = "step-"
_OURS = (_CHECKPOINTS, LATEST, BEST, CONFIG_FILE, "log.csv", "loss.svg", "samples", "tensorboard")


class RunFolder:
    """Checkpoints of one run: the latest `keep` ones and the best."""

    def __init__(self, out: Path, keep: int) -> None:
        self.out = out
        self.keep = keep
        self.folder = out / _CHECKPOINTS

    @property
    def is_run(self) -> bool:
        return (self.out / CONFIG_FILE).is_file()

    def begin(self, config_toml: str) -> None:
        """Write the configuration and remove what a killed run left half-written."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for leftover in self.folder.glob(f".{_PREFIX}*"):
            shutil.rmtree(leftover, ignore_errors=True)
        with atomic_file(self.out / CONFIG_FILE) as path:
            path.write_text(config_toml, encoding="utf-8")

    def clear(self) -> None:
        """Remove an earlier run, and nothing that is not a run's. The configuration goes last: without it the folder
        would not be known as a run, were this interrupted."""
        for name in sorted(_OURS, key=lambda name: name == CONFIG_FILE):
            path = self.out / name
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def steps(self) -> list[int]:
        """Steps of all checkpoints, ascending."""
        names = [path.name.removeprefix(_PREFIX) for path in self.folder.glob(f"{_PREFIX}*")]
        return sorted(int(name) for name in names if name.isdigit())

    def path(self, step: int) -> Path:
        return self.folder / f"{_PREFIX}{step:08d}"

    def write(
        self,
        step: int,
        config: MegalodonConfig,
        snapshot: Snapshot,
        progress: Mapping[str, Any],
        tokenizer: TokenizerSource,
        best_step: int | None,
    ) -> None:
        """One checkpoint, then the links, then what is not kept any more is removed."""
        with atomic_directory(self.path(step), overwrite=True) as directory:
            write_native(directory, config, snapshot.weights, tokenizer)
            if tokenizer.file:
                shutil.copyfile(tokenizer.file, directory / tokenizer.file.name)
            (directory / _TRAINING).mkdir()
            save_file(snapshot.moments, directory / _TRAINING / _MOMENTS)
            save_file(snapshot.stream, directory / _TRAINING / _STREAM)
            (directory / _TRAINING / _PROGRESS).write_text(json.dumps(progress, indent=1) + "\n", encoding="utf-8")
        self.link(best_step)
        for old in self.steps()[: -self.keep]:
            if old != best_step:
                hidden = self.folder / f".{_PREFIX}{old:08d}.removed"
                os.rename(self.path(old), hidden)
                shutil.rmtree(hidden)

    def link(self, best_step: int | None) -> None:
        """Let `latest` and `best` lead to their checkpoints, of which there is one at least."""
        steps = self.steps()
        self._link(LATEST, steps[-1])
        if best_step in steps:
            self._link(BEST, best_step)

    def read_progress(self, step: int) -> dict[str, Any]:
        """Raises `TrainError` when the file is damaged."""
        path = self.path(step) / _TRAINING / _PROGRESS
        try:
            progress: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise TrainError(f"{path}: damaged ({error}); remove {path.parents[1]} to go on before it") from error
        return progress

    def read_snapshot(self, step: int) -> Snapshot:
        directory = self.path(step)
        files = (directory / WEIGHTS_FILE, directory / _TRAINING / _MOMENTS, directory / _TRAINING / _STREAM)
        try:
            return Snapshot(*(load_file(path) for path in files))
        except (OSError, SafetensorError) as error:
            raise TrainError(f"{directory}: damaged ({error}); remove it to go on from the one before") from error

    def _link(self, name: str, step: int) -> None:
        temporary = self.out / f".{name}.new"
        temporary.unlink(missing_ok=True)
        os.symlink(self.path(step).relative_to(self.out), temporary, target_is_directory=True)
        os.replace(temporary, self.out / name)


class BackgroundWriter:
    """One write at a time on a thread of its own; an error in it is raised at the next call."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[None] | None = None

    def submit(self, write: Any, *arguments: Any) -> None:
        self.wait()
        self._pending = self._pool.submit(write, *arguments)

    def wait(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Wait, without raising."""
        self._pool.shutdown()
