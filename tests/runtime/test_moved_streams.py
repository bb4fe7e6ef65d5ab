"""A saved stream goes on elsewhere: on other backends, in other exports of its checkpoint, after a kill."""

from __future__ import annotations

import math
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import assert_close
from runtime.fake_gpu import FakeCudaExecutor
from runtime.small_models import SHORT_CHUNKS, make_model

from megalodon_deploy.bundle import Bundle, open_bundle
from megalodon_deploy.errors import StateError
from megalodon_deploy.export import export_checkpoint
from megalodon_deploy.model.checkpoint import save_checkpoint
from megalodon_deploy.runtime.session import Session
from megalodon_deploy.verify.tolerance import CODE_STEP, CONDITIONING, tolerances

MakeBundle = Callable[..., Bundle]
EXPORTS: dict[str, dict[str, str]] = {
    "fp32": {},
    "fp16": {"precision": "fp16"},
    "fp8 rows": {"kv_dtype": "fp8"},
    "int8 rows": {"kv_dtype": "int8"},
    "all logits": {"logits": "all"},
}
# A stream that came from one export, against the target's own: the coarser of both types of rows sets the error.
# Rounding rows to codes errs by step / sqrt(12) in the root mean square.
TOLERANCES = {
    "fp32": 1e-5,
    "all logits": 1e-5,
    "fp16": tolerances(SHORT_CHUNKS, "fp16")["logits"],
    "fp8 rows": CONDITIONING * CODE_STEP["fp8"] / math.sqrt(12),
    "int8 rows": CONDITIONING * CODE_STEP["int8"] / math.sqrt(12),
}


def on(bundle: Bundle, backend: str) -> Session:
    """A session; "gpu" is TensorRT's memory over a stand-in for the GPU."""
    return Session(bundle, FakeCudaExecutor(bundle)) if backend == "gpu" else bundle.session(backend, threads=1)


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Bundle]:
    """Exports of one checkpoint, by name."""
    directory = tmp_path_factory.mktemp("exports")
    save_checkpoint(make_model(SHORT_CHUNKS), directory / "checkpoint")
    made: dict[str, Bundle] = {}

    def export(name: str) -> Bundle:
        if name not in made:
            options: Any = EXPORTS[name]
            made[name] = export_checkpoint(directory / "checkpoint", directory / name.replace(" ", "-"), **options)
        return made[name]

    return export


@pytest.mark.parametrize("source", ["onnxruntime", "torch", "gpu"])
@pytest.mark.parametrize("target", ["onnxruntime", "torch", "gpu"])
@pytest.mark.parametrize("export", ["fp32", "int8 rows"])
def test_a_stream_moves_between_backends_with_the_same_greedy_tokens(
    exports: Callable[[str], Bundle], export: str, source: str, target: str, tmp_path: Path
) -> None:
    """Saved at a pending token and over chunk edges; three moves of one stream."""
    bundle = exports(export)
    whole = [item.token for item in on(bundle, "onnxruntime").stream().generate("def f(x):", max_new_tokens=40)]
    tokens: list[int] = []
    stream = on(bundle, source).stream()
    for count, backend in ((7, target), (13, source), (20, target)):
        prompt = "def f(x):" if not tokens else ()
        tokens += [item.token for item in stream.generate(prompt, max_new_tokens=count)]
        stream.save(tmp_path / "stream")
        stream = on(bundle, backend).stream(resume=tmp_path / "stream")
    assert tokens == whole


@pytest.mark.parametrize("target", list(EXPORTS))
@pytest.mark.parametrize("source", list(EXPORTS))
def test_a_stream_resumes_in_another_export_of_its_checkpoint(
    exports: Callable[[str], Bundle], source: str, target: str, tmp_path: Path
) -> None:
    tokens = np.random.default_rng(0).integers(0, 256, 43).tolist()
    stream, own = exports(source).session(threads=1).stream(), exports(target).session(threads=1).stream()
    stream.prefill(tokens[:31])
    own.prefill(tokens[:31])
    stream.save(tmp_path / "stream")
    session = exports(target).session(threads=1)
    tolerance = max(TOLERANCES[source], TOLERANCES[target])
    for resume in (tmp_path / "stream", stream.snapshot()):
        resumed, reference = session.stream(resume=resume), own.fork()
        ours, theirs = resumed.snapshot().tensors, reference.snapshot().tensors
        assert {name: (a.dtype, a.shape) for name, a in ours.items()} == {
            name: (a.dtype, a.shape) for name, a in theirs.items()
        }
        for token in tokens[31:]:
            assert_close(resumed.step(token), reference.step(token), tolerance, f"{source} -> {target}")


def test_rows_of_one_byte_survive_the_way_there_and_back(exports: Callable[[str], Bundle]) -> None:
    """To float32 rows and back they are the same codes: the largest of a row is the largest code."""
    for name in ("fp8 rows", "int8 rows"):
        stream = exports(name).session(threads=1).stream()
        stream.prefill(list(range(20)))
        there = exports("fp32").session(threads=1).stream(resume=stream.snapshot())
        back = exports(name).session(threads=1).stream(resume=there.snapshot())
        for tensor, array in stream.snapshot().tensors.items():
            np.testing.assert_array_equal(back.snapshot().tensors[tensor], array, err_msg=tensor)


@pytest.mark.parametrize("first", [1 << 31, 1 << 32])
def test_positions_beyond_32_bits_are_no_edge(exports: Callable[[str], Bundle], first: int) -> None:
    """A stream moved to shortly before 2^31 or 2^32 tokens gives the same logits on every backend, before and behind
    it. PyTorch's come from its own arithmetic."""
    bundle, chunk_size = exports("fp32"), SHORT_CHUNKS.chunk_size
    stream = bundle.session(threads=1).stream()
    stream.prefill(list(range(20)))
    position = 20 + (first - 26) // chunk_size * chunk_size
    saved = replace(stream.snapshot(), position=position)
    streams = [on(bundle, backend).stream(resume=saved) for backend in ("torch", "onnxruntime", "gpu")]
    for token in range(2 * chunk_size):
        expected, *found = (stream.step(token) for stream in streams)
        for logits_V in found:
            assert_close(logits_V, expected, 1e-5)
    assert position < first < streams[0].position


def test_another_checkpoint_is_refused(exports: Callable[[str], Bundle], make_bundle: MakeBundle) -> None:
    import torch

    source = exports("fp32")
    other_model = make_model(SHORT_CHUNKS)
    with torch.no_grad():
        next(other_model.parameters()).mul_(1.5)
    save_checkpoint(other_model, source.path.parent / "other")
    other = export_checkpoint(source.path.parent / "other", source.path.parent / "other-bundle")
    stream = source.session(threads=1).stream()
    stream.prefill([1, 2, 3])
    with pytest.raises(StateError, match="of another checkpoint") as caught:
        other.session(threads=1).stream(resume=stream.snapshot())
    assert "\n" not in str(caught.value)


SAVE_FOR_EVER = """
    import sys
    from megalodon_deploy import open_bundle
    streams = []
    session = open_bundle(sys.argv[1]).session(threads=1)
    for length in (20, 33):
        streams.append(session.stream())
        streams[-1].prefill(list(range(length)))
    streams[0].save(sys.argv[2])
    print("ready", flush=True)
    while True:
        for stream in reversed(streams):
            stream.save(sys.argv[2])
"""


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
def test_a_killed_process_leaves_the_old_file_or_the_new_one(exports: Callable[[str], Bundle], tmp_path: Path) -> None:
    """A process that saves one stream and another to the same file without a pause, killed at random moments."""
    bundle, path, rng = exports("fp32"), tmp_path / "saved" / "stream", np.random.default_rng(0)
    whole: dict[int, np.ndarray] = {}
    session = bundle.session(threads=1)
    for length in (20, 33):
        whole[length] = session.stream().prefill([*range(length), 7])
    seen: set[int] = set()
    for _ in range(8):
        command = [sys.executable, "-c", textwrap.dedent(SAVE_FOR_EVER), str(bundle.path), str(path)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        time.sleep(float(rng.uniform(0, 0.05)))
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        resumed = session.stream(resume=path)
        seen.add(resumed.position)
        np.testing.assert_allclose(resumed.step(7), whole[resumed.position - 1], rtol=0, atol=1e-5, equal_nan=False)
    assert seen <= {20, 33}
    others = [file.name for file in path.parent.iterdir() if file != path and not file.name.startswith(".stream.")]
    assert others == [], "half files have a name that nobody opens"
    shutil.rmtree(path.parent)
    open_bundle(bundle.path)
