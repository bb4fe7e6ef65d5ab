"""A user's mistake gives one line that says what to do, from C++ as from Python; a kill leaves whole files."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from cpp.c_library import CError, CLibrary, CSession

from megalodon_deploy.bundle import MANIFEST_FILE, MODEL_FILE, WEIGHTS_FILE, Bundle
from megalodon_deploy.runtime.session import Session

INVALID, BUNDLE, STATE, ENGINE, MISSING, IO = range(1, 7)


@pytest.fixture
def copied(bundle: Bundle, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle.path, tmp_path / "bundle"))


def refusal(status: int, call: Callable[[], object]) -> str:
    with pytest.raises(CError) as caught:
        call()
    message = str(caught.value)
    assert caught.value.status == status, message
    assert "\n" not in message
    return message


def test_damaged_bundles(library: CLibrary, copied: Path, onnxruntime_library: Path) -> None:
    def opened() -> str:
        return refusal(BUNDLE, lambda: library.session(copied, onnxruntime_library))

    manifest = (copied / MANIFEST_FILE).read_text()
    (copied / MANIFEST_FILE).write_text(manifest[: len(manifest) // 2])
    assert "not JSON" in opened()
    (copied / MANIFEST_FILE).write_text(manifest)
    weights = (copied / WEIGHTS_FILE).read_bytes()
    (copied / WEIGHTS_FILE).write_bytes(weights[:-1])
    assert f"has {len(weights) - 1} bytes" in opened()
    (copied / WEIGHTS_FILE).unlink()
    assert f"{copied / WEIGHTS_FILE} is missing" in opened()
    (copied / WEIGHTS_FILE).write_bytes(weights)
    model = (copied / MODEL_FILE).read_bytes()
    (copied / MODEL_FILE).write_bytes(bytes(len(model)))
    assert "ONNX Runtime says" in opened()
    (copied / MODEL_FILE).write_bytes(model)
    (copied / MANIFEST_FILE).unlink()
    assert "is not a bundle" in opened()


def test_a_state_table_that_is_not_the_models(library: CLibrary, copied: Path, onnxruntime_library: Path) -> None:
    document = json.loads((copied / MANIFEST_FILE).read_text())
    document["state"].pop()
    (copied / MANIFEST_FILE).write_text(json.dumps(document))
    message = refusal(BUNDLE, lambda: library.session(copied, onnxruntime_library))
    assert "tensor past_norm.final is not in both model and manifest" in message


def test_missing_libraries_and_unknown_backends(
    library: CLibrary, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    message = refusal(MISSING, lambda: library.session(bundle.path, tmp_path / "libonnxruntime.so"))
    assert "pip install onnxruntime" in message
    message = refusal(MISSING, lambda: library.session(bundle.path, Path("libcrypto.so.3")))
    assert "has no OrtGetApiBase" in message
    message = refusal(INVALID, lambda: library.session(bundle.path, backend=b"openvino"))
    assert "there are: onnxruntime, tensorrt, tensorrt-rtx" in message
    for backend in (b"tensorrt", b"tensorrt-rtx"):
        with pytest.raises(CError, match=r"NVIDIA GPU|TensorRT's headers|TENSORRT_LIBRARY|has no engine"):
            library.session(bundle.path, backend=backend)


def test_foreign_and_damaged_streams(
    session: CSession, python_session: Session, copied: Path, library: CLibrary, tmp_path: Path
) -> None:
    path = tmp_path / "stream"
    python_session.stream().save(path)
    data = path.read_bytes()
    path.write_bytes(data[:-3])
    assert "not a whole safetensors file" in refusal(STATE, lambda: session.stream(path))
    path.write_bytes(data.replace(python_session.bundle.manifest.fingerprint.encode(), b"f" * 64))
    path.write_bytes(path.read_bytes().replace(python_session.bundle.manifest.model_fingerprint.encode(), b"f" * 64))
    assert "of another checkpoint" in refusal(STATE, lambda: session.stream(path))
    assert "no such file" in refusal(STATE, lambda: session.stream(tmp_path / "none"))
    stream = session.stream()
    stream.prefill([1])
    assert "cannot be written" in refusal(IO, lambda: stream.save(Path("/proc/none/stream")))


CHILD = """
import sys
from pathlib import Path
from cpp.c_library import CLibrary
library, bundle, onnxruntime, path = map(Path, sys.argv[1:])
stream = CLibrary(library).session(bundle, onnxruntime, threads=1).stream()
stream.prefill([1] * 10)
print("ready", flush=True)
while True:
    stream.prefill([2])
    stream.save(path)
"""


def test_a_kill_while_saving_leaves_the_old_file_or_the_new(
    session: CSession, bundle: Bundle, build_dir: Path, onnxruntime_library: Path, tmp_path: Path
) -> None:
    path = tmp_path / "stream"
    tests = Path(__file__).parent.parent
    environment = os.environ | {"PYTHONPATH": f"{tests}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    arguments = (build_dir / "libmegalodon_runtime.so", bundle.path, onnxruntime_library, path)
    positions = []
    for kill in range(6):
        with subprocess.Popen(
            [sys.executable, "-c", CHILD, *map(str, arguments)], env=environment, stdout=subprocess.PIPE, text=True
        ) as child:
            assert child.stdout is not None
            assert child.stdout.readline() == "ready\n"
            while not path.exists():
                time.sleep(0.001)
            time.sleep(0.013 * (kill + 1))
            child.send_signal(signal.SIGKILL)
        positions.append(session.stream(path).position)  # raises on half a file
    assert min(positions) > 10
