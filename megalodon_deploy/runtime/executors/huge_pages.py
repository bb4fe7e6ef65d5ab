"""Huge pages for memory that a library allocates.

A token reads all the weights once. From pages of 4 KiB this takes about a tenth longer than from pages of 2 MiB: the
processor looks up as many addresses as there are pages. Linux gives huge pages to those who ask, and a library that
allocates its own memory does not ask.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from threading import Thread

_MADV_HUGEPAGE = 14
_MADV_COLLAPSE = 25  # Linux 6.1: at once; before that the kernel takes its time
_MIN_REGION_BYTES = 16 << 20  # weights, but no thread's stack
_PIECE_BYTES = 16 << 20  # asked for at a time: Linux gives up a request where its memory changes meanwhile

Region = tuple[int, int]  # first address, address after the last


@contextmanager
def huge_pages() -> Iterator[None]:
    """Move the large private memory that is allocated within the block to huge pages.

    A thread does it after the block: it takes about a second for a gigabyte, during which the memory can be used. Only
    a request: where the system has no huge pages, or is not Linux, memory stays as it is.
    """
    before = set(_private_regions())
    yield
    if regions := set(_private_regions()) - before:
        Thread(target=_advise, args=(regions,), name="huge-pages", daemon=True).start()


def _advise(regions: set[Region]) -> None:
    madvise = ctypes.CDLL(None).madvise
    for start, end in regions:
        for advice in (_MADV_HUGEPAGE, _MADV_COLLAPSE):
            for first, last in pairwise(_piece_edges(start, end)):
                madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), ctypes.c_int(advice))


def _piece_edges(start: int, end: int) -> list[int]:
    """Edges between huge pages, so that no huge page is cut."""
    first = -(-start // _PIECE_BYTES) * _PIECE_BYTES
    return [start, *range(first, end, _PIECE_BYTES), end]


def _private_regions() -> Iterator[Region]:
    """Large writable regions that belong to no file."""
    if sys.platform != "linux":
        return
    for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
        addresses, permissions, _, _, inode, *_ = line.split()
        start, end = (int(address, 16) for address in addresses.split("-"))
        if permissions == "rw-p" and inode == "0" and end - start >= _MIN_REGION_BYTES:
            yield start, end
