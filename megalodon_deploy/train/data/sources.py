"""Documents: text files, JSON Lines and Arrow data sets, found in folders and read one by one.

The order of documents depends on names alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from megalodon_deploy.errors import MissingDependencyError, TrainError
from megalodon_deploy.train.config import DataConfig

_JSON_LINES = (".jsonl", ".ndjson")
_ARROW_MARKS = ("state.json", "dataset_dict.json")  # of a data set written by `datasets.save_to_disk`
_ARROW = ".arrow"


@dataclass(frozen=True)
class Source:
    """One file of documents; `name` is relative to the path that the user gave."""

    name: str
    path: Path


def find_sources(data: DataConfig) -> list[Source]:
    """Every file once, sorted by name. Links to folders are not followed, hidden files are not taken.

    Raises `TrainError` for a path that does not exist or holds no such file.
    """
    found: dict[Path, Source] = {}
    for root in data.paths:
        for path in _candidates(root, data):
            name = path.name if path == root else path.relative_to(root).as_posix()
            found.setdefault(path.resolve(), Source(name, path))
    if not found:
        raise TrainError("no file is left to train on; give other data.paths or fewer in data.exclude")
    return sorted(found.values(), key=lambda source: (source.name, str(source.path)))


def _candidates(root: Path, data: DataConfig) -> Iterator[Path]:
    if root.is_file():
        yield root
        return
    if not root.is_dir():
        raise TrainError(f"{root}: no such file or folder; data.paths takes text files and folders of them")
    is_data_set = any((root / mark).is_file() for mark in _ARROW_MARKS)
    pattern = f"**/*{_ARROW}" if is_data_set else data.glob
    try:
        matches = [path for path in root.glob(pattern) if path.is_file()]
    except (ValueError, NotImplementedError) as error:
        raise TrainError(f"data.glob = {pattern!r}: {error}; give a pattern such as '**/*.txt'") from error
    visible = [path for path in matches if not any(part.startswith(".") for part in path.relative_to(root).parts)]
    if not visible:
        raise TrainError(f"{root}: no file matches {pattern!r}; give another data.glob or data.paths")
    for path in visible:
        parts = path.relative_to(root).parts
        if not any(fnmatchcase(part, excluded) for part in parts for excluded in data.exclude):
            yield path


def read_documents(source: Source, data: DataConfig) -> Iterator[str]:
    """The texts of one file. Raises `TrainError` naming file and place for what cannot be read."""
    try:
        if source.path.suffix == _ARROW:
            yield from _arrow_texts(source.path, data.text_field)
        elif source.path.suffix in _JSON_LINES:
            yield from _json_texts(source.path, data)
        else:
            text = _decode(source.path.read_bytes(), str(source.path), data)
            if text is not None:
                yield text
    except OSError as error:
        raise TrainError(f"{source.path}: cannot be read ({error.strerror}); leave it out: data.exclude") from error


def _decode(content: bytes, where: str, data: DataConfig) -> str | None:
    """None: skipped."""
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        if data.invalid_utf8 == "refuse":
            raise TrainError(
                f"{where}: byte 0x{content[error.start]:02x} at {error.start} is not UTF-8; leave the file out with "
                "data.exclude, or set data.invalid_utf8 to skip or replace"
            ) from error
        return None if data.invalid_utf8 == "skip" else content.decode("utf-8", errors="replace")


def _json_texts(path: Path, data: DataConfig) -> Iterator[str]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            where = f"{path}:{number}"
            decoded = _decode(line, where, data)
            if decoded is None or not decoded.strip():
                continue
            try:
                row = json.loads(decoded)
            except ValueError as error:
                raise TrainError(f"{where}: not JSON ({error})") from error
            text = row.get(data.text_field) if isinstance(row, dict) else None
            if not isinstance(text, str):
                raise TrainError(f"{where}: no text in the field {data.text_field!r}; set data.text_field")
            yield text


def _arrow_texts(path: Path, text_field: str) -> Iterator[str]:
    try:
        import pyarrow as arrow
    except ImportError as error:
        raise MissingDependencyError(
            f"{path.name} needs the package pyarrow: pip install 'megalodon-deploy[datasets]'"
        ) from error
    with arrow.memory_map(str(path)) as file:
        try:
            batches: Any = arrow.ipc.open_stream(file)
        except arrow.ArrowInvalid as error:
            raise TrainError(f"{path}: not an Arrow stream ({error})") from error
        if text_field not in batches.schema.names:
            raise TrainError(
                f"{path}: no field {text_field!r}; there are: {', '.join(batches.schema.names)}; set data.text_field"
            )
        for batch in batches:
            for text in batch.column(text_field).to_pylist():
                if not isinstance(text, str):
                    raise TrainError(f"{path}: the field {text_field!r} holds {type(text).__name__}, expected text")
                yield text
