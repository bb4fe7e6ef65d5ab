"""Old or new, never half."""

from __future__ import annotations

import errno
import hashlib
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from megalodon_deploy.files import atomic_directory, atomic_file, sha256_files


def test_file_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "state.bin"
    with atomic_file(target) as temporary:
        temporary.write_bytes(b"new")
        assert not target.exists()
    assert target.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["state.bin"]


def test_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "state.bin"
    target.write_bytes(b"old")
    with pytest.raises(OSError, match="disk full"), atomic_file(target) as temporary:
        temporary.write_bytes(b"ne")
        raise OSError("disk full")
    assert target.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["state.bin"]


def test_directory_appears_whole_and_is_not_overwritten_unasked(tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    with atomic_directory(target) as temporary:
        (temporary / "a").write_text("1")
    with pytest.raises(FileExistsError, match="bundle"), atomic_directory(target):
        pass
    with atomic_directory(target, overwrite=True) as temporary:
        (temporary / "b").write_text("2")
    assert os.listdir(target) == ["b"]
    assert os.listdir(tmp_path) == ["bundle"]


@pytest.mark.parametrize("kind", ["directory", "file"])
def test_what_appears_meanwhile_is_not_overwritten_unasked(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "bundle"
    with pytest.raises(FileExistsError, match="exists already"), atomic_directory(target) as temporary:
        (temporary / "a").write_text("ours")
        if kind == "directory":
            target.mkdir()
        (target / "a" if kind == "directory" else target).write_text("theirs")
    assert (target / "a" if kind == "directory" else target).read_text() == "theirs"
    assert os.listdir(tmp_path) == ["bundle"]


def test_failed_directory_keeps_the_old_one(tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    target.mkdir()
    (target / "a").write_text("1")
    with pytest.raises(RuntimeError), atomic_directory(target, overwrite=True) as temporary:
        (temporary / "b").write_text("2")
        raise RuntimeError("killed")
    assert os.listdir(target) == ["a"]
    assert os.listdir(tmp_path) == ["bundle"]


def test_rights_are_those_of_any_new_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = os.umask(0o027)
    with monkeypatch.context() as patch:
        patch.delattr(os, "umask")  # it is the whole process's: changed here, other threads' files would show it
        with atomic_file(tmp_path / "file"), atomic_directory(tmp_path / "directory"):
            pass
    os.umask(before)
    assert [(tmp_path / name).stat().st_mode & 0o777 for name in ("file", "directory")] == [0o640, 0o750]


@pytest.mark.parametrize("write", [atomic_file, atomic_directory])
def test_an_error_names_what_was_to_be_written(
    tmp_path: Path, write: Callable[..., AbstractContextManager[Path]]
) -> None:
    def raised(error: OSError) -> OSError:
        with pytest.raises(OSError) as caught, write(tmp_path / "bundle"):  # noqa: PT011
            raise error
        return caught.value

    assert raised(OSError(errno.ENOSPC, "full")).filename == str(tmp_path / "bundle")
    inside = raised(OSError(errno.ENOSPC, "full", str(tmp_path / ".bundle.abc" / "model.onnx")))
    assert (inside.filename, inside.errno) == (str(tmp_path / "bundle"), errno.ENOSPC)
    assert raised(FileNotFoundError(errno.ENOENT, "none", "other")).filename == "other"


def test_a_disk_that_is_full_is_an_error_of_the_system_under_safetensors_too(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; import numpy as np; from safetensors.numpy import save_file\n"
        "from megalodon_deploy.files import atomic_file\n"
        "try:\n"
        "    with atomic_file(Path(sys.argv[1])) as path: save_file({'x': np.zeros(10_000)}, path)\n"
        "except OSError as error: print(error.errno, error.filename)\n"
    )

    def at_most_1000_bytes() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))

    target = tmp_path / "stream"
    done = subprocess.run(
        [sys.executable, "-c", script, target],
        preexec_fn=at_most_1000_bytes,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == f"{errno.EFBIG} {target}\n"
    assert os.listdir(tmp_path) == []


def test_hashes_of_files_read_side_by_side(tmp_path: Path) -> None:
    contents = [bytes(size % 251 for size in range(length)) * 7 for length in (0, 1, 150_000, 1 << 18)]
    paths = [tmp_path / str(index) for index in range(len(contents))]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
    assert sha256_files(paths) == [hashlib.sha256(content).hexdigest() for content in contents]
    answers = iter([False, True])
    assert sha256_files(paths[-1:], lambda: next(answers)) == [hashlib.sha256(contents[-1][: 1 << 20]).hexdigest()]
