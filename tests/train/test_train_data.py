"""From files to tokens on disk: every document once, the same for any number of workers, mistakes named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megalodon_deploy.errors import TrainError
from megalodon_deploy.train import DataConfig
from megalodon_deploy.train.data import tokens as tokens_module
from megalodon_deploy.train.data.sources import find_sources, read_documents
from megalodon_deploy.train.data.tokens import TokenStore, open_tokens


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twenty small files in three folders, a hidden one, and one of another kind."""
    root = tmp_path / "texts"
    for index in range(20):
        path = root / f"part{index % 3}" / f"{index}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{index} caf\u00e9 " * (index + 1), encoding="utf-8")
    (root / "part0" / "notes.txt").write_bytes(b"\xff" * 100)
    (root / ".git").mkdir()
    (root / ".git" / "hidden.py").write_text("no")
    return root


def data(*paths: Path, **values: Any) -> DataConfig:
    return DataConfig(paths=paths, **({"glob": "**/*.py"} | values))


def store_of(config: DataConfig) -> TokenStore:
    return open_tokens(config, lambda stage, fraction: None)


def texts(config: DataConfig) -> list[str]:
    return [text for source in find_sources(config) for text in read_documents(source, config)]


def stored_texts(store: TokenStore) -> list[str]:
    return [
        store.read(int(begin), int(end - begin)).astype(np.uint8).tobytes().decode()
        for begin, end in zip(store.start[:-1], store.start[1:], strict=True)
    ]


def test_every_document_is_stored_once(folder: Path, tmp_path: Path) -> None:
    config = data(folder, cache=tmp_path / "cache")
    store = store_of(config)
    assert stored_texts(store) == texts(config)
    assert len(store.documents) == 20
    np.testing.assert_array_equal(store.documents[:, 1], [len(text.encode()) for text in texts(config)])


def test_workers_and_shards_change_nothing(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = stored_texts(store_of(data(folder, cache=tmp_path / "one", workers=1)))
    monkeypatch.setattr(tokens_module, "_SHARD_TOKENS", 300)
    store = store_of(data(folder, cache=tmp_path / "many", workers=5))
    assert len(store.shards) > 3
    assert stored_texts(store) == expected


def test_a_second_run_reads_what_the_first_wrote(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = data(folder, cache=tmp_path / "cache")
    first = store_of(config)
    monkeypatch.setattr(tokens_module, "_write", lambda *arguments: pytest.fail("tokenised again"))
    assert stored_texts(store_of(config)) == stored_texts(first)


def test_changed_content_is_another_data_set(folder: Path, tmp_path: Path) -> None:
    names = {store_of(data(folder, cache=tmp_path / "cache")).name}
    names.add(store_of(data(folder, cache=tmp_path / "cache", end_token=0)).name)
    (folder / "part1" / "1.py").write_text("changed")
    names.add(store_of(data(folder, cache=tmp_path / "cache")).name)
    assert len(names) == 3


def test_an_interrupted_tokenisation_leaves_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = data(folder, cache=tmp_path / "cache")

    def stop(*arguments: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tokens_module, "read_documents", stop)
        with pytest.raises(KeyboardInterrupt):
            store_of(config)
    assert list((tmp_path / "cache").iterdir()) == []
    assert len(store_of(config).documents) == 20


def test_a_damaged_data_set_is_named(folder: Path, tmp_path: Path) -> None:
    config = data(folder, cache=tmp_path / "cache")
    shard = tmp_path / "cache" / store_of(config).name / "shard-00000.bin"
    shard.write_bytes(shard.read_bytes()[:-5])
    with pytest.raises(TrainError, match=r"damaged .* remove it"):
        store_of(config)


def test_an_end_token_closes_every_document(folder: Path, tmp_path: Path) -> None:
    store = store_of(data(folder, cache=tmp_path / "cache", end_token=300))
    assert store.shards[0].dtype == np.uint16
    assert (np.concatenate(store.shards)[store.start[1:] - 1] == 300).all()


def test_a_tokenizer_file_is_used(folder: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    config = data(folder, cache=tmp_path / "cache", tokenizer=str(tmp_path / "tokenizer.json"), workers=3)
    tokenizer.train_from_iterator(texts(config), trainer)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    store = store_of(config)
    for text, begin, end in zip(texts(config), store.start[:-1], store.start[1:], strict=True):
        assert store.read(int(begin), int(end - begin)).tolist() == tokenizer.encode(text).ids


def test_json_lines_are_documents(tmp_path: Path) -> None:
    path = tmp_path / "books.jsonl"
    path.write_text("".join(json.dumps({"body": f"book {i}", "text": i}) + "\n\n" for i in range(3)))
    assert texts(data(path, text_field="body")) == ["book 0", "book 1", "book 2"]
    with pytest.raises(TrainError, match=r"books\.jsonl:1: no text in the field 'text'"):
        texts(data(path))
    path.write_text('{"text": "good"}\n{"text": bad}\n')
    with pytest.raises(TrainError, match=r"books\.jsonl:2: not JSON"):
        texts(data(path))


def test_data_sets_on_disk_are_documents(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    root = tmp_path / "dataset"
    for split in ("train", "test"):
        (root / split).mkdir(parents=True)
        table = arrow.table({"text": [f"{split} {i}" for i in range(4)], "id": [0, 1, 2, 3]})
        path = str(root / split / "data-00000-of-00001.arrow")
        with arrow.OSFile(path, "wb") as file, arrow.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=3)
        (root / split / "state.json").write_text("{}")
    (root / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert texts(data(root / "train")) == [f"train {i}" for i in range(4)]
    assert len(texts(data(root))) == 8
    with pytest.raises(TrainError, match="no field 'body'; there are: text, id"):
        texts(data(root, text_field="body"))


@pytest.mark.parametrize("pattern", ["part1", "part[1]", "p*1"])
def test_exclude_leaves_out_folders_by_name(folder: Path, pattern: str) -> None:
    names = [source.name for source in find_sources(data(folder, exclude=(pattern,)))]
    assert len(names) == 13
    assert not any(name.startswith("part1/") for name in names)


def test_a_file_given_twice_counts_once(folder: Path) -> None:
    assert len(find_sources(data(folder, folder / "part0", folder / "part0" / "0.py"))) == 20


def test_invalid_utf8_is_named_skipped_or_replaced(folder: Path) -> None:
    notes = folder / "part0" / "notes.txt"
    with pytest.raises(TrainError, match=r"notes\.txt: byte 0xff at 0 is not UTF-8"):
        texts(data(notes))
    assert texts(data(notes, invalid_utf8="skip")) == []
    assert texts(data(notes, invalid_utf8="replace")) == ["\ufffd" * 100]


def test_bad_paths_are_named(tmp_path: Path, folder: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    for config, parts in (
        (data(tmp_path / "missing"), ("missing", "no such file")),
        (data(folder, empty), (str(empty), "**/*.py")),
        (data(folder, exclude=("part*",)), ("data.exclude",)),
        (data(folder, glob="/*.py"), ("/*.py",)),
    ):
        with pytest.raises(TrainError) as caught:
            find_sources(config)
        assert "\n" not in str(caught.value)
        assert all(part in str(caught.value) for part in parts)


def test_an_unreadable_file_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Permissions do not stop root, so the refusal is played."""
    refused = folder / "part2" / "5.py"

    def read_bytes(path: Path) -> bytes:
        if path == refused:
            raise PermissionError(13, "Permission denied", str(path))
        return b"x" * 100

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    with pytest.raises(TrainError, match=r"5\.py: cannot be read \(Permission denied\)"):
        texts(data(folder))
