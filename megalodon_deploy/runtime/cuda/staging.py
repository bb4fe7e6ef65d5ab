"""Page-locked blocks in which numbers wait for their way to the GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from megalodon_deploy.runtime.cuda.arena import Arena
from megalodon_deploy.runtime.cuda.gpu import Gpu


@dataclass(frozen=True)
class Block:
    address: int
    array: np.ndarray  # its bytes
    event: int  # behind the last work that reads them


class StagingRing:
    """Blocks that are written in turn, each only after the GPU has read what it held before."""

    def __init__(self, gpu: Gpu, arena: Arena, *, num_blocks: int, size_bytes: int) -> None:
        self._gpu = gpu
        self._blocks = [Block(*arena.pinned(size_bytes), arena.event()) for _ in range(num_blocks)]
        self._next = 0

    @contextmanager
    def block(self, index: int | None = None) -> Iterator[Block]:
        """A block to fill; work that reads it is enqueued inside the `with`. `index`: that one, else the oldest."""
        if index is None:
            index, self._next = self._next, (self._next + 1) % len(self._blocks)
        block = self._blocks[index]
        self._gpu.wait(block.event)
        yield block
        self._gpu.record(block.event)
