"""What a token takes: a call of the model, and the choice of what follows where the logits lie, as in generation."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from megalodon_deploy.errors import StateError
from megalodon_deploy.runtime.sampling import SamplingParams

if TYPE_CHECKING:
    from megalodon_deploy.runtime.batch import StreamBatch
    from megalodon_deploy.runtime.stream import Stream

# The first choice may need no call; then, on a GPU, a step runs once and is captured once for each half of the state.
UNTIMED_TOKENS = 5


def next_tokens(batch: StreamBatch, streams: Sequence[Stream]) -> None:
    """Generate the most probable token of each of these streams. Raises `StateError` when there is none."""
    chosen = batch.choose(dict.fromkeys(streams, SamplingParams.greedy()))
    if len(chosen) < len(streams):
        raise StateError("bench: the model's logits are not finite; look for the reason with `megalodon-deploy verify`")


def timed_tokens(batch: StreamBatch, streams: Sequence[Stream], count: int) -> list[float]:
    """Seconds of each of `count` tokens of all these streams together, after some that are not timed."""
    seconds = []
    for index in range(UNTIMED_TOKENS + count):
        start = time.perf_counter()
        next_tokens(batch, streams)
        if index >= UNTIMED_TOKENS:
            seconds.append(time.perf_counter() - start)
    return seconds
