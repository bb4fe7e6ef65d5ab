"""An opened checkpoint: what every layout's reader returns."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch

from megalodon_deploy.bundle import TokenizerKind
from megalodon_deploy.config import MegalodonConfig
from megalodon_deploy.files import sha256_files
from megalodon_deploy.model.checkpoint.tensor_file import TensorFile

Layout = Literal["native", "released", "megalodon-jax", "megalodon-hf"]


class CheckpointWarning(UserWarning):
    """The checkpoint is read, but its author's own code computes something else from it."""


@dataclass(frozen=True)
class LazyTensor:
    """One tensor under its released name and in its released form.

    `load` reads it and raises `CheckpointError` on NaN, infinity, or replicas that differ.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], torch.Tensor]


@dataclass(frozen=True)
class TokenizerSource:
    """The tokenizer that a model was trained with. `file` is where it lies now; bytes need none."""

    kind: TokenizerKind
    file: Path | None = None
    stop_tokens: tuple[int, ...] = ()


@dataclass(frozen=True)
class Checkpoint:
    """Configuration and weights of a checkpoint of any layout; names and shapes are checked, values not yet read."""

    path: Path
    layout: Layout
    config: MegalodonConfig
    tokenizer: TokenizerSource | None  # None: the checkpoint does not say
    files: tuple[TensorFile, ...] = field(repr=False)
    tensors: Mapping[str, LazyTensor] = field(repr=False)  # by released name, in model order

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the weight file's content; of several, sha256 over their hashes in order."""
        return self._fingerprint(lambda: False)

    @contextmanager
    def fingerprinting(self) -> Iterator[Future[str]]:
        """Compute `fingerprint` in a thread beside the block, which reads the same files: it also reads ahead for it.

        What the block did not wait for is given up at its end.
        """
        stopped = threading.Event()
        with ThreadPoolExecutor(1, "fingerprint") as executor:
            try:
                yield executor.submit(self._fingerprint, stopped.is_set)
            finally:
                stopped.set()

    def _fingerprint(self, is_stopped: Callable[[], bool]) -> str:
        hashes = sha256_files([file.path for file in self.files], is_stopped)
        return hashes[0] if len(hashes) == 1 else hashlib.sha256("\n".join(hashes).encode()).hexdigest()

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The tensor `name` of `parameter_specs(config)`, joined over shards, in `dtype` or the stored type.

        Where nothing has to be joined or converted it is a view of the mapped file: the file must not be changed in
        place while the view lives (replacing it is fine). Raises `CheckpointError` as `LazyTensor.load` does.
        """
        stored = self.tensors[name].load()
        tensor = stored if dtype is None else stored.to(dtype)
        if tensor is not stored:
            for file in self.files:
                file.copied(stored.nbytes // len(self.files))
        return tensor
