"""Real bundles: streams on ONNX Runtime and on PyTorch against the model's logits for the whole sequence."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import assert_close
from runtime.small_models import LONG_CHUNKS, SHORT_CHUNKS, make_model

from megalodon_deploy.bundle import Bundle, open_bundle
from megalodon_deploy.config import MegalodonConfig
from megalodon_deploy.errors import BundleError, EngineError, MissingDependencyError, UserError
from megalodon_deploy.runtime.executors.onnxruntime import OnnxRuntimeMemory
from megalodon_deploy.runtime.sampling import SamplingParams
from megalodon_deploy.runtime.session import Session
from megalodon_deploy.runtime.stream import Stream

MakeBundle = Callable[..., Bundle]
TOLERANCE = 2e-5
BACKENDS = ["onnxruntime", "torch"]


def some_tokens(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, 256, length).tolist()


def whole_logits(config: MegalodonConfig, tokens: list[int]) -> np.ndarray:
    """[T, V] in one pass of a float64 model."""
    with torch.inference_mode():
        return make_model(config).double()(torch.tensor([tokens]))[0][0].numpy()


def open_with(bundle: Bundle, backend: str) -> Session:
    return bundle.session(backend, threads=1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("config", [SHORT_CHUNKS, LONG_CHUNKS], ids=["short", "long"])
def test_steps_over_chunk_edges_are_the_whole_sequence(
    make_bundle: MakeBundle, config: MegalodonConfig, backend: str
) -> None:
    tokens = some_tokens(3 * config.chunk_size + 5 if config is SHORT_CHUNKS else 2 * config.chunk_size + 70)
    stream = open_with(make_bundle(config), backend).stream()
    logits = np.stack([stream.step(token) for token in tokens])
    assert logits.dtype == np.float32
    assert_close(logits, whole_logits(config, tokens), TOLERANCE)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("config", [SHORT_CHUNKS, LONG_CHUNKS], ids=["short", "long"])
def test_any_split_is_the_whole_sequence(make_bundle: MakeBundle, config: MegalodonConfig, backend: str) -> None:
    session = open_with(make_bundle(config), backend)
    rng = np.random.default_rng(1)
    for _ in range(6):
        lengths = rng.integers(1, config.chunk_size, 5).tolist()
        tokens = some_tokens(sum(lengths))
        expected, stream, position = whole_logits(config, tokens), session.stream(), 0
        for length in lengths:
            logits = stream.prefill(tokens[position : position + length])
            position += length
            assert_close(logits, expected[position - 1], TOLERANCE, f"split {lengths} at {position}")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("config", [SHORT_CHUNKS, LONG_CHUNKS], ids=["short", "long"])
def test_streams_of_a_batch_are_each_as_if_alone(
    make_bundle: MakeBundle, config: MegalodonConfig, backend: str
) -> None:
    """Four slots, unequal positions, streams that wait, come and go."""
    batch = open_with(make_bundle(config), backend).batch(4)
    rng = np.random.default_rng(2)
    fed: dict[Stream, list[int]] = {}
    for round_ in range(16):
        if fed and rng.integers(5) < 2:
            gone = list(fed)[rng.integers(len(fed))]
            batch.retire(gone)
            del fed[gone]
        if len(fed) < 4 and rng.integers(5) < 4:
            fed[batch.admit()] = []
        chosen = [stream for stream in fed if rng.integers(3) or not fed[stream]]
        most = 2 if round_ % 2 else config.chunk_size
        given = {stream: some_tokens(int(rng.integers(1, most)), len(fed[stream])) for stream in chosen}
        for stream, logits in batch.feed(given).items():
            fed[stream] += given[stream]
            assert_close(logits, whole_logits(config, fed[stream])[-1], TOLERANCE, f"slot {stream.slot}")
    assert len({stream.position for stream in fed}) == len(fed)


def test_steps_of_a_batch_are_bound_once_per_capacity(make_bundle: MakeBundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two bound calls (the pair's two orders) per capacity of 64 rows, and the memory stays where it is."""
    bound: list[int] = []
    bind = OnnxRuntimeMemory._bind

    def counted(self: OnnxRuntimeMemory, rows: slice, num_tokens: int) -> object:
        bound.append(num_tokens)
        return bind(self, rows, num_tokens)

    monkeypatch.setattr(OnnxRuntimeMemory, "_bind", counted)
    stream = open_with(make_bundle(LONG_CHUNKS), "onnxruntime").stream()
    for token in some_tokens(150):
        stream.step(token)
    # Capacities 0, 64, 128, 150 of a chunk: the first serves one token only, so one of its two orders.
    assert bound == [1] * 7


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_broken_stream_leaves_nothing_behind(make_bundle: MakeBundle, backend: str) -> None:
    """A slot whose whole memory is NaN is retired and used again, beside a stream that goes on."""
    session = open_with(make_bundle(SHORT_CHUNKS), backend)
    batch = session.batch(2)
    broken, other = batch.admit(), batch.admit()
    batch.feed({broken: some_tokens(9), other: some_tokens(4, 1)})
    saved = broken.snapshot()
    poison = {name: np.full_like(array, np.nan) for name, array in saved.tensors.items()}
    batch._memory.write(0, 9, poison)
    logits = batch.step({broken: 1, other: 2})
    assert np.isnan(logits[broken]).all()
    batch.retire(broken)
    if backend == "onnxruntime":
        memory = batch._memory
        buffers = [*memory._past.values(), *memory._present.values(), *memory._rows.views.values()]  # type: ignore[attr-defined]
        assert all(np.isfinite(buffer).all() for buffer in buffers)
    fresh = batch.admit()
    assert fresh.slot == 0
    tokens = {fresh: some_tokens(20, 2), other: some_tokens(20, 3)}
    fed = {fresh: tokens[fresh], other: [*some_tokens(4, 1), 2, *tokens[other]]}
    for stream, logits_V in batch.feed(tokens).items():
        assert_close(logits_V, whole_logits(SHORT_CHUNKS, fed[stream])[-1], TOLERANCE)


def test_a_slot_is_not_cleared_for_the_next_stream(make_bundle: MakeBundle) -> None:
    batch = open_with(make_bundle(SHORT_CHUNKS), "onnxruntime").batch(1)
    stream = batch.admit()
    stream.prefill(some_tokens(7))
    before = {name: array.copy() for name, array in batch._memory._past.items()}  # type: ignore[attr-defined]
    batch.retire(stream)
    for name, array in batch._memory._past.items():  # type: ignore[attr-defined]
        np.testing.assert_array_equal(array, before[name])
    assert_close(batch.admit().prefill([3, 4]), whole_logits(SHORT_CHUNKS, [3, 4])[-1], TOLERANCE)


@pytest.mark.parametrize("source", BACKENDS)
@pytest.mark.parametrize("target", BACKENDS)
@pytest.mark.parametrize("position", [5, 12, 200])
def test_a_saved_stream_resumes_on_every_backend(
    make_bundle: MakeBundle, source: str, target: str, position: int, tmp_path: Path
) -> None:
    for config in (SHORT_CHUNKS, LONG_CHUNKS):
        bundle, tokens = make_bundle(config), some_tokens(position + 40)
        stream = open_with(bundle, source).stream()
        stream.prefill(tokens[:position])
        stream.save(tmp_path / "stream")
        resumed = open_with(bundle, target).stream(resume=tmp_path / "stream")
        resumed.prefill(tokens[position:-1])
        assert_close(resumed.step(tokens[-1]), whole_logits(config, tokens)[-1], TOLERANCE)
        assert resumed.position == len(tokens)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_snapshot_is_a_copy(make_bundle: MakeBundle, backend: str) -> None:
    stream = open_with(make_bundle(SHORT_CHUNKS), backend).stream()
    stream.prefill(some_tokens(17))
    snapshot = stream.snapshot()
    before = {name: array.copy() for name, array in snapshot.tensors.items()}
    for token in some_tokens(4):
        stream.step(token)
    for name, array in before.items():
        np.testing.assert_array_equal(snapshot.tensors[name], array, err_msg=name)


def test_backends_hold_the_same_state(make_bundle: MakeBundle) -> None:
    snapshots = []
    for backend in BACKENDS:
        stream = open_with(make_bundle(SHORT_CHUNKS), backend).stream()
        stream.prefill(some_tokens(29))
        snapshots.append(stream.snapshot())
    for name, array in snapshots[0].tensors.items():
        assert_close(array, snapshots[1].tensors[name], TOLERANCE, name)


@pytest.mark.parametrize("sampling", [SamplingParams.greedy(), SamplingParams(seed=5, top_p=0.95)])
def test_the_same_text_whole_or_resumed_or_forked(
    make_bundle: MakeBundle, sampling: SamplingParams, tmp_path: Path
) -> None:
    session = open_with(make_bundle(SHORT_CHUNKS), "onnxruntime")
    whole = list(session.stream().generate("def f(x):", max_new_tokens=50, sampling=sampling))
    assert whole == list(session.stream().generate("def f(x):", max_new_tokens=50, sampling=sampling))
    stream = session.stream()
    head = list(stream.generate("def f(x):", max_new_tokens=20, sampling=sampling))
    stream.save(tmp_path / "stream")
    for other in (stream.fork(), session.stream(resume=tmp_path / "stream"), stream):
        tail = list(other.generate(max_new_tokens=30, sampling=sampling))
        assert [item.token for item in head + tail] == [item.token for item in whole]


def test_half_precision_keeps_half_precision_rows(make_bundle: MakeBundle) -> None:
    bundle, tokens = make_bundle(SHORT_CHUNKS, precision="fp16"), some_tokens(30)
    streams = [open_with(bundle, backend).stream() for backend in BACKENDS]
    for stream in streams:
        assert_close(stream.prefill(tokens), whole_logits(SHORT_CHUNKS, tokens)[-1], 2e-2)
        tensors = stream.snapshot().tensors
        assert tensors["past_key.0"].dtype == np.float16
        assert tensors["past_cema.0"].dtype == np.float32


def test_bfloat16_runs_on_torch_and_is_refused_by_onnxruntime(make_bundle: MakeBundle) -> None:
    bundle, tokens = make_bundle(SHORT_CHUNKS, precision="bf16"), some_tokens(30)
    with pytest.raises(EngineError, match="torch") as caught:
        open_with(bundle, "onnxruntime")
    assert "\n" not in str(caught.value)
    stream = open_with(bundle, "torch").stream()
    assert_close(stream.prefill(tokens), whole_logits(SHORT_CHUNKS, tokens)[-1], 0.1)
    assert stream.snapshot().tensors["past_value.0"].dtype.name == "bfloat16"
    wide = bundle.session("torch", dtype="float32").stream(resume=stream.snapshot())
    assert wide.snapshot().tensors["past_value.0"].dtype == np.float32


def test_a_bundle_that_returns_all_logits_streams_alike(make_bundle: MakeBundle) -> None:
    tokens = some_tokens(31)
    stream = open_with(make_bundle(SHORT_CHUNKS, logits="all"), "onnxruntime").stream()
    assert_close(stream.prefill(tokens[:30]), whole_logits(SHORT_CHUNKS, tokens)[29], TOLERANCE)
    assert_close(stream.step(tokens[30]), whole_logits(SHORT_CHUNKS, tokens)[30], TOLERANCE)


def test_torch_options_are_checked(make_bundle: MakeBundle) -> None:
    bundle = make_bundle(SHORT_CHUNKS)
    with pytest.raises(UserError, match="dtype = 'int8'"):
        bundle.session("torch", dtype="int8")
    with pytest.raises(EngineError, match="device = 'nonsense'"):
        bundle.session("torch", device="nonsense")


def test_a_missing_package_names_the_extras(make_bundle: MakeBundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingDependencyError, match=r"megalodon-deploy\[cpu\].*\[gpu\]"):
        make_bundle(SHORT_CHUNKS).session()


def test_a_damaged_graph_gets_one_line(make_bundle: MakeBundle, tmp_path: Path) -> None:
    source = make_bundle(SHORT_CHUNKS)
    for name in source.manifest.files:
        (tmp_path / name).write_bytes((source.path / name).read_bytes())
    (tmp_path / "manifest.json").write_bytes((source.path / "manifest.json").read_bytes())
    graph = (tmp_path / "model.onnx").read_bytes()
    (tmp_path / "model.onnx").write_bytes(graph[: len(graph) // 2] + bytes(len(graph) - len(graph) // 2))
    with pytest.raises(BundleError, match=r"model\.onnx: ONNX Runtime cannot load it") as caught:
        open_bundle(tmp_path).session()
    assert "\n" not in str(caught.value)


def test_streaming_imports_neither_torch_nor_onnx(make_bundle: MakeBundle) -> None:
    script = """
        import sys
        from megalodon_deploy import open_bundle
        session = open_bundle(sys.argv[1]).session(threads=1)
        stream = session.stream()
        tokens = list(stream.generate("x", max_new_tokens=20))
        stream.fork()
        assert len(tokens) == 20
        print([name for name in ("torch", "onnx", "onnx_ir", "onnxscript") if name in sys.modules])
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(make_bundle(SHORT_CHUNKS).path)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_memory_stays_flat_over_thousands_of_tokens(make_bundle: MakeBundle) -> None:
    stream = open_with(make_bundle(LONG_CHUNKS), "onnxruntime").stream()

    def resident_bytes() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    for token in some_tokens(1000):
        stream.step(token)
    before = resident_bytes()
    for token in some_tokens(5000, 1):
        stream.step(token)
    assert resident_bytes() - before < 512 * 1024


@pytest.mark.parametrize("chosen", [None, "0"])
def test_onnxruntime_reports_to_nobody_unless_told_to(chosen: str | None, tmp_path: Path) -> None:
    """Where it does, it keeps what it has to tell in the home directory."""
    names = ("XDG_CACHE_HOME", "ORT_DISABLE_TELEMETRY")
    environment = {name: value for name, value in os.environ.items() if name not in names} | {"HOME": str(tmp_path)}
    if chosen is not None:
        environment["ORT_DISABLE_TELEMETRY"] = chosen
    script = "import megalodon_deploy, os; print(os.environ['ORT_DISABLE_TELEMETRY'])"
    script += "" if chosen else "; import onnxruntime"
    command = [sys.executable, "-c", script]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()
    assert found == (chosen or "1")
    assert list(tmp_path.rglob("*")) == []
