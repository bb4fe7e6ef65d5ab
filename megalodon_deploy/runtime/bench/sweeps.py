"""Steps of many streams at once, and steps of streams that have gone on for long."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from megalodon_deploy.errors import UserError
from megalodon_deploy.runtime.bench.report import BatchTimes, PositionTimes
from megalodon_deploy.runtime.bench.tokens import timed_tokens
from megalodon_deploy.runtime.stream import Stream

if TYPE_CHECKING:
    from megalodon_deploy.runtime.batch import StreamBatch
    from megalodon_deploy.runtime.session import Session

_PROMPT_TOKENS = 16


class BatchSweep:
    """Times steps of 1, 2, 4... streams. Sizes that the engine was not built for are left out."""

    def __init__(self, session: Session, sizes: Sequence[int]) -> None:
        self._batches: dict[int, tuple[StreamBatch, list[Stream]]] = {}
        for size in sorted(set(sizes)):
            try:
                batch = session.batch(size)
            except UserError:
                if size < 1:
                    raise
                break  # more than the engine takes
            streams = [batch.admit() for _ in range(size)]
            for stream in streams:
                stream.prefill([0] * _PROMPT_TOKENS)
            self._batches[size] = batch, streams
        self._seconds: dict[int, list[float]] = {size: [] for size in self._batches}

    def measure(self, steps: int) -> None:
        for size, (batch, streams) in self._batches.items():
            self._seconds[size] += timed_tokens(batch, streams, steps)

    def times(self) -> list[BatchTimes]:
        medians = {size: float(np.median(seconds)) for size, seconds in self._seconds.items()}
        return [
            BatchTimes(batch=size, median_ms=median * 1e3, tokens_per_second=size / median)
            for size, median in medians.items()
        ]


class PositionSweep:
    """Times steps far into streams, without running there: a stream's state does not grow, so the state of a young
    stream is taken for an old one's. All positions are moved to one place in their chunk, since time follows the
    number of rows of the open chunk too."""

    def __init__(self, session: Session, positions: Sequence[int]) -> None:
        if any(position < 1 for position in positions):
            raise UserError(f"positions = {list(positions)}: a stream that has consumed nothing cannot be timed")
        chunk_size = session.config.chunk_size
        place = max(1, min(positions, default=1) % chunk_size)
        self._session = session
        self._positions = sorted({position - position % chunk_size + place for position in positions})
        young = session.stream()
        young.prefill([0] * place)
        self._state = young.snapshot()
        self._seconds: dict[int, list[float]] = {position: [] for position in self._positions}

    def measure(self, steps: int) -> None:
        for position in self._positions:
            stream = self._session.stream(resume=replace(self._state, position=position))
            self._seconds[position] += timed_tokens(stream.batch, [stream], steps)

    def times(self) -> list[PositionTimes]:
        return [
            PositionTimes(
                position=position,
                median_ms=float(np.median(seconds)) * 1e3,
                p95_ms=float(np.percentile(seconds, 95)) * 1e3,
            )
            for position, seconds in self._seconds.items()
        ]
