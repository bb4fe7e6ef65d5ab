"""What `verify --emit-polygraphy` writes, run by the stock tool."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from polygraphy.json import load_json, save_json
from verify import graph_faults as faults
from verify.graph_faults import spoil

from megalodon_deploy.bundle import Bundle
from megalodon_deploy.engine.library import REGISTER_FILE, find_plugin_library
from megalodon_deploy.errors import UserError
from megalodon_deploy.export import export_checkpoint
from megalodon_deploy.verify import emit_polygraphy


@pytest.fixture(scope="module")
def emitted(bundle: Bundle, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("stock") / "files"
    emit_polygraphy(bundle, directory, ckpt=checkpoint)
    return directory


def polygraphy(directory: Path, purpose: str, *options: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PATH": "/usr/bin:/bin"} | variables  # the tool is found without its environment
    command = ["bash", directory / "polygraphy.sh", purpose, *options]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("purpose", ["onnxrt", "loader"])
def test_stock_polygraphy_passes_a_right_bundle(emitted: Path, purpose: str) -> None:
    done = polygraphy(emitted, purpose)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    num_calls = len(load_json(str(emitted / "inputs.json")))
    assert num_calls >= 8
    assert f"Passed: {num_calls}/{num_calls} iterations" in done.stdout
    assert "FAILED" not in done.stdout


def test_stock_polygraphy_fails_a_wrong_graph(emitted: Path, bundle: Bundle, tmp_path: Path) -> None:
    spoilt = spoil(bundle, tmp_path / "spoilt", faults.rotate_from_the_wrong_row)
    done = polygraphy(emitted, "onnxrt", MODEL=str(spoilt.model_path))
    assert done.returncode != 0
    assert "FAILED | Output: 'new_key.0'" in done.stdout


def test_stock_polygraphy_fails_wrong_outputs_and_nan(emitted: Path, tmp_path: Path) -> None:
    directory = tmp_path / "files"
    shutil.copytree(emitted, directory, symlinks=True)
    feeds = load_json(str(directory / "inputs.json"))
    feeds[1]["past_norm.final"] = np.full_like(feeds[1]["past_norm.final"], np.nan)
    save_json(feeds, str(directory / "inputs.json"))
    done = polygraphy(directory, "onnxrt")
    assert done.returncode != 0
    assert "NaN" in done.stdout + done.stderr


def test_stock_polygraphy_builds_with_tensorrt_rtx(quantized_checkpoint: Path, tmp_path: Path) -> None:
    """Of half precision and 4-bit matrices, which the CPU multiplies otherwise."""
    bundle = export_checkpoint(quantized_checkpoint, tmp_path / "half", precision="fp16", quantize="int4")
    emit_polygraphy(bundle, tmp_path / "files")
    passed = polygraphy(tmp_path / "files", "onnxrt")
    assert passed.returncode == 0, passed.stdout[-3000:]
    register = find_plugin_library().with_name(REGISTER_FILE)
    done = polygraphy(tmp_path / "files", "build-rtx", "--compute-capabilities", "8.0", PLUGINS=str(register))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    content = (tmp_path / "files" / "model.engine").read_bytes()
    assert b"ComplexEMA" in content
    assert b"TimestepNorm" in content


@pytest.mark.parametrize("purpose", ["trt", "trt-rtx", "both", "build-rtx"])
def test_without_the_plugins_the_script_says_how_to_get_them(emitted: Path, tmp_path: Path, purpose: str) -> None:
    missing = tmp_path / "none.so"
    done = polygraphy(emitted, purpose, PLUGINS=str(missing))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"{missing} is missing: python -m megalodon_deploy.engine.toolchain build-plugins")


def test_without_a_purpose_the_script_lists_them(emitted: Path) -> None:
    done = polygraphy(emitted, "")
    assert done.returncode == 2
    for purpose in ("onnxrt", "loader", "trt", "trt-rtx", "both", "build-rtx"):
        assert f"{purpose} " in done.stderr


def test_what_cannot_be_written_is_refused(emitted: Path, bundle: Bundle, checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="exists already"):
        emit_polygraphy(bundle, emitted)
    with pytest.raises(UserError, match="no bf16"):
        emit_polygraphy(export_checkpoint(checkpoint, tmp_path / "b", precision="bf16"), tmp_path / "files")
    with pytest.raises(UserError, match="no fp8"):
        emit_polygraphy(export_checkpoint(checkpoint, tmp_path / "f", kv_dtype="fp8"), tmp_path / "files")
    assert not (tmp_path / "files").exists()
