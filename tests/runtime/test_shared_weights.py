"""Weights in a mapped file: the memory that a process adds, the results, when it is written, what cannot be had."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from export_helpers import export_seeded
from helpers import small_config

from megalodon_deploy.bundle import MODEL_FILE, WEIGHTS_FILE, Bundle, open_bundle
from megalodon_deploy.errors import BundleError, EngineError, UserError
from megalodon_deploy.runtime.executors import packed_weights
from megalodon_deploy.runtime.executors.onnxruntime import OnnxRuntimeExecutor
from megalodon_deploy.runtime.executors.packed_cache import RECORD_FILE

SCRIPT = """
import sys
from megalodon_deploy import open_bundle
def dirty():
    lines = open("/proc/self/smaps_rollup").read().splitlines()
    return int(next(line for line in lines if line.startswith("Private_Dirty")).split()[1]) * 1024
import onnxruntime
import megalodon_deploy.runtime.executors.onnxruntime
bundle, before = open_bundle(sys.argv[1]), dirty()
session = bundle.session(threads=1, share_weights=sys.argv[2] == "True")
session.stream().prefill([1])
print(dirty() - before)
"""


# Every matrix takes 1 MiB or more in int8.
LARGE = {"model_dim": 1024, "value_dim": 1024, "ffn_hidden_dim": 1024, "norm_num_groups": 4, "num_layers": 1}
LARGE |= {"vocab_size": 1024}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "megalodon-deploy" / "onnxruntime"


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc for memory")
@pytest.mark.parametrize("quantize", [None, "int8"])
def test_a_process_adds_little_to_the_mapped_file(tmp_path: Path, quantize: str | None) -> None:
    config = small_config(**(LARGE | {"num_layers": 2}))
    bundle = export_seeded(tmp_path, config, quantize=quantize)
    weights_bytes = (bundle.path / WEIGHTS_FILE).stat().st_size
    assert weights_bytes > 10e6
    added = {}
    for share in (True, True, False):  # the first time the file is written
        command = [sys.executable, "-c", SCRIPT, str(bundle.path), str(share)]
        added[share] = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert added[True] < added[False] - 0.5 * weights_bytes
    assert added[True] < 0.4 * weights_bytes + 4e6


@pytest.mark.parametrize(
    ("options", "dims"),
    [
        ({}, {}),
        ({"precision": "fp16"}, {}),
        ({"quantize": "int8"}, {}),
        ({"quantize": "int4", "kv_dtype": "fp8"}, {"value_dim": 2048, "ffn_hidden_dim": 2048}),
    ],
    ids=["fp32", "fp16", "int8", "int4"],
)
def test_logits_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], dims: dict[str, int]
) -> None:
    monkeypatch.setattr(Bundle, "cpu_model_path", Bundle.model_path)  # whose products are not ONNX Runtime's
    config = small_config(**(LARGE | dims))
    bundle = export_seeded(tmp_path, config, **options)
    tokens = np.random.default_rng(0).integers(0, 50, 30).tolist()
    streams = [bundle.session(threads=1, share_weights=share).stream() for share in (True, False, True)]
    written, own, mapped = ([stream.prefill(tokens), stream.step(7)] for stream in streams)
    np.testing.assert_array_equal(written, own)
    np.testing.assert_array_equal(mapped, own)


def test_the_file_is_written_once_for_a_bundle_and_a_processor(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = export_seeded(tmp_path, small_config(**LARGE))
    for _ in range(2):
        bundle.session(share_weights=True)
    (first,) = cache.iterdir()
    written = first.stat().st_mtime_ns
    monkeypatch.setattr(packed_weights, "_processor", lambda: ["another"])
    bundle.session(share_weights=True)
    assert len(list(cache.iterdir())) == 2
    assert first.stat().st_mtime_ns == written
    other = export_seeded(tmp_path / "other", small_config(**LARGE), precision="fp16")
    other.session(share_weights=True)
    assert len(list(cache.iterdir())) == 3


def test_a_processor_is_its_instructions(tmp_path: Path) -> None:
    (tmp_path / "x86").write_text("processor : 0\nflags\t\t: sse2 avx2\nprocessor : 1\nflags : none\n")
    (tmp_path / "arm").write_text("processor : 0\nFeatures : asimd sve\n")
    assert {"sse2", "avx2"} <= set(packed_weights._processor(tmp_path / "x86"))
    assert {"asimd", "sve"} <= set(packed_weights._processor(tmp_path / "arm"))
    assert "sve" not in packed_weights._processor(tmp_path / "none")


def test_no_room_for_the_file(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = export_seeded(tmp_path, small_config(**LARGE))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(EngineError, match=r"shared weights take .* of disk, 1,000 B are free; make room"):
        bundle.session(share_weights=True)
    assert list(cache.iterdir()) == []
    cache.rmdir()
    cache.write_text("in the way")
    with pytest.raises(EngineError, match=r"cannot write there .*; set XDG_CACHE_HOME"):
        bundle.session(share_weights=True)


def test_damage_is_found_by_size_or_when_hashes_are_asked_for(tmp_path: Path, cache: Path) -> None:
    bundle = export_seeded(tmp_path, small_config(**LARGE))
    own = bundle.session(threads=1).stream().prefill([1, 2, 3])
    bundle.session(share_weights=True)
    (folder,) = cache.iterdir()
    content = (folder / WEIGHTS_FILE).read_bytes()
    for file, damaged in {WEIGHTS_FILE: content[:-1], RECORD_FILE: b"no record", MODEL_FILE: b""}.items():
        (folder / file).write_bytes(damaged)
        np.testing.assert_array_equal(bundle.session(threads=1, share_weights=True).stream().prefill([1, 2, 3]), own)
    zeros = np.zeros(len(content) - (1 << 16), np.uint8).tobytes()
    (folder / WEIGHTS_FILE).write_bytes(content[: 1 << 15] + zeros + content[-(1 << 15) :])
    unseen = bundle.session(threads=1, share_weights=True).stream().prefill([1, 2, 3])
    assert not np.array_equal(unseen, own)
    verified = open_bundle(bundle.path, verify_hashes=True)
    np.testing.assert_array_equal(verified.session(threads=1, share_weights=True).stream().prefill([1, 2, 3]), own)
    assert (folder / WEIGHTS_FILE).read_bytes() == content


def test_a_file_that_onnxruntime_refuses_is_named(tmp_path: Path, cache: Path) -> None:
    bundle = export_seeded(tmp_path, small_config(**LARGE))
    bundle.session(share_weights=True)
    (folder,) = cache.iterdir()
    (folder / MODEL_FILE).write_bytes(bytes((folder / MODEL_FILE).stat().st_size))
    with pytest.raises(BundleError, match=rf"{folder / MODEL_FILE}: ONNX Runtime cannot load it .*; remove it"):
        bundle.session(share_weights=True)


@pytest.mark.parametrize(
    ("quantize", "dims", "size"),
    [
        ("int8", {"vocab_size": 1023}, "1,023.00 KiB"),
        ("int4", {}, "512.00 KiB"),
        (None, {"vocab_size": 50}, "200.00 KiB"),
    ],
)
def test_small_matrices_are_refused(tmp_path: Path, quantize: str | None, dims: dict[str, int], size: str) -> None:
    """ONNX Runtime would read what it packed from wrong addresses."""
    bundle = export_seeded(tmp_path, small_config(**(LARGE | dims)), quantize=quantize)
    with pytest.raises(EngineError, match=rf"all take 1\.00 MiB or more, one here takes {size}; leave it out"):
        bundle.session(share_weights=True)


def test_a_file_that_computes_something_else_is_not_kept(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = export_seeded(tmp_path, small_config(**LARGE))
    found = iter([np.zeros((2, 1024)), np.ones((2, 1024))])
    monkeypatch.setattr(OnnxRuntimeExecutor, "_first_logits", lambda self, session: next(found))
    with pytest.raises(EngineError, match=r"computes something else from packed weights; leave out share_weights"):
        bundle.session(share_weights=True)
    assert list(cache.iterdir()) == []


def test_only_onnxruntime_on_the_cpu_shares(tmp_path: Path) -> None:
    bundle = export_seeded(tmp_path, small_config())
    with pytest.raises(UserError, match="only onnxruntime on the CPU computes from the mapped file"):
        bundle.session("torch", share_weights=True)
