"""Files that are there whole or not at all, and their hashes."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from safetensors import SafetensorError

_HASH_BLOCK_BYTES = 1 << 20  # stays in a core's cache between reading and hashing


def sha256_file(path: Path) -> str:
    return sha256_files([path])[0]


def sha256_files(paths: Sequence[Path], is_stopped: Callable[[], bool] = lambda: False) -> list[str]:
    """sha256 of each file, all of them read side by side; nobody may take what comes once `is_stopped`."""
    digests = [hashlib.sha256() for _ in paths]
    block = memoryview(bytearray(_HASH_BLOCK_BYTES))
    with ExitStack() as stack:
        unread = [
            (stack.enter_context(open(path, "rb", buffering=0)), digest)
            for path, digest in zip(paths, digests, strict=True)
        ]
        while unread and not is_stopped():
            for pair in list(unread):
                file, digest = pair
                if size := file.readinto(block):
                    digest.update(block[:size])
                else:
                    unread.remove(pair)
    return [digest.hexdigest() for digest in digests]


@contextmanager
def atomic_file(target: Path) -> Iterator[Path]:
    """Yield a temporary path beside `target`; on success it is synced and renamed over it, on error removed.

    A crash at any moment leaves the old file or the new one, never a part. Raises `OSError` naming `target`.
    """
    with _naming(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = _temporary_beside(target)
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))  # with the rights of any new file
        try:
            yield temporary
            _sync(temporary)
            os.replace(temporary, target)
            _sync(target.parent)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_directory(target: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary directory beside `target`; on success it takes the name, on error it is removed.

    Raises `FileExistsError` when the target exists and `overwrite` is false, and `OSError` naming `target` when it
    cannot be written.
    """
    if target.exists() and not overwrite:
        raise FileExistsError(f"{target} exists already")
    with _naming(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = _temporary_beside(target)
        temporary.mkdir()
        try:
            yield temporary
            for file in temporary.rglob("*"):
                _sync(file)
            if overwrite:
                _replace_directory(temporary, target)
            else:
                _name_directory(temporary, target)
            _sync(target.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _temporary_beside(target: Path) -> Path:
    return target.parent / f".{target.name}.{secrets.token_hex(8)}"


@contextmanager
def _naming(target: Path) -> Iterator[None]:
    """Let errors of writing name `target`, not what stands in for it, or nothing; those of safetensors, which are of
    a class of its own, become the `OSError` that they tell of."""
    try:
        yield
    except OSError as error:
        parts = () if error.filename is None else Path(str(error.filename)).parts
        is_other = bool(parts) and not any(part.startswith(f".{target.name}.") for part in parts)
        if error.errno is None or is_other:
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(target)) from error
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(target)) from error


def _name_directory(new: Path, target: Path) -> None:
    try:
        os.rename(new, target)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):  # somebody else made one meanwhile
            raise FileExistsError(f"{target} exists already") from error
        raise


def _replace_directory(new: Path, target: Path) -> None:
    if not target.exists():
        os.rename(new, target)
        return
    old = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.old."))
    os.rename(target, old / target.name)
    try:
        os.rename(new, target)
    except OSError:
        os.rename(old / target.name, target)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
