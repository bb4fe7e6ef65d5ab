"""State on a GPU, on a stand-in that executes late: streams are what they are on the CPU, and every rule is kept."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers import assert_close
from runtime.fake_gpu import FakeCudaExecutor
from runtime.small_models import LONG_CHUNKS, SHORT_CHUNKS

from megalodon_deploy.bundle import Bundle
from megalodon_deploy.config import MegalodonConfig
from megalodon_deploy.errors import UserError
from megalodon_deploy.runtime.sampling import SamplingParams
from megalodon_deploy.runtime.session import Session
from megalodon_deploy.runtime.stream import Stream

MakeBundle = Callable[..., Bundle]
TOLERANCE = 1e-5
SAMPLED = SamplingParams(seed=5, top_p=0.95, temperature=1.5)


def some_tokens(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, 256, length).tolist()


def gpu_session(bundle: Bundle, max_slots: int = 8) -> Session:
    return Session(bundle, FakeCudaExecutor(bundle, max_slots))


def executor_of(session: Session) -> FakeCudaExecutor:
    return session.executor  # type: ignore[return-value]


@pytest.mark.parametrize("logits", ["last", "all"])
@pytest.mark.parametrize("config", [SHORT_CHUNKS, LONG_CHUNKS], ids=["short", "long"])
def test_a_stream_is_what_it_is_on_the_cpu(make_bundle: MakeBundle, config: MegalodonConfig, logits: str) -> None:
    bundle = make_bundle(config, logits=logits)
    on_gpu, on_cpu = gpu_session(bundle).stream(), bundle.session(threads=1).stream()
    rng = np.random.default_rng(1)
    while on_cpu.position < 3 * config.chunk_size:
        tokens = some_tokens(int(rng.integers(1, config.chunk_size)) if rng.random() < 0.2 else 1, on_cpu.position)
        assert_close(on_gpu.prefill(tokens), on_cpu.prefill(tokens), TOLERANCE, f"at {on_cpu.position}")
    ours, theirs = on_gpu.snapshot(), on_cpu.snapshot()
    for name, array in theirs.tensors.items():
        assert_close(ours.tensors[name], array, TOLERANCE, name)
    executor_of(on_gpu._session).gpu.check_margins()


@pytest.mark.parametrize("options", [{"precision": "fp16"}, {"kv_dtype": "fp8"}, {"kv_dtype": "int8"}], ids=str)
def test_memory_follows_the_state_table(make_bundle: MakeBundle, options: dict[str, str], tmp_path: Path) -> None:
    """Half precision rows; rows of one byte, with a scale for each."""
    bundle = make_bundle(SHORT_CHUNKS, **options)
    session, on_cpu = gpu_session(bundle), bundle.session(threads=1).stream()
    on_gpu = session.stream()
    on_gpu.prefill(some_tokens(8))
    on_gpu.save(tmp_path / "stream")
    on_gpu = session.batch(2).admit(resume=tmp_path / "stream")
    on_cpu.prefill(some_tokens(8))
    for token in some_tokens(30, 1):
        assert_close(on_gpu.step(token), on_cpu.step(token), 2e-3 if "precision" in options else TOLERANCE)
    for name, array in on_cpu.snapshot().tensors.items():
        assert on_gpu.snapshot().tensors[name].dtype == array.dtype, name


def test_steps_become_two_graphs_and_nothing_is_bound_again(make_bundle: MakeBundle) -> None:
    bundle = make_bundle(SHORT_CHUNKS)
    session = gpu_session(bundle)
    executor, stream = executor_of(session), session.stream()
    for token in some_tokens(40):
        stream.step(token)
    assert executor.gpu.launches == 38, "the first step of each half runs plainly"
    assert len(executor.gpu.graphs) == 2
    assert len(executor.engine.contexts) == 2


def test_generating_waits_once_a_token(make_bundle: MakeBundle) -> None:
    session = gpu_session(make_bundle(SHORT_CHUNKS))
    gpu = executor_of(session).gpu
    stream = session.stream()
    tokens = stream.generate("abc", max_new_tokens=20)
    next(tokens)
    before = gpu.synchronizations
    for _ in range(10):
        next(tokens)
    assert gpu.synchronizations - before == 10


@pytest.mark.parametrize("refusal", ["before", "within", "at the end"])
def test_an_engine_that_cannot_be_captured_runs_plainly(
    make_bundle: MakeBundle, refusal: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = make_bundle(SHORT_CHUNKS)
    session = gpu_session(bundle)
    executor = executor_of(session)
    executor.gpu.is_capture_broken = refusal == "at the end"
    executor.engine.refuses_capture = refusal == "within"
    if refusal == "before":
        monkeypatch.setattr("runtime.fake_gpu.FakeContext.is_capturable", False)
    on_gpu, on_cpu = session.stream(), bundle.session(threads=1).stream()
    for token in some_tokens(30):
        assert_close(on_gpu.step(token), on_cpu.step(token), TOLERANCE)
    assert executor.gpu.launches == 0
    assert not executor.gpu.graphs


def test_streams_of_a_batch_are_each_as_if_alone(make_bundle: MakeBundle) -> None:
    """Steps of all, of some, long pieces of one; streams that wait keep state and logits."""
    bundle = make_bundle(SHORT_CHUNKS)
    batch, alone = gpu_session(bundle).batch(4), bundle.session(threads=1)
    rng = np.random.default_rng(2)
    twins: dict[Stream, Stream] = {}
    for _ in range(150):
        chance = rng.random()
        if chance < 0.1 and len(twins) < 4:
            twins[batch.admit()] = alone.stream()
        elif chance < 0.15 and twins:
            gone = list(twins)[rng.integers(len(twins))]
            batch.retire(gone)
            del twins[gone]
        longest = 2 if rng.random() < 0.8 else 14
        chosen = [stream for stream in twins if rng.random() < 0.7]
        given = {stream: some_tokens(int(rng.integers(1, longest)), stream.position) for stream in chosen}
        for stream, logits_V in batch.feed(given).items():
            assert_close(logits_V, twins[stream].prefill(given[stream]), TOLERANCE)
        for stream, twin in twins.items():
            if stream.position:
                assert_close(stream.last_logits, twin.last_logits, TOLERANCE, "a stream that waited")
    executor_of(batch.session).gpu.check_margins()


@pytest.mark.parametrize("position", [5, 12, 40])
@pytest.mark.parametrize("source_is_gpu", [False, True])
def test_a_saved_stream_moves_between_cpu_and_gpu(
    make_bundle: MakeBundle, source_is_gpu: bool, position: int, tmp_path: Path
) -> None:
    bundle = make_bundle(SHORT_CHUNKS)
    whole = list(bundle.session(threads=1).stream().generate(some_tokens(position), max_new_tokens=30))
    sessions = [bundle.session(threads=1), gpu_session(bundle)]
    source, target = reversed(sessions) if source_is_gpu else sessions
    stream = source.stream()
    head = list(stream.generate(some_tokens(position), max_new_tokens=10))
    stream.save(tmp_path / "stream")
    tail = list(target.stream(resume=tmp_path / "stream").generate(max_new_tokens=20))
    assert [item.token for item in head + tail] == [item.token for item in whole]


@pytest.mark.parametrize("sampling", [None, SAMPLED])
def test_served_streams_give_the_text_of_the_cpu(make_bundle: MakeBundle, sampling: SamplingParams | None) -> None:
    bundle = make_bundle(SHORT_CHUNKS)
    session, alone = gpu_session(bundle), bundle.session(threads=1)
    scheduler = session.serve(max_streams=3, prefill_tokens=7)
    prompts = [some_tokens(3 + 5 * index, index) for index in range(7)]
    requests = [scheduler.submit(prompt, max_new_tokens=20, sampling=sampling) for prompt in prompts]
    scheduler.run()
    for prompt, request in zip(prompts, requests, strict=True):
        assert list(request) == list(alone.stream().generate(prompt, max_new_tokens=20, sampling=sampling))
    gpu = executor_of(session).gpu
    assert len(gpu.graphs) == 2, "the slots' steps; prompts are no steps"
    gpu.check_margins()


def test_a_broken_stream_leaves_nothing_behind(make_bundle: MakeBundle) -> None:
    session = gpu_session(make_bundle(SHORT_CHUNKS))
    batch = session.batch(2)
    broken, other = batch.admit(), batch.admit()
    batch.feed({broken: some_tokens(9), other: some_tokens(4, 1)})
    saved = broken.snapshot()
    batch._memory.write(0, 9, {name: np.full_like(array, np.nan) for name, array in saved.tensors.items()})
    assert np.isnan(batch.step({broken: 1, other: 2})[broken]).all()
    batch.retire(broken)
    tensors = batch._memory.read(0, 11)
    assert all(np.isfinite(array).all() for array in tensors.values())
    fresh, twin = batch.admit(), session.stream()
    assert_close(fresh.prefill(some_tokens(20)), twin.prefill(some_tokens(20)), TOLERANCE)


def test_a_broken_stream_leaves_nothing_where_pieces_are_read(make_bundle: MakeBundle) -> None:
    """Longer pieces of all slots go through one memory, one after the other."""
    session = gpu_session(make_bundle(SHORT_CHUNKS))
    batch = session.batch(2)
    broken, other = batch.admit(), batch.admit()
    batch.feed({broken: some_tokens(9)})
    tensors = broken.snapshot().tensors
    batch._memory.write(0, 9, tensors | {"past_value.0": np.full_like(tensors["past_value.0"], np.nan)})
    assert np.isnan(batch.feed({broken: some_tokens(3)})[broken]).all()
    assert_close(other.prefill(some_tokens(20)), session.stream().prefill(some_tokens(20)), TOLERANCE)


def test_memory_and_graphs_are_given_back(make_bundle: MakeBundle) -> None:
    session = gpu_session(make_bundle(SHORT_CHUNKS))
    gpu = executor_of(session).gpu
    gc.disable()
    try:
        for _ in range(3):
            stream = session.stream()
            list(stream.generate("abc", max_new_tokens=9))
            del stream
            assert not gpu.device
            assert not gpu.pinned
            assert not gpu.events
            assert not gpu.graphs
    finally:
        gc.enable()


def test_more_slots_than_the_engine_takes_are_refused(make_bundle: MakeBundle) -> None:
    with pytest.raises(UserError, match="--max-batch 3"):
        gpu_session(make_bundle(SHORT_CHUNKS), max_slots=2).batch(3)
