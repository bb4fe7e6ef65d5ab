"""Bytes to train on: files found, split by file, held in one array each, cut into windows.

A token is a byte. The order of files, the split and the windows depend on names, content and seed alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np

from megalodon_deploy.errors import TrainError


@dataclass(frozen=True)
class Corpus:
    """Training and held-out bytes (uint8, one dimension each); no file is in both."""

    train: np.ndarray
    held_out: np.ndarray
    num_train_files: int


def read_corpus(paths: Sequence[Path], *, glob: str, exclude: Sequence[str], held_out_fraction: float) -> Corpus:
    """Read all files under `paths` and hold out a fraction of them, at least one when there are two.

    A lone file gives its end. Which files are held out depends on their names only, so it stays the same from run to
    run. Raises `TrainError` for a path that does not exist, holds no file or cannot be read.
    """
    files = find_files(paths, glob=glob, exclude=exclude)
    if len(files) == 1:
        content = _read([path for _, path in files])
        cut = len(content) - int(len(content) * held_out_fraction)
        return Corpus(content[:cut], content[cut:], 1)
    num_held_out = max(1, round(len(files) * held_out_fraction))
    ranked = sorted(files, key=lambda file: hashlib.sha256(file[0].encode(errors="surrogateescape")).digest())
    held_out = set(ranked[:num_held_out])
    train = [path for name, path in files if (name, path) not in held_out]
    return Corpus(_read(train), _read([path for name, path in files if (name, path) in held_out]), len(train))


def find_files(paths: Sequence[Path], *, glob: str, exclude: Sequence[str]) -> list[tuple[str, Path]]:
    """(name relative to the given path, path) of every file once, sorted by name. Links to folders are not followed."""
    found: dict[Path, str] = {}
    for root in paths:
        for path in _candidates(root, glob, exclude):
            found.setdefault(path.resolve(), path.name if path == root else path.relative_to(root).as_posix())
    if not found:
        raise TrainError("no file is left to train on; give other --data or fewer --exclude")
    return sorted((name, path) for path, name in found.items())


def _candidates(root: Path, glob: str, exclude: Sequence[str]) -> Iterator[Path]:
    if root.is_file():
        yield root
        return
    if not root.is_dir():
        raise TrainError(f"{root}: no such file or directory; --data takes text files and folders of them")
    try:
        matches = [path for path in root.glob(glob) if path.is_file()]
    except (ValueError, NotImplementedError) as error:
        raise TrainError(f"--glob {glob!r}: {error}; give a pattern such as '**/*.txt'") from error
    if not matches:
        raise TrainError(f"{root}: no file matches {glob!r}; give another --glob or --data")
    for path in matches:
        parts = path.relative_to(root).parts
        if not any(fnmatchcase(part, pattern) for part in parts for pattern in exclude):
            yield path


def _read(files: Sequence[Path]) -> np.ndarray:
    """Content of all files, one after the other, as uint8."""
    content = bytearray()
    for path in files:
        try:
            content += path.read_bytes()
        except OSError as error:
            raise TrainError(f"{path}: cannot be read ({error.strerror}); leave it out with --exclude") from error
    return np.frombuffer(content, np.uint8)


def check_length(corpus: Corpus, window: int) -> None:
    """Raises `TrainError` when there is not one window of `window` bytes to train on, or to evaluate on."""
    for part, content in (("train on", corpus.train), ("hold out", corpus.held_out)):
        if len(content) < window:
            raise TrainError(
                f"{len(content)} bytes to {part}, a window takes {window}; give more --data or a smaller --seq-len"
            )


def random_windows(content: np.ndarray, rng: np.random.Generator, *, count: int, length: int) -> np.ndarray:
    """[count, length] int64 tokens from random places of `content`."""
    return _windows(content, rng.integers(0, len(content) - length + 1, size=count), length)


def spread_windows(content: np.ndarray, *, count: int, length: int) -> np.ndarray:
    """[count, length] int64 tokens from evenly spaced places: the same at every evaluation."""
    return _windows(content, np.linspace(0, len(content) - length, count).astype(np.int64), length)


def _windows(content: np.ndarray, starts: np.ndarray, length: int) -> np.ndarray:
    return content[starts[:, None] + np.arange(length)].astype(np.int64)
