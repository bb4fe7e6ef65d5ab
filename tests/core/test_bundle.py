"""Opening a bundle: whatever is wrong with it is said in one line that names the file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import small_config

from megalodon_deploy.bundle import FileEntry, Manifest, TokenizerInfo, open_bundle
from megalodon_deploy.errors import BundleError


@pytest.fixture
def bundle_dir(tmp_path: Path) -> Path:
    for name, content in (("model.onnx", b"graph"), ("model.onnx.data", b"weights")):
        (tmp_path / name).write_bytes(content)
    manifest = Manifest(
        name="tiny",
        config=small_config(),
        precision="fp32",
        logits="last",
        tokenizer=TokenizerInfo("bytes"),
        files={name: FileEntry.of(tmp_path / name) for name in ("model.onnx", "model.onnx.data")},
        tools={"onnx": "1"},
        source={"layout": "native"},
    )
    (tmp_path / "manifest.json").write_text(manifest.to_json())
    return tmp_path


def test_round_trip(bundle_dir: Path) -> None:
    bundle = open_bundle(bundle_dir, verify_hashes=True)
    assert bundle.config == small_config()
    assert bundle.manifest.to_json() == (bundle_dir / "manifest.json").read_text()


def _edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    document = json.loads((path / "manifest.json").read_text())
    change(document)
    (path / "manifest.json").write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(format_version=2), "format version 2"),
        (lambda d: d.update(format="zip"), "not a manifest"),
        (lambda d: d.pop("precision"), "'precision' is missing"),
        (lambda d: d.update(precision="int3"), "'int3' is none of fp32, fp16, bf16"),
        (lambda d: d["config"].update(chunk_size=-1), "chunk_size = -1"),
        (lambda d: d["config"].update(chunk_size=24), "fingerprint"),
        (lambda d: d["config"].update(num_layers=3), "state table"),
        (lambda d: d["state"].pop(), "state table"),
        (lambda d: d["files"].pop("model.onnx.data"), "fingerprint"),
        (lambda d: d["files"].update({"../x": d["files"]["model.onnx"]}), "leaves the bundle"),
        (lambda d: d["files"].update({"/etc/x": d["files"]["model.onnx"]}), "leaves the bundle"),
        (lambda d: d.update(files=[]), "manifest.json"),
        (lambda d: d.update(tokenizer={"kind": "bytes", "file": "x", "stop_tokens": []}), "tokenizer bytes"),
        (lambda d: d.update(tokenizer={"kind": "tokenizer.json", "file": "x", "stop_tokens": []}), "x is not listed"),
    ],
)
def test_changed_manifest(bundle_dir: Path, change: Callable[[dict[str, Any]], object], message: str) -> None:
    _edit(bundle_dir, change)
    with pytest.raises(BundleError, match=message) as caught:
        open_bundle(bundle_dir)
    assert "\n" not in str(caught.value)
    assert "manifest.json" in str(caught.value)


def test_damaged_files(bundle_dir: Path) -> None:
    weights = bundle_dir / "model.onnx.data"
    weights.write_bytes(b"weightz")
    open_bundle(bundle_dir)
    with pytest.raises(BundleError, match=r"model\.onnx\.data: sha256"):
        open_bundle(bundle_dir, verify_hashes=True)
    weights.write_bytes(b"weight")
    with pytest.raises(BundleError, match=r"model\.onnx\.data has 6 bytes, manifest says 7"):
        open_bundle(bundle_dir)
    weights.unlink()
    with pytest.raises(BundleError, match=r"model\.onnx\.data is missing"):
        open_bundle(bundle_dir)


def test_not_a_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="is not a bundle"):
        open_bundle(tmp_path)
    (tmp_path / "manifest.json").write_bytes(b"\xff{")
    with pytest.raises(BundleError, match="not JSON"):
        open_bundle(tmp_path)
