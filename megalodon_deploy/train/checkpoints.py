"""A run's folder on disk, written so that a kill at any moment loses nothing but the steps since the last checkpoint.

    config.toml                    what the run was told
    checkpoints/step-00000100/     a native checkpoint: config.json, model.safetensors, tokenizer
        training/progress.json     step, place in the data, random numbers, curve
        training/moments.safetensors    AdamW's moments by weight
        training/stream.safetensors     state of the rows, where it is carried from step to step
        weights/, training/moments/     in the place of model.safetensors and moments.safetensors, with one file of
                                        each rank, where ranks write their own parts
    latest, best                   links to two of them
    log.csv, loss.svg, samples/, tensorboard/

A checkpoint appears by one rename, so it is whole or absent; what a killed run left half-written has a name that
begins with a dot and is removed when the run goes on.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch import distributed as dist

from megalodon_deploy.config import MegalodonConfig
from megalodon_deploy.errors import CheckpointError, TrainError
from megalodon_deploy.files import atomic_directory, atomic_file
from megalodon_deploy.model.checkpoint import TokenizerSource
from megalodon_deploy.model.checkpoint.native import (
    PARTS_FOLDER,
    WEIGHTS_FILE,
    save_tensors,
    write_config,
    write_native,
)
from megalodon_deploy.model.checkpoint.parts import open_parts
from megalodon_deploy.model.checkpoint.recognise import LATEST_OF_RUN
from megalodon_deploy.model.checkpoint.tensor_file import open_tensor_file
from megalodon_deploy.train.config import CONFIG_FILE
from megalodon_deploy.train.parts import load_parts, save_parts
from megalodon_deploy.train.plan import Snapshot

LATEST, BEST = LATEST_OF_RUN, "best"
_CHECKPOINTS, _TRAINING = "checkpoints", "training"
_PROGRESS, _MOMENTS, _STREAM = "progress.json", "moments.safetensors", "stream.safetensors"
_MOMENT_PARTS = "moments"
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
        group: dist.ProcessGroup | None = None,
    ) -> None:
        """One checkpoint, then the links, then what is not kept any more is removed.

        With a group all its ranks call it, each with its own snapshot: each writes its parts, the first one the rest.
        """
        with _shared_directory(self.path(step), group) as directory:
            training = directory / _TRAINING
            if group is None:
                write_native(directory, config, snapshot.weights, tokenizer)
                training.mkdir()
                save_tensors(snapshot.moments, training / _MOMENTS)
            else:
                save_parts(directory / PARTS_FOLDER, snapshot.weights, group)
                save_parts(training / _MOMENT_PARTS, snapshot.moments, group)
                if group.rank() != 0:
                    return
                parts = sorted(file.name for file in (directory / PARTS_FOLDER).iterdir())
                write_config(directory, config, tokenizer, parts)
            if tokenizer.file:
                shutil.copyfile(tokenizer.file, directory / tokenizer.file.name)
            save_tensors(snapshot.stream, training / _STREAM)
            (training / _PROGRESS).write_text(json.dumps(progress, indent=1) + "\n", encoding="utf-8")
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

    def read_tensors(self, step: int, weights: Mapping[str, Tensor], moments: Mapping[str, Tensor]) -> None:
        """Fill weights and moments, each the whole or this rank's part. Raises `TrainError` when a file is damaged."""
        directory = self.path(step)
        training = directory / _TRAINING
        with _damage(directory):
            if (directory / PARTS_FOLDER).is_dir():
                _read_parts(directory / PARTS_FOLDER, weights)
                _read_parts(training / _MOMENT_PARTS, moments)
            else:
                _read_file(directory / WEIGHTS_FILE, weights)
                _read_file(training / _MOMENTS, moments)

    def read_stream(self, step: int) -> dict[str, Tensor]:
        """State of all rows; empty where none is carried. Raises `TrainError` when the file is damaged."""
        directory = self.path(step)
        with _damage(directory):
            return load_file(directory / _TRAINING / _STREAM)

    def _link(self, name: str, step: int) -> None:
        temporary = self.out / f".{name}.new"
        temporary.unlink(missing_ok=True)
        os.symlink(self.path(step).relative_to(self.out), temporary, target_is_directory=True)
        os.replace(temporary, self.out / name)


@contextmanager
def _shared_directory(target: Path, group: dist.ProcessGroup | None) -> Iterator[Path]:
    """As `atomic_directory`, one for all ranks of a group: that of the first, which renames it when it is done."""
    if group is None or group.rank() == 0:
        with atomic_directory(target, overwrite=True) as directory:
            if group is not None:
                dist.broadcast_object_list([str(directory)], group=group, group_src=0)
            yield directory
        return
    name: list[str] = [""]
    dist.broadcast_object_list(name, group=group, group_src=0)
    yield Path(name[0])


@contextmanager
def _damage(directory: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, SafetensorError, CheckpointError) as error:
        raise TrainError(f"{directory}: damaged ({error}); remove it to go on from the one before") from error


def _read_file(path: Path, tensors: Mapping[str, Tensor]) -> None:
    if tensors:
        open_tensor_file(path)  # tells damage in a line
        load_parts(path.parent, tensors)


def _read_parts(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    if tensors:
        # PyTorch would leave as it was what no file has.
        open_parts(
            sorted(folder.glob("*.safetensors")), {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        )
        load_parts(folder, tensors)


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
