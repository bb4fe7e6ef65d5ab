"""Files found, split and cut into windows: the same every time, and no byte on both sides of the split."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megalodon_deploy.errors import TrainError
from megalodon_deploy.train.data import Corpus, check_length, find_files, random_windows, read_corpus, spread_windows


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twenty files of 100 bytes; every byte of file i is i, so that a window shows where it comes from."""
    for index in range(20):
        path = tmp_path / f"part{index % 3}" / f"{index}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(bytes([index]) * 100)
    (tmp_path / "part0" / "notes.txt").write_bytes(b"\xff" * 100)
    return tmp_path


def read(*paths: Path, exclude: tuple[str, ...] = (), held_out_fraction: float = 0.1) -> Corpus:
    return read_corpus(paths, glob="**/*.py", exclude=exclude, held_out_fraction=held_out_fraction)


def test_split_is_by_file_and_complete(folder: Path) -> None:
    corpus = read(folder)
    train, held_out = set(corpus.train.tolist()), set(corpus.held_out.tolist())
    assert len(held_out) == 2
    assert not train & held_out
    assert train | held_out == set(range(20))
    assert len(corpus.train) + len(corpus.held_out) == 2000
    assert corpus.num_train_files == 18


def test_reading_twice_gives_the_same_bytes(folder: Path) -> None:
    first, second = read(folder), read(folder)
    np.testing.assert_array_equal(first.train, second.train)
    np.testing.assert_array_equal(first.held_out, second.held_out)


def test_split_does_not_depend_on_where_the_folder_is(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("other") / "copy"
    folder.rename(elsewhere)
    moved = read(elsewhere)
    elsewhere.rename(folder)
    np.testing.assert_array_equal(moved.held_out, read(folder).held_out)


def test_a_file_given_twice_counts_once(folder: Path) -> None:
    assert len(find_files([folder, folder / "part0", folder / "part0" / "0.py"], glob="**/*.py", exclude=[])) == 20


def test_two_files_give_one_to_each_side(tmp_path: Path) -> None:
    for index in (1, 2):
        (tmp_path / f"{index}.py").write_bytes(bytes([index]) * 10)
    corpus = read(tmp_path, held_out_fraction=0.05)
    assert {*corpus.train.tolist()} ^ {*corpus.held_out.tolist()} == {1, 2}


def test_a_lone_file_gives_its_end(tmp_path: Path) -> None:
    file = tmp_path / "novel.txt"
    file.write_bytes(bytes(range(100)))
    corpus = read(file, held_out_fraction=0.25)
    assert corpus.train.tolist() == list(range(75))
    assert corpus.held_out.tolist() == list(range(75, 100))


@pytest.mark.parametrize("pattern", ["part1", "part[1]", "p*1"])
def test_exclude_leaves_out_folders_by_name(folder: Path, pattern: str) -> None:
    names = [name for name, _ in find_files([folder], glob="**/*.py", exclude=[pattern])]
    assert len(names) == 13
    assert not any(name.startswith("part1/") for name in names)


def test_exclude_looks_below_the_given_folder_only(folder: Path) -> None:
    assert len(find_files([folder / "part1"], glob="**/*.py", exclude=["part1"])) == 7


def test_windows_are_pieces_of_the_text(folder: Path) -> None:
    content = np.arange(256, dtype=np.uint8)
    windows = random_windows(content, np.random.default_rng(3), count=50, length=20)
    assert windows.shape == (50, 20)
    assert windows.dtype == np.int64
    np.testing.assert_array_equal(np.diff(windows, axis=1), 1)
    assert len(set(windows[:, 0].tolist())) > 30
    again = random_windows(content, np.random.default_rng(3), count=50, length=20)
    np.testing.assert_array_equal(windows, again)


def test_windows_reach_both_ends() -> None:
    content = np.arange(12, dtype=np.uint8)
    windows = random_windows(content, np.random.default_rng(0), count=100, length=10)
    assert {*windows[:, 0].tolist()} == {0, 1, 2}
    spread = spread_windows(content, count=3, length=10)
    assert spread[:, 0].tolist() == [0, 1, 2]


def test_a_window_may_take_all_the_text() -> None:
    content = np.arange(10, dtype=np.uint8)
    check_length(Corpus(content, content, 1), 10)
    assert random_windows(content, np.random.default_rng(0), count=2, length=10).tolist() == [list(range(10))] * 2
    assert spread_windows(content, count=2, length=10).tolist() == [list(range(10))] * 2


def test_too_little_text_is_a_mistake_of_the_user() -> None:
    short, enough = np.zeros(9, np.uint8), np.zeros(10, np.uint8)
    with pytest.raises(TrainError, match="9 bytes to train on, a window takes 10"):
        check_length(Corpus(short, enough, 1), 10)
    with pytest.raises(TrainError, match="9 bytes to hold out, a window takes 10"):
        check_length(Corpus(enough, short, 1), 10)


def assert_one_line(error: Exception, *parts: str) -> None:
    assert "\n" not in str(error)
    for part in parts:
        assert part in str(error)


def test_bad_paths_are_named(tmp_path: Path, folder: Path) -> None:
    missing, empty = tmp_path / "missing", tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(TrainError) as caught:
        read(missing)
    assert_one_line(caught.value, str(missing), "no such file")
    with pytest.raises(TrainError) as caught:
        read(folder, empty)
    assert_one_line(caught.value, str(empty), "**/*.py")
    with pytest.raises(TrainError) as caught:
        read(folder, exclude=("part*",))
    assert_one_line(caught.value, "--exclude")
    with pytest.raises(TrainError) as caught:
        read_corpus([folder], glob="/*.py", exclude=(), held_out_fraction=0.1)
    assert_one_line(caught.value, "/*.py")


def test_an_unreadable_file_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Permissions do not stop root, so the refusal is played."""
    refused = folder / "part2" / "5.py"

    def read_bytes(path: Path) -> bytes:
        if path == refused:
            raise PermissionError(13, "Permission denied", str(path))
        return b"x" * 100

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    with pytest.raises(TrainError) as caught:
        read(folder)
    assert_one_line(caught.value, str(refused), "Permission denied")
