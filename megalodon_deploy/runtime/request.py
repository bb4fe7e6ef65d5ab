"""One generation that a scheduler serves, as its caller sees it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Literal

from megalodon_deploy.errors import StateError
from megalodon_deploy.runtime.generation import GeneratedToken
from megalodon_deploy.runtime.saved_stream import SavedStream

if TYPE_CHECKING:
    from megalodon_deploy.runtime.scheduler import Scheduler

State = Literal["waiting", "prefill", "decode", "finished", "cancelled", "failed"]
OnToken = Callable[[GeneratedToken], None]


@dataclass
class RequestTimes:
    """Moments of a request, in seconds after it was submitted; None: not yet."""

    started: float | None = None  # its prompt began to be consumed
    first_token: float | None = None
    ended: float | None = None


class Request:
    """Made by `Scheduler.submit`. Its methods may be called from any thread, by one reader at a time."""

    def __init__(self, scheduler: Scheduler, on_token: OnToken | None) -> None:
        self.state: State = "waiting"
        self.times = RequestTimes()
        self.saved: SavedStream | None = None  # the stream at the end, when it was submitted with keep=True
        self._submitted = time.perf_counter()
        self._scheduler = scheduler
        self._on_token = on_token
        self._items: SimpleQueue[GeneratedToken | None] = SimpleQueue()  # None: no more follow
        self._error: Exception | None = None
        self._is_read = False

    @property
    def is_done(self) -> bool:
        return self.state in ("finished", "cancelled", "failed")

    def __iter__(self) -> Iterator[GeneratedToken]:
        """The tokens, each as soon as it is there; once. Raises what made the request fail.

        When no thread serves the scheduler, waiting for a token does its work.
        """
        while not self._is_read:
            item = self._next()
            if item is not None:
                yield item
            else:
                self._is_read = True
        if self._error is not None:
            raise self._error

    def text(self) -> str:
        """The rest of the text, when it is complete."""
        return "".join(item.text for item in self)

    def save(self, path: str | Path) -> None:
        """Write the stream's state at the end to a file. Raises `StateError` unless it was kept and has ended well."""
        if self.saved is None:
            raise StateError(f"{path}: the request has no stream to save; submit it with keep=True and read it first")
        self.saved.write(Path(path), self._scheduler.config)

    def cancel(self) -> None:
        """Stop before the next token; nothing happens when the request is done."""
        self._scheduler.cancel(self)

    def _next(self) -> GeneratedToken | None:
        while not self._scheduler.is_serving:
            try:
                return self._items.get_nowait()
            except Empty:
                self._scheduler.step()
        return self._items.get()

    # What follows is for `Scheduler`.

    def enter(self, state: State) -> None:
        self.state = state
        if state == "prefill":
            self.times.started = self._elapsed()

    def put(self, item: GeneratedToken) -> None:
        if self.times.first_token is None:
            self.times.first_token = self._elapsed()
        self._items.put(item)
        if self._on_token is not None:
            self._on_token(item)

    def end(self, state: State, error: Exception | None = None) -> None:
        if not self.is_done:
            self.state, self._error = state, error
            self.times.ended = self._elapsed()
            self._items.put(None)

    def _elapsed(self) -> float:
        return time.perf_counter() - self._submitted
