"""How fast memory is read: the limit of decode, measured in turns with it."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np

from megalodon_deploy.runtime.cuda.arena import Arena
from megalodon_deploy.runtime.cuda.gpu import Gpu

READ_BYTES = 2 << 30  # far more than a cache holds: server processors have up to half a GB of it
_COPIES = 8  # of one measurement on a GPU


class MemoryReader(Protocol):
    large: list[float]  # bytes per second of each measurement, beyond any cache
    again: list[float]  # of as many bytes as the weights, which were just read

    def measure(self) -> None: ...


class HostReader:
    """Reads main memory with all threads, as fast as numpy can: an OR over 64-bit words.

    Once a buffer far larger than any cache, once more a buffer of the size of the weights that was read just before:
    a large cache keeps a part of it, as it keeps a part of the weights from token to token.
    """

    def __init__(self, size_bytes: int, weight_bytes: int, threads: int) -> None:
        self._words = np.ones(max(size_bytes, weight_bytes) // 8, np.int64)
        self._weight_words = self._words[: weight_bytes // 8]
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads)
        self.large: list[float] = []
        self.again: list[float] = []

    def measure(self) -> None:
        self.large.append(max(self._read(self._words) for _ in range(2)))
        self.again.append(max(self._read(self._weight_words) for _ in range(3)))

    def _read(self, words: np.ndarray) -> float:
        start = time.perf_counter()
        list(self._pool.map(np.bitwise_or.reduce, np.array_split(words, self._threads)))
        return words.nbytes / (time.perf_counter() - start)


class GpuReader:
    """Copies GPU memory: each byte is read once and written once, and both count."""

    def __init__(self, gpu: Gpu, size_bytes: int, weight_bytes: int) -> None:
        self._gpu = gpu
        self._size_bytes = {"large": size_bytes // 2, "again": max(1, min(weight_bytes, size_bytes) // 2)}
        with gpu.current():
            self._arena = Arena(gpu)
            half = max(self._size_bytes.values())
            self._halves = self._arena.device({"source": half, "target": half})
        self.large: list[float] = []
        self.again: list[float] = []

    def measure(self) -> None:
        self.large.append(self._copy(self._size_bytes["large"]))
        self.again.append(self._copy(self._size_bytes["again"]))

    def _copy(self, size_bytes: int) -> float:
        with self._gpu.current():
            self._gpu.copy(self._halves["target"], self._halves["source"], size_bytes)
            self._gpu.synchronize()
            start = time.perf_counter()
            for _ in range(_COPIES):
                self._gpu.copy(self._halves["target"], self._halves["source"], size_bytes)
            self._gpu.synchronize()
            return 2 * _COPIES * size_bytes / (time.perf_counter() - start)
