"""The folder of packed weights in the user's cache: entries are whole, and together not larger than the user wants.

onnxruntime.lock    held by the process that writes or removes entries
onnxruntime/KEY/    an entry, by all that it depends on
  model.onnx        graph with packed weights in
  model.onnx.data
  files.json        their sizes and hashes; its date is that of the last use; locked by every process that uses it
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, BinaryIO

from megalodon_deploy.bundle import MODEL_FILE, WEIGHTS_FILE, FileEntry
from megalodon_deploy.console import format_bytes
from megalodon_deploy.engine.library import cache_dir
from megalodon_deploy.errors import EngineError

if TYPE_CHECKING:
    from megalodon_deploy.bundle import Bundle

LIMIT_VARIABLE = "MEGALODON_PACKED_WEIGHTS_GIB"
RECORD_FILE = "files.json"
_DEFAULT_LIMIT_GIB = 64
_COPIES = 2  # the file holds matrices as they were, too


@dataclass(frozen=True)
class PackedEntry:
    folder: Path
    size_bytes: int
    used_seconds: float  # when last, since 1970; 0 where that is not known

    @classmethod
    def of(cls, folder: Path) -> PackedEntry:
        size_bytes, used_seconds = 0, 0.0
        with suppress(OSError):  # it is being removed, or has no record
            size_bytes = sum(file.stat().st_size for file in folder.iterdir())
            used_seconds = (folder / RECORD_FILE).stat().st_mtime
        return cls(folder, size_bytes, used_seconds)


def packed_root() -> Path:
    return cache_dir() / "onnxruntime"


def list_entries() -> list[PackedEntry]:
    """Finished entries, the one used longest ago first."""
    entries = [PackedEntry.of(folder) for folder in packed_root().glob("[!.]*")]
    return sorted(entries, key=lambda entry: entry.used_seconds)


def limit_bytes() -> int:
    """What entries may take together. Raises `EngineError` for a variable that is no size."""
    text = os.environ.get(LIMIT_VARIABLE) or str(_DEFAULT_LIMIT_GIB)
    with suppress(ValueError):
        if math.isfinite(limit := float(text)) and limit >= 0:
            return int(limit * (1 << 30))
    raise EngineError(f"{LIMIT_VARIABLE} = {text!r} is not a number of GiB, such as 20 or 0.5")


def use_entry(folder: Path, *, verify_hashes: bool) -> BinaryIO | None:
    """Something to hold while the entry is used; None where there is none, or one whose sizes or hashes differ."""
    try:
        record = open(folder / RECORD_FILE, "rb")  # noqa: SIM115  # the lock goes when it is closed
    except OSError:
        return None
    _lock(record, is_shared=True)
    if not _is_whole(folder, record.read(), verify_hashes):
        record.close()
        return None
    with suppress(OSError):  # a folder that only others may write to
        os.utime(folder / RECORD_FILE)
    return record


def _lock(file: IO[Any], *, is_shared: bool = False, waits: bool = True) -> None:
    """Until the file is closed; nothing where the system has no such locks, as Windows. Raises `BlockingIOError`."""
    with suppress(ImportError):
        import fcntl

        fcntl.flock(file, (fcntl.LOCK_SH if is_shared else fcntl.LOCK_EX) | (0 if waits else fcntl.LOCK_NB))


def _is_whole(folder: Path, record: bytes, verify_hashes: bool) -> bool:
    try:
        for name, values in json.loads(record)["files"].items():
            entry, path = FileEntry(**values), folder / name
            if path.stat().st_size != entry.size_bytes or (verify_hashes and FileEntry.of(path) != entry):
                return False
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # removed meanwhile, or no record
        return False
    return True


def write_record(folder: Path, bundle: Bundle) -> None:
    """Finish an entry."""
    files = {name: asdict(FileEntry.of(folder / name)) for name in (MODEL_FILE, WEIGHTS_FILE)}
    (folder / RECORD_FILE).write_text(json.dumps({"bundle": bundle.manifest.name, "files": files}, indent=2) + "\n")


@contextmanager
def changing_entries() -> Iterator[None]:
    """One process at a time. Raises `EngineError` where the folder cannot be written."""
    root = packed_root()
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = open(root.with_suffix(".lock"), "w")  # noqa: SIM115
    except OSError as error:
        raise EngineError(f"{root}: cannot write there ({error.strerror}); set XDG_CACHE_HOME") from error
    with lock:
        _lock(lock)
        yield


def make_room(bundle: Bundle) -> None:
    """Remove what was used longest ago, and by no process now, until an entry of this bundle is within the limit.

    Raises `EngineError` where it never is, or where the disk is too full.
    """
    needed, limit, root = _COPIES * bundle.manifest.files[WEIGHTS_FILE].size_bytes, limit_bytes(), packed_root()
    if needed > limit:
        raise EngineError(
            f"{root}: shared weights of {bundle.path} take {format_bytes(needed)}, {LIMIT_VARIABLE} allows "
            f"{format_bytes(limit)}; raise it, or leave out share_weights"
        )
    for leftover in root.glob(".*"):  # of processes that were killed
        shutil.rmtree(leftover, ignore_errors=True)
    entries = list_entries()
    total = sum(entry.size_bytes for entry in entries)
    for entry in entries:
        if total + needed > limit and _remove_unused(entry.folder):
            total -= entry.size_bytes
    if (free := shutil.disk_usage(root).free) < needed:
        raise EngineError(
            f"{root}: shared weights take {format_bytes(needed)} of disk, {format_bytes(free)} are free; "
            "make room, set XDG_CACHE_HOME, or leave out share_weights"
        )


def _remove_unused(folder: Path) -> bool:
    """Whether it was removed: for others at once, by a change of its name."""
    try:
        with open(folder / RECORD_FILE, "r+b") as record:
            _lock(record, waits=False)
            _remove(folder)
    except FileNotFoundError:  # an entry that nobody can use
        _remove(folder)
    except OSError:  # somebody uses it, or it is somebody else's
        return False
    return True


def _remove(folder: Path) -> None:
    hidden = folder.with_name(f".{folder.name}.old")
    os.rename(folder, hidden)
    shutil.rmtree(hidden, ignore_errors=True)
