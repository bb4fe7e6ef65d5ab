"""The example applications do what they say."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from runtime.small_models import SHORT_CHUNKS

from megalodon_deploy.bundle import Bundle
from megalodon_deploy.doctor import visible_gpus
from megalodon_deploy.runtime.sampling import SamplingParams

MakeBundle = Callable[..., Bundle]
EXAMPLES = Path(__file__).parents[2] / "examples"
LINES = "ann: hello\nbob: who is there\nann: again\nno conversation\n: none\neve:\n"


def run_app(name: str, bundle: Bundle, *options: str, text: str = "") -> list[str]:
    command = [sys.executable, str(EXAMPLES / name), str(bundle.path), *options]
    result = subprocess.run(command, input=text.encode(), capture_output=True, check=False)
    assert result.returncode == 0, result.stderr.decode(errors="replace")
    return result.stdout.decode().removesuffix("\n").split("\n")


def test_conversations_go_on_in_one_run_and_over_two(make_bundle: MakeBundle, tmp_path: Path) -> None:
    """Answers are those of a stream that was fed everything in order, whichever run they came from."""
    bundle = make_bundle(SHORT_CHUNKS)
    options = ["--streams", "2", "--max-new-tokens", "20"]
    together = run_app("stream_app.py", bundle, *options, "--states", str(tmp_path / "a"), text=LINES)
    apart: list[str] = []
    for line in LINES.splitlines(keepends=True)[:3]:
        apart += run_app("stream_app.py", bundle, *options, "--states", str(tmp_path / "b"), text=line)
    assert sorted(together) == sorted(apart)
    assert {path.name for path in (tmp_path / "a").iterdir()} == {"ann", "bob"}
    stream = bundle.session(threads=1).stream()
    sampling = SamplingParams(temperature=0.8, top_p=0.95, seed=3)
    for prompt, answer in zip(("hello\n", "again\n"), (apart[0], apart[2]), strict=True):
        items = stream.generate(prompt, max_new_tokens=20, sampling=sampling, stop_strings=["\n"])
        assert answer == f"ann: {''.join(item.text for item in items)}"


def test_a_mistake_is_one_line(tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLES / "stream_app.py"), str(tmp_path)]
    result = subprocess.run(command, input="", capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr.startswith(f"error: {tmp_path} is not a bundle")
    assert result.stderr.count("\n") == 1


def test_the_pycuda_example_compiles() -> None:
    source = (EXAMPLES / "pycuda_app.py").read_text()
    compile(source, "pycuda_app.py", "exec")


@pytest.mark.gpu
def test_the_pycuda_example_runs(make_bundle: MakeBundle) -> None:
    if visible_gpus() is None:
        pytest.skip("no NVIDIA GPU is visible to the CUDA driver")
    pytest.importorskip("pycuda", reason="PyCUDA is not installed")
    onnxruntime = pytest.importorskip("onnxruntime")
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("onnxruntime is the one for CPUs")
    lines = run_app("pycuda_app.py", make_bundle(SHORT_CHUNKS), "--backend", "onnxruntime", "--tokens", "40")
    assert not set("".join(lines)) & set("eE")
