"""Serves many generations with one model: slots that decode together, while new prompts are consumed in pieces.

A step of the scheduler is one call of the model for all streams that generate, and one piece of the oldest prompt that
waits. A prompt is consumed in a memory of its own, and its stream moves to a slot when it has a first token and a slot
is free: so a call never has a row that only waits, and its shape never changes.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megalodon_deploy.config import MegalodonConfig
from megalodon_deploy.errors import StateError, UserError
from megalodon_deploy.runtime.generation import GeneratedToken, Generation
from megalodon_deploy.runtime.request import OnToken, Request
from megalodon_deploy.runtime.sampling import SamplingParams
from megalodon_deploy.runtime.saved_stream import SavedStream
from megalodon_deploy.runtime.stream import Stream

if TYPE_CHECKING:
    from megalodon_deploy.runtime.session import Session

_BROKEN = "the stream went non-finite: its logits are NaN or infinite; submit it again, or check the model with verify"


@dataclass(eq=False)
class _Job:
    """A request and the stream that serves it."""

    request: Request
    generation: Generation
    prompt: str | Sequence[int]
    resume: str | Path | SavedStream | None
    keep: bool
    stream: Stream | None = None
    rest: Sequence[int] = ()  # of the prompt
    is_cancelled: bool = False


class Scheduler:
    """Made by `Session.serve`. `submit`, `cancel` and reading requests are safe from any thread.

    Its work is done by whoever reads a request, by an application that calls `step`, or by a thread of its own:
    `with session.serve(...) as scheduler` starts and ends one. Nothing else may use the session meanwhile.
    """

    def __init__(self, session: Session, *, max_streams: int, prefill_tokens: int = 256) -> None:
        """`max_streams` generate together; a step consumes `prefill_tokens` of a prompt at most.

        Raises `UserError` when one is not positive, and what `Session.batch` raises.
        """
        if prefill_tokens < 1:
            raise UserError(f"prefill_tokens = {prefill_tokens} is not a positive integer")
        self._session = session
        self._slots = session.batch(max_streams)
        self._prompt_slot = session.batch(1)
        self._prefill_tokens = prefill_tokens
        self._arrived: deque[_Job] = deque()
        self._consuming: _Job | None = None  # in the prompt slot; its prompt may be done
        self._generating: list[_Job] = []
        self._changed = threading.Condition()  # guards `_arrived`, `_thread` and `_is_closing`
        self._stepping = threading.RLock()  # guards everything else
        self._thread: threading.Thread | None = None
        self._is_closing = False

    def submit(
        self,
        prompt: str | Sequence[int] = (),
        *,
        max_new_tokens: int | None = 256,
        sampling: SamplingParams | None = None,
        stop_tokens: Sequence[int] | None = None,
        stop_strings: Sequence[str] = (),
        resume: str | Path | SavedStream | None = None,
        keep: bool = False,
        on_token: OnToken | None = None,
    ) -> Request:
        """Ask for a generation, as `Stream.generate` does it, on a fresh stream or on one that is resumed.

        `keep`: the stream's state is the request's `saved` at the end. `on_token` is called for each token by the
        thread that does the work; what it raises ends its request. Raises `UserError` for a value that makes no
        sense; what is wrong with a prompt or a saved stream is raised by reading the request.
        """
        generation = Generation(
            self._session,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            stop_tokens=stop_tokens,
            stop_strings=stop_strings,
        )
        job = _Job(Request(self, on_token), generation, prompt, resume, keep)
        with self._changed:
            if self._is_closing:
                raise UserError("the scheduler is closed; open another one with session.serve")
            self._arrived.append(job)
            self._changed.notify()
        return job.request

    def cancel(self, request: Request) -> None:
        with self._stepping, self._changed:
            for job in self._jobs():
                if job.request is request:
                    job.is_cancelled = True
            self._changed.notify()

    @property
    def config(self) -> MegalodonConfig:
        return self._session.config

    @property
    def num_waiting(self) -> int:
        """Requests that nothing was done for yet."""
        return len(self._arrived)

    @property
    def num_streams(self) -> int:
        """Requests that are being served."""
        return len(self._generating) + (self._consuming is not None)

    def step(self) -> bool:
        """A token for every stream that generates, and a piece of a prompt. False when there was nothing to do.

        What the backend raises ends all requests, and is raised here too.
        """
        with self._stepping:
            try:
                self._drop_cancelled()
                self._fill_slots()
                worked = self._decode()
                worked = self._prefill() or worked
                self._fill_slots()
            except Exception as error:
                self._end_all(error)
                raise
            return worked

    def run(self) -> None:
        """Work until every request is done."""
        while self.step():
            pass

    # The thread.

    @property
    def is_serving(self) -> bool:
        return self._thread is not None

    def __enter__(self) -> Scheduler:
        with self._changed:
            if self._thread is not None or self._is_closing:
                raise UserError("the scheduler was started before; open another one with session.serve")
            self._thread = threading.Thread(target=self._serve, name="megalodon-scheduler", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End the thread, if there is one, after the step it is in; requests that are not done fail. From any thread,
        and from a request's `on_token`."""
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        if self._thread not in (None, threading.current_thread()):  # a request's callback may close it
            self._thread.join()
        with self._stepping:
            self._end_all(StateError("the scheduler was closed before the request was done; submit it again"))

    def _serve(self) -> None:
        while True:
            with self._changed:
                while not (self._is_closing or self._arrived or self.num_streams):
                    self._changed.wait()
                if self._is_closing:
                    return
            try:
                self.step()
            except Exception as error:  # readers raise it
                with self._changed:
                    self._is_closing = True
                self._end_all(error)  # what arrived since
                return

    # A step's parts.

    def _decode(self) -> bool:
        jobs = {job.stream: job for job in self._generating if job.stream is not None}
        if not jobs:
            return False
        chosen = self._slots.choose({stream: job.generation.sampling for stream, job in jobs.items()})
        for stream, job in jobs.items():
            if job.request.is_done:
                continue  # a callback of another one closed the scheduler
            if stream in chosen:
                self._deliver(job, job.generation.push(chosen[stream]))
            else:
                self._end(job, StateError(_BROKEN))
        return True

    def _prefill(self) -> bool:
        """Consume a piece of the prompt in work; its end gives the first token."""
        if self._consuming is None and not self._begin():
            return False
        job = self._consuming
        assert job is not None
        assert job.stream is not None
        if job.request.state != "prefill":
            return False  # it waits for a slot
        piece, job.rest = job.rest[: self._prefill_tokens], job.rest[self._prefill_tokens :]
        if piece or job.stream.has_pending:
            self._prompt_slot.consume({job.stream: piece})
        if not job.rest:
            self._choose_first(job, job.stream)
        return True

    def _begin(self) -> bool:
        """Start the oldest request that can be started."""
        while True:
            with self._changed:
                if not self._arrived:
                    return False
                job = self._arrived.popleft()
            job.request.enter("prefill")
            try:
                job.stream = self._prompt_slot.admit(resume=job.resume)
                job.rest = job.stream.prompt_tokens(job.prompt)
            except UserError as error:
                self._end(job, error)
                continue
            self._consuming = job
            return True

    def _choose_first(self, job: _Job, stream: Stream) -> None:
        job.generation.begin(stream.history)
        chosen = self._prompt_slot.choose({stream: job.generation.sampling})
        if stream not in chosen:
            self._end(job, StateError(_BROKEN))
            return
        job.request.enter("decode")
        self._deliver(job, job.generation.push(chosen[stream]))

    def _fill_slots(self) -> None:
        job = self._consuming
        if job is None or job.stream is None or job.request.state != "decode" or not self._slots.num_free:
            return
        self._slots.take_over(job.stream)
        self._consuming = None
        self._generating.append(job)

    def _deliver(self, job: _Job, item: GeneratedToken) -> None:
        if item.finish is not None and job.keep and job.stream is not None:
            job.request.saved = job.stream.snapshot()
        try:
            job.request.put(item)
        except Exception as error:  # of the caller's on_token: its request's own trouble
            self._end(job, error)
            return
        if item.finish is not None:
            self._end(job)

    # How requests end.

    def _end(self, job: _Job, error: Exception | None = None) -> None:
        """Give back what a job holds, and tell its reader, whatever the backend says to that."""
        stream, job.stream = job.stream, None
        if job is self._consuming:
            self._consuming = None
        elif job in self._generating:
            self._generating.remove(job)
        try:
            if stream is not None:
                stream.batch.retire(stream)
        finally:
            job.request.end("cancelled" if job.is_cancelled else "failed" if error else "finished", error)

    def _drop_cancelled(self) -> None:
        with self._changed:
            cancelled = [job for job in self._jobs() if job.is_cancelled]
            self._arrived = deque(job for job in self._arrived if not job.is_cancelled)
        for job in cancelled:
            self._end(job)

    def _end_all(self, error: Exception) -> None:
        with self._changed:
            jobs = self._jobs()
            self._arrived.clear()
        for job in jobs:
            with suppress(Exception):  # a backend that is gone frees no slots either; the others must still be told
                self._end(job, error)

    def _jobs(self) -> list[_Job]:
        return [*self._arrived, *([self._consuming] if self._consuming else []), *self._generating]
