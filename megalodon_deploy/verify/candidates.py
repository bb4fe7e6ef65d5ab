"""What is compared with PyTorch on the CPU: the graph in ONNX Runtime, and the public runtime that users call."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import numpy as np
from polygraphy.backend.base import BaseRunner
from polygraphy.backend.onnxrt import OnnxrtRunner, SessionFromOnnx

from megalodon_deploy.bundle import Bundle
from megalodon_deploy.config import MegalodonConfig
from megalodon_deploy.runtime.saved_stream import SavedStream
from megalodon_deploy.runtime.session import Session
from megalodon_deploy.runtime.stream import Stream
from megalodon_deploy.state import LOGITS, state_specs
from megalodon_deploy.verify.compare import Contract
from megalodon_deploy.verify.comparison import Candidate
from megalodon_deploy.verify.reference import Start
from megalodon_deploy.verify.runners import CarriedRunner, StreamRunner
from megalodon_deploy.verify.schedule import Schedule
from megalodon_deploy.verify.tolerance import tolerances

FLOAT32 = np.dtype(np.float32)


def onnx_candidate(bundle: Bundle) -> Candidate:
    """The graph of a float32 bundle in ONNX Runtime."""
    load_session = functools.cache(SessionFromOnnx(str(bundle.model_path), providers=["cpu"]))
    contract = Contract(logits=bundle.manifest.logits, activation=FLOAT32, tolerances=tolerances(bundle.config, "fp32"))
    return carried_candidate(
        "onnxruntime", "the graph, ONNX Runtime on the CPU", bundle.config, contract, lambda: OnnxrtRunner(load_session)
    )


def carried_candidate(
    name: str, what: str, config: MegalodonConfig, contract: Contract, make_single: Callable[[], BaseRunner]
) -> Candidate:
    """A candidate from a stock runner that knows single calls."""

    def make_runner(schedule: Schedule, start: Start) -> CarriedRunner:
        return CarriedRunner(make_single(), config, schedule, start, activation=contract.activation, name=name)

    return Candidate(name, what, contract, make_runner)


def session_candidate(session: Session) -> Candidate:
    """The runtime's own streams, in one batch. Key and value rows stay inside; they show in what follows from them."""
    contract = Contract(
        logits="last",
        activation=session.activation,
        tolerances=tolerances(session.config, "fp32"),
        hidden=frozenset({"key", "value"}),
    )
    name = f"{session.backend} session"
    return Candidate(
        name,
        "Session and Stream of the runtime",
        contract,
        lambda schedule, start: SessionRunner(session, schedule, start, name=name),
    )


class SessionRunner(StreamRunner):
    """Streams of the public runtime: admitted, resumed, fed together, retired when a row starts over."""

    def __init__(self, session: Session, schedule: Schedule, start: Start, *, name: str) -> None:
        super().__init__(name=name)
        self._session = session
        self._schedule = schedule
        self._start = start

    def activate_impl(self) -> None:
        self._batch = self._session.batch(self._schedule.batch)
        self._streams: list[Stream] = []
        for row, position in enumerate(self._schedule.start_positions):
            self._streams.append(self._batch.admit(resume=self._saved(row, position) if position else None))

    def deactivate_impl(self) -> None:
        del self._batch, self._streams

    def call(self, tokens_BT: np.ndarray, position_B: np.ndarray, capacity: int) -> Mapping[str, np.ndarray]:
        with self.failing(f"cannot run schedule {self._schedule.name}"):
            return self._feed(tokens_BT, position_B)

    def _feed(self, tokens_BT: np.ndarray, position_B: np.ndarray) -> Mapping[str, np.ndarray]:
        for row, position in enumerate(position_B.tolist()):
            if position == 0 and self._streams[row].position:
                self._batch.retire(self._streams[row])
                self._streams[row] = self._batch.admit()
        logits = self._batch.feed(dict(zip(self._streams, tokens_BT.tolist(), strict=True)))
        outputs = {LOGITS: np.stack([logits[stream] for stream in self._streams])[:, None]}
        states = [stream.snapshot().tensors for stream in self._streams]
        for spec in state_specs(self._session.config):
            if not spec.is_activation:
                outputs[spec.present] = np.concatenate([state[spec.past] for state in states])
        return outputs

    def _saved(self, row: int, position: int) -> SavedStream:
        used = position % self._session.config.chunk_size
        tensors = {}
        for spec in state_specs(self._session.config):
            mine = self._start[spec.past][row : row + 1]
            tensors[spec.past] = mine[:, :, :used].astype(self._session.activation) if spec.is_activation else mine
        return SavedStream(
            fingerprint=self._session.bundle.manifest.fingerprint,
            position=position,
            tensors=tensors,
            recent=(),
            pending=(),
            logits=np.zeros(self._session.config.vocab_size, np.float32),  # of the token before: replaced by the feed
            generator=None,
        )
