"""What a memory holds on a GPU and in page-locked main memory, given back all at once."""

from __future__ import annotations

import ctypes
import weakref
from dataclasses import dataclass, field

import numpy as np

from megalodon_deploy.errors import EngineError
from megalodon_deploy.runtime.cuda.gpu import Gpu

ALIGNMENT_BYTES = 256  # TensorRT's condition on every tensor's address


def aligned(size_bytes: int) -> int:
    return -(-size_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


@dataclass
class _Held:
    device: list[int] = field(default_factory=list)
    pinned: list[int] = field(default_factory=list)
    events: list[int] = field(default_factory=list)
    graphs: list[int] = field(default_factory=list)


class Arena:
    """Gives out memory and events, and frees them when nobody holds the arena any more.

    Its methods are called while the GPU's context is current.
    """

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu
        self._held = _Held()
        weakref.finalize(self, _release, gpu, self._held)

    def device(self, sizes_bytes: dict[str, int]) -> dict[str, int]:
        """An address for each name, in one allocation, zero-filled in stream order."""
        base = self._gpu.allocate(sum(map(aligned, sizes_bytes.values())))
        self._held.device.append(base)
        addresses = {}
        for name, size_bytes in sizes_bytes.items():
            addresses[name] = base
            base += aligned(size_bytes)
        return addresses

    def pinned(self, size_bytes: int) -> tuple[int, np.ndarray]:
        """Page-locked memory: its address, and its bytes as an array."""
        address = self._gpu.allocate_pinned(size_bytes)
        self._held.pinned.append(address)
        return address, np.ctypeslib.as_array((ctypes.c_uint8 * size_bytes).from_address(address))

    def event(self) -> int:
        event = self._gpu.create_event()
        self._held.events.append(event)
        return event

    def keep_graph(self, graph: int) -> int:
        self._held.graphs.append(graph)
        return graph


def _release(gpu: Gpu, held: _Held) -> None:
    try:
        with gpu.current():
            gpu.synchronize()
            for graph in held.graphs:
                gpu.destroy_graph(graph)
            for event in held.events:
                gpu.destroy_event(event)
            for address in held.device:
                gpu.free(address)
            for address in held.pinned:
                gpu.free_pinned(address)
    except EngineError:  # the driver went first, as at the end of the program: so did the memory
        return
