"""Streams that come, go, wait, move, fork and are saved at random, each beside a twin that runs alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers import assert_close, small_config
from runtime.fake_executor import fake_session
from runtime.small_models import SHORT_CHUNKS

from megalodon_deploy.bundle import Bundle
from megalodon_deploy.errors import StateError, UserError
from megalodon_deploy.runtime.batch import StreamBatch
from megalodon_deploy.runtime.sampling import SamplingParams
from megalodon_deploy.runtime.session import Session
from megalodon_deploy.runtime.stream import Stream

MakeBundle = Callable[..., Bundle]
Compare = Callable[[np.ndarray, np.ndarray], None]


class Crowd:
    """Streams of two batches, and for each a twin in a session of its own that is fed the same tokens."""

    def __init__(self, open_session: Callable[[], Session], compare: Compare, directory: Path) -> None:
        self.session, self.alone, self.compare = open_session(), open_session(), compare
        self.file = directory / "stream"
        self.batches = [self.session.batch(5), self.session.batch(3)]
        self.twins: dict[Stream, Stream] = {}
        self.rng = np.random.default_rng(5)
        self.seen: dict[str, int] = {}

    def act(self) -> None:
        chance = self.rng.random()
        for bound, name in ((0.06, "admit"), (0.09, "retire"), (0.12, "move"), (0.14, "fork"), (0.16, "save")):
            if chance < bound:
                getattr(self, name)()
                self.seen[name] = self.seen.get(name, 0) + 1
                return
        batch = self.batches[self.rng.integers(2)]
        chosen = [stream for stream in batch.streams if self.rng.random() < 0.7]
        longest = 9 if chance > 0.97 else 1
        self.feed(batch, {stream: self.tokens(int(self.rng.integers(1, longest + 1))) for stream in chosen})

    def feed(self, batch: StreamBatch, given: dict[Stream, list[int]]) -> None:
        for stream, logits_V in batch.feed(given).items():
            self.compare(logits_V, self.twins[stream].prefill(given[stream]))
            assert stream.position == self.twins[stream].position

    def tokens(self, length: int) -> list[int]:
        return self.rng.integers(0, self.session.config.vocab_size, length).tolist()

    def any_stream(self) -> Stream | None:
        return list(self.twins)[self.rng.integers(len(self.twins))] if self.twins else None

    def free_batch(self) -> StreamBatch | None:
        free = [batch for batch in self.batches if batch.num_free]
        return free[self.rng.integers(len(free))] if free else None

    def admit(self) -> None:
        if (batch := self.free_batch()) is not None:
            self.twins[batch.admit()] = self.alone.stream()

    def retire(self) -> None:
        if (stream := self.any_stream()) is not None:
            stream.batch.retire(stream)
            del self.twins[stream]

    def move(self) -> None:
        stream, batch = self.any_stream(), self.free_batch()
        if stream is not None and batch is not None and stream.batch is not batch:
            before = None if not stream.position else stream.last_logits.copy()
            batch.take_over(stream)
            if before is not None:
                np.testing.assert_array_equal(stream.last_logits, before)

    def fork(self) -> None:
        stream, batch = self.any_stream(), self.free_batch()
        if stream is not None and batch is not None:
            copy = batch.admit_copy(stream) if self.rng.random() < 0.5 else batch.admit(resume=stream.snapshot())
            self.twins[copy] = self.twins[stream].fork()

    def save(self) -> None:
        """Save a stream, retire it, resume it wherever there is room."""
        if (stream := self.any_stream()) is not None:
            stream.save(self.file)
            twin = self.twins.pop(stream)
            stream.batch.retire(stream)
            batch = self.free_batch()
            assert batch is not None
            self.twins[batch.admit(resume=self.file)] = twin


def test_ten_thousand_random_steps_leave_every_stream_as_if_alone(tmp_path: Path) -> None:
    config = small_config(vocab_size=64, num_layers=1, chunk_size=8)
    crowd = Crowd(lambda: fake_session(config), np.testing.assert_array_equal, tmp_path)
    longest = 0
    for _ in range(10_000):
        crowd.act()
        longest = max([longest, *(stream.position for stream in crowd.twins)])
    assert longest > 20 * config.chunk_size
    assert all(crowd.seen[name] > 100 for name in ("admit", "retire", "move", "fork", "save"))


@pytest.mark.parametrize("backend", ["onnxruntime", "torch"])
def test_random_steps_of_a_real_model_leave_every_stream_as_if_alone(
    make_bundle: MakeBundle, backend: str, tmp_path: Path
) -> None:
    bundle = make_bundle(SHORT_CHUNKS)

    def close(actual: np.ndarray, expected: np.ndarray) -> None:
        assert_close(actual, expected, 1e-5)

    crowd = Crowd(lambda: bundle.session(backend, threads=1), close, tmp_path)
    for _ in range(600):
        crowd.act()
    assert len(crowd.seen) == 5


def test_choosing_consumes_what_was_chosen_before_and_needs_a_beginning() -> None:
    config = small_config(vocab_size=64, num_layers=1, chunk_size=8)
    session, alone = fake_session(config), fake_session(config)
    batch, twin = session.batch(2), alone.stream()
    stream, fresh = batch.admit(), batch.admit()
    batch.feed({stream: [1, 2, 3]})
    twin.prefill([1, 2, 3])
    expected = [item.token for item in twin.generate(max_new_tokens=12)]
    assert [batch.choose({stream: SamplingParams.greedy()})[stream] for _ in range(12)] == expected
    assert stream.position == twin.position
    batch.retire(fresh)
    again = batch.admit()
    with pytest.raises(UserError, match="a fresh stream"):
        batch.choose({stream: SamplingParams.greedy(), again: SamplingParams.greedy()})
    assert stream.position == twin.position, "nothing was consumed"


def test_free_slots_run_along_in_steps_alone() -> None:
    session = fake_session(small_config(vocab_size=64, num_layers=1, chunk_size=8))
    batch = session.batch(3)
    first, gone, last = batch.admit(), batch.admit(), batch.admit()
    batch.retire(gone)
    calls = session.executor.memories[0].calls  # type: ignore[attr-defined]
    batch.feed({first: [1], last: [2]})
    batch.feed({first: [1, 2], last: [3, 4]})
    assert calls == [(0, 3, 1), (0, 1, 2), (2, 3, 2)]


def test_a_stream_of_another_session_is_not_taken() -> None:
    config = small_config(vocab_size=64, num_layers=1, chunk_size=8)
    stranger = fake_session(config).stream()
    stranger.prefill([1, 2, 3])
    batch = fake_session(config).batch(1)
    for take in (batch.admit_copy, batch.take_over):
        with pytest.raises(StateError, match="another session"):
            take(stranger)
    assert batch.num_free == 1
