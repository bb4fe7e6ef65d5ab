"""Streams and batches over a toy backend: slots, splits at chunk edges, generation, save, resume and fork."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import small_config
from hypothesis import given, settings
from hypothesis import strategies as st
from runtime.fake_executor import fake_session

from megalodon_deploy.errors import StateError, UserError
from megalodon_deploy.runtime.generation import GeneratedToken
from megalodon_deploy.runtime.sampling import SamplingParams
from megalodon_deploy.runtime.session import Session
from megalodon_deploy.runtime.stream import Stream

CONFIG = small_config(vocab_size=256, num_layers=1, chunk_size=8)
SAMPLED = SamplingParams(temperature=2.0, top_k=100, repetition_penalty=1.5, repetition_window=20, seed=11)


@pytest.fixture
def session() -> Session:
    return fake_session(CONFIG)


def some_tokens(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, CONFIG.vocab_size, length).tolist()


def fed_alone(tokens: Sequence[int]) -> np.ndarray:
    """Last logits of a stream that takes the tokens one by one."""
    stream = fake_session(CONFIG).stream()
    for token in tokens:
        logits = stream.step(token)
    return logits


def generated(stream: Stream, prompt: str | Sequence[int] = (), **options: Any) -> list[GeneratedToken]:
    return list(stream.generate(prompt, **{"max_new_tokens": 30, "sampling": SAMPLED, **options}))


def tokens_of(items: list[GeneratedToken]) -> list[int]:
    return [item.token for item in items]


def text_of(items: list[GeneratedToken]) -> str:
    return "".join(item.text for item in items)


def test_prefill_is_split_at_chunk_edges_only(session: Session) -> None:
    stream = session.stream()
    stream.step(1)
    stream.prefill(some_tokens(20))
    assert [length for _, _, length in session.executor.memories[0].calls] == [1, 7, 8, 5]  # type: ignore[attr-defined]
    assert stream.position == 21


@settings(max_examples=40, deadline=None)
@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=6))
def test_any_split_gives_the_same_logits(lengths: list[int]) -> None:
    stream, tokens = fake_session(CONFIG).stream(), some_tokens(sum(lengths))
    position = 0
    for length in lengths:
        logits = stream.prefill(tokens[position : position + length])
        position += length
    np.testing.assert_array_equal(logits, fed_alone(tokens))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_streams_of_a_batch_are_each_as_if_alone(data: st.DataObject) -> None:
    """Random admissions, retirements and feeds of unequal length over three slots of poisoned memory."""
    batch = fake_session(CONFIG).batch(3)
    fed: dict[Stream, list[int]] = {}
    for _ in range(data.draw(st.integers(1, 12))):
        if len(fed) < 3 and data.draw(st.booleans()):
            fed[batch.admit()] = []
        elif fed and data.draw(st.integers(0, 4)) == 0:
            stream = data.draw(st.sampled_from(list(fed)))
            batch.retire(stream)
            del fed[stream]
        chosen = data.draw(st.lists(st.sampled_from(list(fed)), unique=True)) if fed else []
        given = {stream: some_tokens(data.draw(st.integers(1, 11)), len(fed[stream])) for stream in chosen}
        logits = batch.feed(given)
        assert set(logits) == set(given)
        for stream, tokens in given.items():
            fed[stream] += tokens
            np.testing.assert_array_equal(logits[stream], fed_alone(fed[stream]))
            assert stream.position == len(fed[stream])


def test_a_step_of_all_streams_is_one_call_whatever_their_positions(session: Session) -> None:
    batch = session.batch(3)
    streams = [batch.admit() for _ in range(3)]
    for index, stream in enumerate(streams):
        stream.prefill(some_tokens(5 * index + 1))
    calls = session.executor.memories[0].calls  # type: ignore[attr-defined]
    before = len(calls)
    batch.step(dict.fromkeys(streams, 7))
    assert calls[before:] == [(0, 3, 1)]
    batch.retire(streams[1])
    batch.step({streams[0]: 1, streams[2]: 2})
    assert calls[before + 1 :] == [(0, 3, 1)]  # the free slot between runs along
    batch.step({streams[2]: 3})
    assert calls[before + 2 :] == [(2, 3, 1)]


def test_slots_are_reused_and_a_retired_stream_is_refused(session: Session) -> None:
    batch = session.batch(1)
    first = batch.admit()
    first.prefill([1, 2, 3])
    with pytest.raises(UserError, match="slots"):
        batch.admit()
    batch.retire(first)
    second = batch.admit()
    np.testing.assert_array_equal(second.prefill([4]), fed_alone([4]))
    for use in (lambda: first.step(1), lambda: first.snapshot(), lambda: batch.retire(first)):
        with pytest.raises(StateError, match="retired"):
            use()
    with pytest.raises(StateError, match="another batch"):
        session.batch(1).step({second: 1})


def test_a_stream_that_nobody_keeps_gives_back_slot_and_memory(session: Session) -> None:
    """At once, without the garbage collector."""
    gc.disable()
    try:
        batch = session.batch(1)
        stream = batch.admit()
        stream.prefill([1, 2, 3])
        assert batch.streams == [stream]
        del stream
        assert batch.streams == []
        fresh = batch.admit()
        assert session.executor.memories[0].retired == [0]  # type: ignore[attr-defined]
        np.testing.assert_array_equal(fresh.prefill([4]), fed_alone([4]))
        memory = weakref.ref(session.executor.memories.pop())  # type: ignore[attr-defined]
        list(fresh.generate("x", max_new_tokens=3))
        del fresh, batch
        assert memory() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("sampling", [SamplingParams.greedy(), SAMPLED])
@pytest.mark.parametrize("cut", [1, 8, 13, 29])
@pytest.mark.parametrize("way", ["same", "save", "fork"])
def test_generation_goes_on_as_if_never_interrupted(
    sampling: SamplingParams, cut: int, way: str, tmp_path: Path
) -> None:
    session, prompt = fake_session(CONFIG), some_tokens(11)
    whole = tokens_of(generated(session.stream(), prompt, sampling=sampling))
    stream = session.stream()
    head = tokens_of(generated(stream, prompt, sampling=sampling, max_new_tokens=cut))
    if way == "save":
        stream.save(tmp_path / "stream")
        stream = fake_session(CONFIG).stream(resume=tmp_path / "stream")
    elif way == "fork":
        original, stream = stream, stream.fork()
        assert tokens_of(generated(original, sampling=sampling, max_new_tokens=30 - cut)) == whole[cut:]
    tail = tokens_of(generated(stream, sampling=sampling, max_new_tokens=30 - cut))
    assert head + tail == whole
    assert len(set(whole)) > 10


def test_a_stream_saved_after_prefill_goes_on(session: Session, tmp_path: Path) -> None:
    whole = tokens_of(generated(session.stream(), some_tokens(9)))
    stream = session.stream()
    stream.prefill(some_tokens(9))
    stream.save(tmp_path / "stream")
    assert tokens_of(generated(session.stream(resume=str(tmp_path / "stream")))) == whole


def test_a_snapshot_keeps_its_generator_while_the_stream_goes_on(session: Session) -> None:
    stream = session.stream()
    generated(stream, some_tokens(9))
    snapshot = stream.snapshot()
    tail = tokens_of(generated(stream))
    assert tokens_of(generated(session.stream(resume=snapshot))) == tail
    assert tokens_of(generated(session.stream(resume=snapshot))) == tail


def test_a_fresh_stream_can_be_saved_and_resumed(session: Session, tmp_path: Path) -> None:
    session.stream().save(tmp_path / "stream")
    stream = session.stream(resume=tmp_path / "stream")
    assert stream.position == 0
    np.testing.assert_array_equal(stream.prefill([3, 4]), fed_alone([3, 4]))


def test_an_abandoned_iteration_loses_nothing(session: Session) -> None:
    whole = tokens_of(generated(session.stream(), [5]))
    stream = session.stream()
    head = [item.token for _, item in zip(range(4), stream.generate([5], sampling=SAMPLED), strict=False)]
    assert head + tokens_of(generated(stream, max_new_tokens=26)) == whole


def test_a_second_prompt_follows_the_last_generated_token(session: Session) -> None:
    stream = session.stream()
    head = tokens_of(generated(stream, [5, 6], max_new_tokens=3))
    stream.prefill([9])
    assert stream.position == 6
    np.testing.assert_array_equal(stream.last_logits, fed_alone([5, 6, *head, 9]))


def test_same_seed_same_text_and_other_seed_other_text(session: Session) -> None:
    texts = [tokens_of(generated(session.stream(), [1], sampling=SamplingParams(seed=seed))) for seed in (3, 3, 4)]
    assert texts[0] == texts[1] != texts[2]
    unseeded = [tokens_of(generated(session.stream(), [1], sampling=SamplingParams())) for _ in range(2)]
    assert unseeded[0] != unseeded[1]


def test_penalty_sees_prompt_and_generated_tokens(session: Session) -> None:
    harsh = SamplingParams(temperature=0.0, repetition_penalty=1e6, repetition_window=1000)
    items = tokens_of(generated(session.stream(), some_tokens(20), sampling=harsh, max_new_tokens=40))
    assert len(set(items)) == 40
    assert not set(items) & set(some_tokens(20))


def test_text_is_whole_characters_and_continues_over_calls(session: Session) -> None:
    """The model is replaced by a script that writes this text byte by byte."""
    script = "na\u00efve \u20ac \U0001f389!".encode()
    stream = scripted(session, script)
    whole = generated(stream, "x", max_new_tokens=len(script))
    assert text_of(whole) == script.decode()
    for cut in range(1, len(script)):
        stream = scripted(session, script)
        head = generated(stream, "x", max_new_tokens=cut)
        tail = generated(stream, max_new_tokens=len(script) - cut)
        assert script.decode().startswith(text_of(head))
        assert text_of(head) + text_of(tail) == script.decode()


def scripted(session: Session, script: bytes) -> Stream:
    """A stream whose model gives every stream position its byte of the script, after a prompt of one token."""
    stream = session.stream()
    memory = session.executor.memories[-1]  # type: ignore[attr-defined]

    def run(rows: slice, tokens_BT: np.ndarray, position_B: np.ndarray) -> None:
        memory.last_logits[...] = 0
        memory.last_logits[0, script[(int(position_B[0]) + tokens_BT.shape[1] - 1) % len(script)]] = 100.0

    memory.run = run
    return stream


def test_stop_strings_end_the_text_before_them(session: Session) -> None:
    items = generated(scripted(session, b"one two end of it"), "x", stop_strings=["nd o", "it"])
    assert text_of(items) == "one two e"
    assert [item.finish for item in items] == [None] * 12 + ["stop_string"]
    limited = generated(scripted(session, b"one two end of it"), "x", stop_strings=["nd o"], max_new_tokens=10)
    assert text_of(limited) == "one two en"
    assert limited[-1] == GeneratedToken(ord("n"), "n", "length")


def test_stop_tokens_end_the_text_before_them() -> None:
    session = fake_session(CONFIG, stop_tokens=(ord("."),))
    items = generated(scripted(session, b"ab. cd"), "x", stop_strings=["b!"])
    assert text_of(items) == "ab"
    assert items[-1] == GeneratedToken(ord("."), "b", "stop_token")
    assert text_of(generated(scripted(session, b"ab. cd"), "x", stop_tokens=[ord("c")])) == "ab. "
    assert text_of(generated(scripted(session, b"ab. cd"), "x", stop_tokens=[], max_new_tokens=6)) == "ab. cd"


def test_generation_without_a_limit_goes_on_past_chunk_edges(session: Session) -> None:
    stream = session.stream()
    for count, item in enumerate(stream.generate("x", max_new_tokens=None, stop_tokens=[])):
        assert item.finish is None
        if count == 100:
            break
    assert stream.position == 101


def test_stats_count_tokens_and_seconds(session: Session) -> None:
    stream = session.stream()
    generated(stream, "hello", max_new_tokens=4)
    stream.step(1)
    stats = stream.stats.to_dict()
    assert (stats["prefill_tokens"], stats["decode_tokens"]) == (5, 4)
    assert stream.stats.prefill_seconds > 0
    assert stream.stats.decode_tokens_per_second == 4 / stream.stats.decode_seconds
    assert stats["state_bytes"] == session.state_bytes > 0


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ("x", {"max_new_tokens": 0}, "max_new_tokens"),
        ("x", {"stop_strings": "end"}, "stop_strings"),
        ([256], {}, "token 256"),
        ([-1], {}, "token -1"),
        ([1.5], {}, "integers"),
        ([[1]], {}, "integers"),
        ("", {}, "at least one token"),
        ([], {}, "at least one token"),
    ],
)
def test_mistakes_are_named_before_anything_runs(
    session: Session, prompt: Any, options: dict[str, Any], message: str
) -> None:
    stream = session.stream()
    with pytest.raises(UserError, match=message) as caught:
        stream.generate(prompt, **options)
    assert "\n" not in str(caught.value)
    assert session.executor.memories[0].calls == []  # type: ignore[attr-defined]


def test_a_mistake_in_a_batch_leaves_every_stream_as_it_was(session: Session) -> None:
    batch = session.batch(2)
    streams = [batch.admit(), batch.admit()]
    head = tokens_of(generated(streams[0], [1], max_new_tokens=2))
    for bad in ({streams[0]: [1], streams[1]: [999]}, {streams[0]: [1], streams[1]: []}):
        with pytest.raises(UserError):
            batch.feed(bad)
    np.testing.assert_array_equal(streams[0].prefill([4]), fed_alone([1, *head, 4]))


def test_session_options_are_checked(session: Session) -> None:
    with pytest.raises(UserError, match="num_slots"):
        session.batch(0)
    with pytest.raises(UserError, match="unknown backend 'cuda'"):
        session.bundle.session("cuda")
    with pytest.raises(UserError, match="threads"):
        session.bundle.session(threads=0)
    with pytest.raises(UserError, match="leave out dtype = 'float16'"):
        session.bundle.session(dtype="float16")
    for device in ("tpu", "cuda:", "cuda:x", "cuda1"):
        with pytest.raises(UserError, match=f"device = '{device}'"):
            session.bundle.session("tensorrt-rtx", device=device)
        with pytest.raises(UserError, match=f"device = '{device}': onnxruntime runs on 'cpu', 'cuda'"):
            session.bundle.session("onnxruntime", device=device)
    for options in ({"backend": "torch"}, {"device": "cpu"}, {}):
        with pytest.raises(UserError, match="stream"):
            session.bundle.session(**options, stream=1)
    with pytest.raises(UserError, match="native"):
        session.bundle.session("torch", native=True)
