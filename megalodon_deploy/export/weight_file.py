"""The weights of a graph in one file beside it, hashed while they are written."""

from __future__ import annotations

import hashlib
import os
import sys
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

import numpy as np
import onnx_ir as ir

from megalodon_deploy.bundle import FileEntry

INLINE_BYTES = 256  # tensors up to this size lie in the graph file, not beside it
_PAGE_BYTES = 4096  # weights begin on pages: executors map the file
_BLOCK_BYTES = 1 << 21  # written and then hashed while it is in the caches


def write_weights(graph: ir.Graph, path: Path, show: Callable[[str, float], None]) -> FileEntry:
    """Write the graph's initializers in their order into `path`, and refer to it in their place; small ones stay.

    Lazy tensors are made one after the other. `show` gets the name of each and the fraction of them that is written.
    """
    num_written, num_all = 0, sum(_is_large(value) for value in graph.initializers.values())
    with HashedFile(path) as file:
        for value in graph.initializers.values():
            is_large = _is_large(value)
            if is_large:
                show(str(value.name), num_written / num_all)
            tensor = value.const_value
            made = tensor.raw() if isinstance(tensor, ir.LazyTensor) else tensor
            value.const_value = _append(made, file, path) if is_large else made
            num_written += is_large
    return file.entry()


def _is_large(value: ir.Value) -> bool:
    assert value.const_value is not None, f"Bug: {value.name} has no value"
    return bool(value.const_value.nbytes > INLINE_BYTES)


def _append(tensor: ir.TensorProtocol, file: HashedFile, path: Path) -> ir.ExternalTensor:
    if tensor.nbytes > _PAGE_BYTES:
        file.align(_PAGE_BYTES)
    offset = file.size_bytes
    file.write(tensor.raw)
    return ir.ExternalTensor(
        path.name, offset, tensor.nbytes, tensor.dtype, shape=tensor.shape, name=tensor.name, base_dir=path.parent
    )


class HashedFile:
    """Writes and hashes arrays in a thread of its own, while the caller makes the next ones.

    No more waits than twice the largest array so far. Arrays must not be changed once given. Errors of writing are
    raised by a later call, at the latest by the end of the `with` block.
    """

    def __init__(self, path: Path) -> None:
        self.size_bytes = 0
        self._file = open(path, "wb")  # noqa: SIM115 -- closed by __exit__
        self._digest = hashlib.sha256()
        self._executor = ThreadPoolExecutor(1, "hashed-file")
        self._largest_bytes = 0
        self._waiting: deque[tuple[Future[None], int]] = deque()

    def __enter__(self) -> HashedFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._executor.shutdown(cancel_futures=kind is not None)
        with self._file:
            if kind is None:
                self._wait_until(0)

    def align(self, alignment_bytes: int) -> None:
        """Fill with zeros until the size is a multiple."""
        if gap := -self.size_bytes % alignment_bytes:
            self.write(np.zeros(gap, np.uint8))

    def write(self, array: np.ndarray) -> None:
        """Append the bytes of the array, in C order."""
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
        self._largest_bytes = max(self._largest_bytes, data.nbytes)
        self._wait_until(2 * self._largest_bytes - data.nbytes)
        self._waiting.append((self._executor.submit(self._append, data), data.nbytes))
        self.size_bytes += data.nbytes

    def entry(self) -> FileEntry:
        """Of the file, once the `with` block is left."""
        return FileEntry(self._digest.hexdigest(), self.size_bytes)

    def _wait_until(self, most_bytes: int) -> None:
        """Until no more than `most_bytes` wait to be written."""
        while self._waiting and sum(size for _, size in self._waiting) > most_bytes:
            self._waiting.popleft()[0].result()

    def _append(self, data: memoryview) -> None:
        for start in range(0, data.nbytes, _BLOCK_BYTES):
            block = data[start : start + _BLOCK_BYTES]
            self._file.write(block)
            if sys.platform == "linux":  # begin to write back now, so that little is left for the sync at the end
                end = self._file.tell()
                os.posix_fadvise(self._file.fileno(), end - len(block), len(block), os.POSIX_FADV_DONTNEED)
            self._digest.update(block)
