"""Many generations at once: each gives the text that it gives alone, whatever comes and goes beside it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import small_config
from runtime.fake_executor import FakeMemory, fake_session
from runtime.small_models import SHORT_CHUNKS

from megalodon_deploy.bundle import Bundle
from megalodon_deploy.errors import StateError, UserError
from megalodon_deploy.runtime.generation import GeneratedToken
from megalodon_deploy.runtime.request import Request
from megalodon_deploy.runtime.sampling import SamplingParams
from megalodon_deploy.runtime.session import Session

MakeBundle = Callable[..., Bundle]
CONFIG = small_config(vocab_size=256, num_layers=1, chunk_size=8)
SETTINGS = [
    None,
    SamplingParams(seed=3, temperature=2.0, top_k=50),
    SamplingParams(seed=4, temperature=1.5, top_p=0.9, repetition_penalty=1.3, repetition_window=20),
]


def random_requests(count: int, longest_prompt: int, seed: int = 0) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    return [
        {
            "prompt": rng.integers(0, 256, rng.integers(1, longest_prompt + 1)).tolist(),
            "max_new_tokens": int(rng.integers(1, 40)),
            "sampling": SETTINGS[rng.integers(len(SETTINGS))],
        }
        for _ in range(count)
    ]


def alone(session: Session, request: dict[str, Any]) -> list[GeneratedToken]:
    return list(session.stream().generate(**request))


def memories(session: Session) -> list[FakeMemory]:
    return session.executor.memories  # type: ignore[attr-defined, no-any-return]


@pytest.fixture
def session() -> Session:
    return fake_session(CONFIG)


@pytest.mark.parametrize("prefill_tokens", [1, 5, 1000])
@pytest.mark.parametrize("max_streams", [1, 4])
def test_every_request_gives_what_it_gives_alone(session: Session, max_streams: int, prefill_tokens: int) -> None:
    scheduler = session.serve(max_streams=max_streams, prefill_tokens=prefill_tokens)
    requests = random_requests(12, longest_prompt=30)
    rng, served = np.random.default_rng(1), []
    for request in requests:
        served.append(scheduler.submit(**request))
        for _ in range(rng.integers(6)):
            scheduler.step()
    scheduler.run()
    for request, handle in zip(requests, served, strict=True):
        assert handle.state == "finished"
        assert list(handle) == alone(fake_session(CONFIG), request)
    assert scheduler.num_streams == scheduler.num_waiting == 0


def test_slots_stay_full_and_prompts_are_consumed_in_pieces(session: Session) -> None:
    """While requests wait, every decode call has all slots; between two of them at most one piece of a prompt."""
    scheduler = session.serve(max_streams=3, prefill_tokens=4)
    for index in range(9):
        scheduler.submit([index] * 10, max_new_tokens=12)
    decode, prompts = memories(session)
    pieces: list[int] = []
    while scheduler.num_waiting:
        before, already = len(prompts.calls), scheduler.num_streams
        calls = len(decode.calls)
        scheduler.step()
        pieces.append(sum(length for _, _, length in prompts.calls[before:]))
        if already == 4:  # three generate, one is being prepared
            assert decode.calls[calls:] == [(0, 3, 1)]
    assert max(pieces) == 4
    assert all(length == 1 for _, _, length in decode.calls)
    scheduler.run()
    assert not any(batch.streams for batch in (scheduler._slots, scheduler._prompt_slot))


def test_reading_a_request_does_the_work(session: Session) -> None:
    scheduler = session.serve(max_streams=2)
    first, second = scheduler.submit("abc", max_new_tokens=20), scheduler.submit("de", max_new_tokens=20)
    expected = [alone(fake_session(CONFIG), {"prompt": text, "max_new_tokens": 20}) for text in ("abc", "de")]
    assert second.text() == "".join(item.text for item in expected[1])
    assert list(first) == expected[0]
    assert list(first) == []
    times = first.times
    assert times.started is not None
    assert times.first_token is not None
    assert times.ended is not None
    assert times.started <= times.first_token <= times.ended


def test_a_kept_stream_goes_on_in_another_request(session: Session, tmp_path: Path) -> None:
    whole = alone(fake_session(CONFIG), {"prompt": "abc", "max_new_tokens": 30, "sampling": SETTINGS[1]})
    scheduler = session.serve(max_streams=2)
    head = scheduler.submit("abc", max_new_tokens=11, sampling=SETTINGS[1], keep=True)
    tokens = list(head)
    assert head.saved is not None
    head.save(tmp_path / "stream")
    for resume in (head.saved, tmp_path / "stream"):
        tail = scheduler.submit(resume=resume, max_new_tokens=19, sampling=SETTINGS[1])
        assert [item.token for item in [*tokens, *tail]] == [item.token for item in whole]
        with pytest.raises(StateError, match="keep=True"):
            tail.save(tmp_path / "other")


def test_stop_strings_callbacks_and_mistakes(session: Session, tmp_path: Path) -> None:
    scheduler = session.serve(max_streams=2)
    request = {"prompt": "abc", "max_new_tokens": 30}
    items = alone(fake_session(CONFIG), request)
    seen: list[GeneratedToken] = []
    handle = scheduler.submit(**request, on_token=seen.append)  # type: ignore[arg-type]
    broken = scheduler.submit("abc", on_token=lambda item: 1 // 0)
    outside = scheduler.submit([999])
    empty = scheduler.submit("")
    missing = scheduler.submit("x", resume=tmp_path / "nothing")
    scheduler.run()
    assert seen == list(handle) == items
    with pytest.raises(ZeroDivisionError):
        broken.text()
    for bad, message in ((outside, "token 999"), (empty, "at least one token"), (missing, "no such file")):
        assert bad.state == "failed"
        with pytest.raises(UserError, match=message):
            list(bad)
    for options, message in (({"max_new_tokens": 0}, "max_new_tokens"), ({"stop_strings": "x"}, "stop_strings")):
        with pytest.raises(UserError, match=message):
            scheduler.submit("x", **options)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="prefill_tokens"):
        session.serve(prefill_tokens=0)
    with pytest.raises(UserError, match="num_slots"):
        session.serve(max_streams=0)


def test_a_broken_stream_fails_alone(session: Session) -> None:
    scheduler = session.serve(max_streams=2)
    good, bad = scheduler.submit("good", max_new_tokens=25), scheduler.submit("bad!", max_new_tokens=25)
    for _ in range(6):
        scheduler.step()
    memories(session)[0]._state["past_cema.0"][1] = np.nan
    scheduler.run()
    with pytest.raises(StateError, match="non-finite"):
        list(bad)
    assert list(good) == alone(fake_session(CONFIG), {"prompt": "good", "max_new_tokens": 25})
    assert memories(session)[0].retired.count(1) == 1
    again = scheduler.submit("bad!", max_new_tokens=5)
    assert list(again) == alone(fake_session(CONFIG), {"prompt": "bad!", "max_new_tokens": 5})


def test_a_cancelled_request_ends_wherever_it_is(session: Session) -> None:
    scheduler = session.serve(max_streams=1, prefill_tokens=2)
    requests = [scheduler.submit([1] * 6, max_new_tokens=50) for _ in range(4)]
    while requests[1].state != "prefill":
        scheduler.step()
    assert [request.state for request in requests] == ["decode", "prefill", "waiting", "waiting"]
    for request in requests[:3]:
        request.cancel()
    scheduler.step()
    assert [request.state for request in requests[:3]] == ["cancelled"] * 3
    assert len(list(requests[0])) < 50
    assert [item.token for item in requests[3]] == [
        item.token for item in alone(fake_session(CONFIG), {"prompt": [1] * 6, "max_new_tokens": 50})
    ]
    requests[3].cancel()
    assert requests[3].state == "finished"


def test_a_failing_backend_ends_every_request(session: Session) -> None:
    scheduler = session.serve(max_streams=1)
    requests = [scheduler.submit("abc", max_new_tokens=9) for _ in range(3)]

    def fail(*arguments: Any) -> None:
        raise RuntimeError("the device is gone")

    scheduler.step()
    for memory in memories(session):
        memory.run = fail  # type: ignore[method-assign]
    for request in requests:
        with pytest.raises(RuntimeError, match="the device is gone"):
            list(request)
    assert scheduler.num_streams == scheduler.num_waiting == 0


def test_threads_submit_to_a_thread_that_serves(session: Session) -> None:
    requests = random_requests(24, longest_prompt=20, seed=2)
    found: dict[int, list[GeneratedToken]] = {}

    with session.serve(max_streams=4, prefill_tokens=6) as scheduler:
        assert scheduler.is_serving

        def ask(first: int) -> None:
            for index in range(first, len(requests), 6):
                found[index] = list(scheduler.submit(**requests[index]))

        threads = [threading.Thread(target=ask, args=(first,)) for first in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert sorted(found) == list(range(24))
    for index, request in enumerate(requests):
        assert found[index] == alone(fake_session(CONFIG), request)


def test_closing_ends_what_is_not_done(session: Session) -> None:
    with session.serve(max_streams=1) as scheduler:
        endless = [scheduler.submit("x", max_new_tokens=None, stop_tokens=[]) for _ in range(2)]
        iterator = iter(endless[0])
        next(iterator)
    for request in endless:
        assert request.state == "failed"
        with pytest.raises(StateError, match="closed"):
            list(request)
    with pytest.raises(UserError, match="closed"):
        scheduler.submit("x")
    with pytest.raises(UserError, match="before"), scheduler:
        pass


def test_a_callback_may_close_the_scheduler(session: Session) -> None:
    scheduler = session.serve(max_streams=2)
    late: list[GeneratedToken] = []
    endless: dict[str, Any] = {"max_new_tokens": None, "stop_tokens": []}
    closing = scheduler.submit("x", on_token=lambda item: scheduler.is_serving and scheduler.close(), **endless)
    others = [scheduler.submit("y", on_token=late.append, **endless), scheduler.submit("z", **endless)]
    while others[0].state != "decode":
        scheduler.step()
    late.clear()
    with scheduler, ThreadPoolExecutor() as readers:
        for reading in [readers.submit(list, request) for request in (closing, *others)]:
            with pytest.raises(StateError, match="closed"):
                reading.result(timeout=30)
    assert not late


def test_an_error_in_the_thread_reaches_every_reader(session: Session) -> None:
    def fail(*arguments: Any) -> None:
        raise RuntimeError("the device is gone")

    scheduler = session.serve(max_streams=2)
    handles: list[Request] = [scheduler.submit("x", max_new_tokens=None, stop_tokens=[]) for _ in range(5)]
    for _ in range(4):
        scheduler.step()
    assert [handle.state for handle in handles] == ["decode", "decode", "decode", "waiting", "waiting"]
    for memory in memories(session):
        memory.run = memory.retire = fail  # type: ignore[method-assign, assignment]
    with scheduler, ThreadPoolExecutor() as readers:
        for reading in [readers.submit(list, handle) for handle in handles]:
            with pytest.raises(RuntimeError, match="the device is gone"):
                reading.result(timeout=30)


def test_64_streams_of_a_real_model_give_what_they_give_alone(make_bundle: MakeBundle) -> None:
    """Random arrivals; the memory of retired streams is used again many times."""
    bundle = make_bundle(SHORT_CHUNKS)
    requests = random_requests(120, longest_prompt=30, seed=3)
    scheduler = bundle.session(threads=1).serve(max_streams=64, prefill_tokens=16)
    rng, served, most = np.random.default_rng(4), [], 0
    for request in requests:
        served.append(scheduler.submit(**request))
        if len(served) > 90:
            for _ in range(rng.integers(4)):
                scheduler.step()
        most = max(most, scheduler.num_streams)
    while scheduler.step():
        most = max(most, scheduler.num_streams)
    reference = bundle.session(threads=1)
    for request, handle in zip(requests, served, strict=True):
        assert list(handle) == alone(reference, request)
    assert most > 15
