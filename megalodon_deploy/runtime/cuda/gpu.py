"""What the runtime asks of a GPU. `driver.py` answers through NVIDIA's bindings; tests answer with a stand-in that
executes late and checks every address. Addresses, streams, events and graphs are integers."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol


class Gpu(Protocol):
    """One GPU, and the stream that all work of a session goes to, in order."""

    index: int
    name: str
    capability: int  # 89 for 8.9
    stream: int

    def current(self) -> AbstractContextManager[None]:
        """Make the GPU's context the calling thread's while the block runs; every other method needs that."""
        ...

    def allocate(self, size_bytes: int) -> int:
        """Device memory, 256-byte aligned, zero-filled in stream order. Raises `EngineError` when there is no room."""
        ...

    def allocate_pinned(self, size_bytes: int) -> int:
        """Page-locked main memory, zero-filled, which copies may use while the program goes on."""
        ...

    def free(self, address: int) -> None: ...

    def free_pinned(self, address: int) -> None: ...

    def copy(self, target: int, source: int, size_bytes: int) -> None:
        """Enqueue a copy between any two kinds of memory. Pageable memory must stay as it is until `synchronize`."""
        ...

    def copy_rows(
        self, target: int, target_pitch: int, source: int, source_pitch: int, width_bytes: int, num_rows: int
    ) -> None:
        """Enqueue a copy of `num_rows` pieces of `width_bytes`, which lie a pitch apart."""
        ...

    def clear(self, address: int, size_bytes: int) -> None:
        """Enqueue a fill with zero bytes."""
        ...

    def synchronize(self) -> None:
        """Wait for everything that was enqueued. Raises `EngineError` when some of it failed."""
        ...

    def create_event(self) -> int: ...

    def destroy_event(self, event: int) -> None: ...

    def record(self, event: int) -> None:
        """Enqueue the event."""
        ...

    def wait(self, event: int) -> None:
        """Wait until what was enqueued before the event's last `record` is done; at once if there was none."""
        ...

    def begin_capture(self) -> None:
        """From here on, what is enqueued becomes a graph instead of being executed."""
        ...

    def end_capture(self) -> int | None:
        """The graph, ready to be launched; None when what was enqueued cannot be captured."""
        ...

    def launch(self, graph: int) -> None: ...

    def destroy_graph(self, graph: int) -> None: ...
