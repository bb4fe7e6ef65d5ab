"""Old or new, never half."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megalodon_deploy.files import atomic_directory, atomic_file


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


def test_failed_directory_keeps_the_old_one(tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    target.mkdir()
    (target / "a").write_text("1")
    with pytest.raises(RuntimeError), atomic_directory(target, overwrite=True) as temporary:
        (temporary / "b").write_text("2")
        raise RuntimeError("killed")
    assert os.listdir(target) == ["a"]
    assert os.listdir(tmp_path) == ["bundle"]
