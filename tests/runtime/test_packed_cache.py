"""The folder of packed weights: what is removed when it grows beyond its limit, what never is, and who writes."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from export_helpers import export_seeded
from helpers import small_config

from megalodon_deploy.bundle import WEIGHTS_FILE, Bundle
from megalodon_deploy.doctor import diagnose
from megalodon_deploy.errors import EngineError
from megalodon_deploy.runtime.executors import packed_cache
from megalodon_deploy.runtime.executors.onnxruntime import OnnxRuntimeExecutor
from megalodon_deploy.runtime.executors.packed_cache import LIMIT_VARIABLE, RECORD_FILE, make_room, use_entry

LARGE = {"model_dim": 512, "value_dim": 512, "ffn_hidden_dim": 512, "norm_num_groups": 4, "num_layers": 1}
LARGE |= {"vocab_size": 512}
ENTRY_BYTES = 1_000_000
HOLD = """
import sys
from pathlib import Path
from megalodon_deploy.runtime.executors.packed_cache import use_entry
held = use_entry(Path(sys.argv[1]), verify_hashes=True)
print(held is not None, flush=True)
input()
"""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "megalodon-deploy" / "onnxruntime"


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return export_seeded(tmp_path, small_config(**LARGE))


def add(cache: Path, name: str, used_seconds: int) -> Path:
    """An entry of ENTRY_BYTES, that was used last at this time."""
    folder = cache / name
    folder.mkdir(parents=True)
    (folder / WEIGHTS_FILE).write_bytes(b"x" * ENTRY_BYTES)
    record = json.dumps({"bundle": name, "files": {}})
    (folder / RECORD_FILE).write_text(record)
    os.truncate(folder / WEIGHTS_FILE, ENTRY_BYTES - len(record))
    os.utime(folder / RECORD_FILE, (used_seconds, used_seconds))
    return folder


def allow(monkeypatch: pytest.MonkeyPatch, size_bytes: float) -> None:
    monkeypatch.setenv(LIMIT_VARIABLE, repr(size_bytes / (1 << 30)))


def needed_bytes(bundle: Bundle) -> int:
    return 2 * bundle.manifest.files[WEIGHTS_FILE].size_bytes


def names(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir())


def test_what_was_used_longest_ago_goes_first(bundle: Bundle, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, used_seconds in {"b": 1000, "d": 4000, "a": 3000, "c": 2000}.items():
        add(cache, name, used_seconds)
    (cache / ".killed.0123").mkdir()
    for num_left, left in {4: ["a", "b", "c", "d"], 3: ["a", "c", "d"], 1: ["d"]}.items():
        allow(monkeypatch, needed_bytes(bundle) + num_left * ENTRY_BYTES + 1)
        make_room(bundle)
        assert names(cache) == left
    use_entry(add(cache, "e", 1), verify_hashes=False)
    allow(monkeypatch, needed_bytes(bundle) + ENTRY_BYTES + 1)
    make_room(bundle)
    assert names(cache) == ["e"]
    (cache / "e" / RECORD_FILE).unlink()
    add(cache, "f", 1)
    make_room(bundle)
    assert names(cache) == ["f"]


def test_what_another_process_uses_stays(bundle: Bundle, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = add(cache, "held", 1)
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(held)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "True\n"
        add(cache, "later", 1 << 40)
        allow(monkeypatch, needed_bytes(bundle))
        make_room(bundle)
        assert names(cache) == ["held"]
        process.kill()
    make_room(bundle)
    assert names(cache) == []


def test_a_session_uses_its_entry_as_long_as_it_lives(
    bundle: Bundle, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle.session(share_weights=True)
    (folder,) = cache.iterdir()
    os.utime(folder / RECORD_FILE, (1, 1))
    session = bundle.session(share_weights=True)
    assert (folder / RECORD_FILE).stat().st_mtime > 1e9
    allow(monkeypatch, needed_bytes(bundle))
    make_room(bundle)
    assert names(cache) == [folder.name]
    del session
    gc.collect()
    make_room(bundle)
    assert names(cache) == []


def test_of_two_that_open_at_once_one_writes(bundle: Bundle, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pack, packed = OnnxRuntimeExecutor._pack, []

    def counted(self: OnnxRuntimeExecutor, *arguments: object) -> None:
        packed.append(self)
        pack(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(OnnxRuntimeExecutor, "_pack", counted)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda _: bundle.session(threads=1, share_weights=True), range(2)))
    assert len(packed) == 1
    assert len(names(cache)) == 1


def test_a_limit_that_cannot_be_kept_is_said(bundle: Bundle, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    allow(monkeypatch, needed_bytes(bundle) - 1)
    with pytest.raises(EngineError, match=rf"shared weights of .* take .*, {LIMIT_VARIABLE} allows .*; raise it, or"):
        bundle.session(share_weights=True)
    assert names(cache) == []
    for wrong in ("20 GB", "-1", "nan", "inf"):
        monkeypatch.setenv(LIMIT_VARIABLE, wrong)
        with pytest.raises(EngineError, match=f"{LIMIT_VARIABLE} = '{wrong}' is not a number of GiB, such as 20 or"):
            packed_cache.limit_bytes()


def test_doctor_says_what_they_take(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def found() -> str | None:
        return next(finding.found for finding in diagnose() if finding.part == "packed weights")

    assert found() == f"0 B of at most 64.00 GiB, in {cache}"
    add(cache, "a", 1)
    monkeypatch.setenv(LIMIT_VARIABLE, "0.5")
    assert found() == f"976.56 KiB of at most 512.00 MiB, in {cache}"
    monkeypatch.setenv(LIMIT_VARIABLE, "much")
    assert found() is None
