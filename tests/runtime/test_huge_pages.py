"""Memory that is allocated in the block moves to huge pages, with its content."""

from __future__ import annotations

import ctypes
import mmap
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from megalodon_deploy.runtime.executors.huge_pages import huge_pages

SIZE = 64 << 20
SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def collapses_on_request() -> bool:
    """Whether this kernel has huge pages and knows MADV_COLLAPSE, tried on a piece of memory."""
    if sys.platform != "linux" or not SETTING.exists() or "[never]" in SETTING.read_text():
        return False
    block = mmap.mmap(-1, 8 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    view = np.frombuffer(block, np.uint8)
    view[:] = 1
    address = -(-view.ctypes.data // (2 << 20)) * (2 << 20)
    return ctypes.CDLL(None).madvise(ctypes.c_void_p(address), ctypes.c_size_t(2 << 20), ctypes.c_int(25)) == 0


def huge_bytes(array: np.ndarray) -> int:
    """Bytes of huge pages in the regions that the array lies in, from the kernel's own account."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if not first.endswith(":"):
            start, end = (int(address, 16) for address in first.split("-"))
            inside = start < array.ctypes.data + array.nbytes and array.ctypes.data < end
        elif inside and first == "AnonHugePages:":
            total += int(line.split()[1]) * 1024
    return total


@pytest.mark.skipif(not collapses_on_request(), reason="this system gives no huge pages on request")
def test_memory_moves_and_keeps_its_content() -> None:
    with huge_pages():
        block = mmap.mmap(-1, SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        words = np.frombuffer(block, np.int64)
        words[:] = np.arange(len(words))
    for thread in threading.enumerate():
        if thread.name == "huge-pages":
            thread.join(timeout=60)
    assert huge_bytes(words) >= SIZE // 2
    np.testing.assert_array_equal(words, np.arange(len(words)))


def test_small_memory_and_errors_inside_are_left_alone() -> None:
    with pytest.raises(RuntimeError, match="inside"), huge_pages():
        raise RuntimeError("inside")
    with huge_pages():
        pass
    assert "huge-pages" not in {thread.name for thread in threading.enumerate()}
