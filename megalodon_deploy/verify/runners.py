"""Polygraphy runners that stream: each inference is one call of a schedule, and state goes on from call to call.

All runners take the same feed: `tokens`, `position` and the `capacity` S of the key/value memory that a caller would
pass. A candidate (`CarriedRunner` around a stock runner of one call) returns the graph's outputs; a reference returns
the same names, in float32, with the logits of all positions.
"""

from __future__ import annotations

import errno
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
from polygraphy.backend.base import BaseRunner
from polygraphy.common import TensorMetadata

from megalodon_deploy.config import MegalodonConfig
from megalodon_deploy.state import POSITION, TOKENS, state_specs
from megalodon_deploy.verify.memory import PoisonedMemory
from megalodon_deploy.verify.schedule import Schedule

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
CAPACITY = "capacity"  # [] int64, S of this call
Feed = Mapping[str, np.ndarray]


class CandidateFailedError(Exception):
    """A candidate that could not run a call at all; the message says which and why, in one line."""


def make_feeds(schedule: Schedule, vocab_size: int, seed: int) -> Iterator[dict[str, np.ndarray]]:
    """One feed dict per call, with random tokens."""
    num_tokens = schedule.num_tokens // schedule.batch
    tokens_BT = np.random.default_rng(seed).integers(0, vocab_size, (schedule.batch, num_tokens), dtype=np.int64)
    return feeds_of(schedule, tokens_BT)


def feeds_of(schedule: Schedule, tokens_BT: np.ndarray) -> Iterator[dict[str, np.ndarray]]:
    """One feed dict per call, with the tokens of all calls [B, T] int64 in a row."""
    begin = 0
    for call in schedule.calls:
        end = begin + call.num_tokens
        yield {
            TOKENS: np.ascontiguousarray(tokens_BT[:, begin:end]),
            POSITION: np.array(call.positions, np.int64),
            CAPACITY: np.array(call.capacity, np.int64),
        }
        begin = end


class StreamRunner(BaseRunner):  # type: ignore[misc]  # Polygraphy ships no types
    """Base of the runners here: the common feed, and the time of an inference."""

    def get_input_metadata_impl(self) -> TensorMetadata:
        batch_tokens, batch, scalar = (None, None), (None,), ()
        metadata = TensorMetadata()
        for name, shape in ((TOKENS, batch_tokens), (POSITION, batch), (CAPACITY, scalar)):
            metadata.add(name, dtype=np.int64, shape=shape)
        return metadata

    def infer_impl(self, feed_dict: Feed) -> OrderedDict[str, np.ndarray]:
        begin = time.perf_counter()
        outputs = self.call(feed_dict[TOKENS], feed_dict[POSITION], int(feed_dict[CAPACITY]))
        self.inference_time = time.perf_counter() - begin
        return OrderedDict(outputs)

    def call(self, tokens_BT: np.ndarray, position_B: np.ndarray, capacity: int) -> Mapping[str, np.ndarray]:
        """Outputs by name of one call."""
        raise NotImplementedError

    @contextmanager
    def failing(self, what: str) -> Iterator[None]:
        """Turn whatever a backend raises, which has no common base, into a `CandidateFailedError`; a full disk is no
        fault of it."""
        try:
            yield
        except Exception as error:
            if isinstance(error, OSError) and error.errno in _DISK_FULL:
                raise
            raise CandidateFailedError(f"{what}: {' '.join(str(error).split())}") from error


class CarriedRunner(StreamRunner):
    """Streams through a stock runner that knows single calls: ONNX Runtime's or TensorRT's.

    `positions` is where the rows begin; `start` holds the past tensors, by input name, of those that begin past
    position 0. `num_rows` key/value rows are held for each, a chunk of them by default.
    """

    def __init__(
        self,
        single: BaseRunner,
        config: MegalodonConfig,
        *,
        positions: Sequence[int] = (0,),
        start: Mapping[str, np.ndarray] | None = None,
        num_rows: int | None = None,
        activation: np.dtype,
        name: str,
    ) -> None:
        super().__init__(name=name)
        self._single = single
        self._config = config
        self._positions = positions
        self._start = start or {}
        self._num_rows = config.chunk_size if num_rows is None else num_rows
        self._activation = activation

    def activate_impl(self) -> None:
        self._memory = PoisonedMemory(
            self._config,
            self._positions,
            self._start,
            num_rows=self._num_rows,
            activation=self._activation,
        )
        with self.failing("cannot be loaded"):
            self._single.activate()
        self._broken = self._input_problem()

    def deactivate_impl(self) -> None:
        self._single.deactivate()
        del self._memory

    def _input_problem(self) -> str | None:
        wanted = {TOKENS, POSITION, *(spec.past for spec in state_specs(self._config))}
        found = set(self._single.get_input_metadata(use_numpy_dtypes=False))
        if wanted == found:
            return None
        return f"inputs {sorted(found - wanted)} are not in the contract, {sorted(wanted - found)} are missing"

    def call(self, tokens_BT: np.ndarray, position_B: np.ndarray, capacity: int) -> Mapping[str, np.ndarray]:
        if self._broken:
            raise CandidateFailedError(f"cannot go on: {self._broken}")
        positions = position_B.tolist()
        feed = {TOKENS: tokens_BT, POSITION: position_B, **self._memory.past(positions, capacity)}
        with self.failing("cannot run"):
            outputs: Mapping[str, np.ndarray] = self._single.infer(feed, check_inputs=False)
        self._broken = self._memory.advance(positions, tokens_BT.shape[1], outputs)
        return outputs
