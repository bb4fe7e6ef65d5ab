"""Streams that share one memory and advance together.

A batch has slots. Admitting a stream to a slot costs nothing: it starts at position 0, and a model takes no notice of
what lies in the memory of a row at position 0.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from megalodon_deploy.errors import StateError, UserError
from megalodon_deploy.runtime.device_array import DeviceArray
from megalodon_deploy.runtime.sampling import SamplingParams
from megalodon_deploy.runtime.saved_stream import SavedStream, check_origin, read_saved_stream
from megalodon_deploy.runtime.stream import Stream, check_tokens

if TYPE_CHECKING:
    from megalodon_deploy.runtime.session import Session


class StreamBatch:
    """Slots for streams at positions of their own. Made by `Session.batch`.

    A stream holds its batch, but a batch does not hold its streams: a stream that nobody keeps gives its slot back.
    (Holding each other, they and their memory would wait for the garbage collector, which counts no bytes.)
    """

    def __init__(self, session: Session, num_slots: int) -> None:
        self.session = session
        self._memory = session.executor.open_slots(num_slots)
        self._slots: list[weakref.ref[Stream] | None] = [None] * num_slots

    @property
    def num_slots(self) -> int:
        return len(self._slots)

    @property
    def streams(self) -> list[Stream]:
        """The streams that hold a slot, in the order of their slots."""
        return [stream for slot in range(self.num_slots) if (stream := self._occupant(slot)) is not None]

    def admit(self, *, resume: str | Path | SavedStream | None = None) -> Stream:
        """Start or resume a stream in a free slot. Raises `UserError` when there is none, `StateError` for a saved
        stream of another bundle."""
        slot = self._free_slot()
        stream = Stream(self, slot)
        if resume is not None:
            saved = self._saved(resume)
            tensors = saved.tensors_as(self.session.executor.activation, self.session.config)
            self._memory.write(slot, saved.position, tensors)
            stream.restore(saved)
        self._slots[slot] = weakref.ref(stream)
        return stream

    def admit_copy(self, stream: Stream) -> Stream:
        """A second stream in the state of one of this session's; both go on alike, random choices included."""
        slot, source = self._free_slot(), self._source_of(stream)
        if stream.position:
            self._memory.copy(slot, source._memory, source._slot_of(stream), stream.position)
        copy = Stream(self, slot)
        copy.copy_from(stream)
        self._slots[slot] = weakref.ref(copy)
        return copy

    def take_over(self, stream: Stream) -> None:
        """Move a stream of another batch of this session to a free slot of this one; it leaves nothing behind."""
        slot, source = self._free_slot(), self._source_of(stream)
        self._memory.copy(slot, source._memory, source._slot_of(stream), stream.position)
        source.retire(stream)
        self._slots[slot] = weakref.ref(stream)
        stream.moved(self, slot)

    @property
    def num_free(self) -> int:
        self._reclaim()
        return self._slots.count(None)

    def retire(self, stream: Stream) -> None:
        """Free a stream's slot. The stream cannot be used any more."""
        self._memory.retire(self._slot_of(stream))
        self._slots[stream.slot] = None

    def step(self, tokens: Mapping[Stream, int]) -> dict[Stream, np.ndarray]:
        """Feed one token to each of these streams, in one call; the other streams wait. Returns logits [V] float32."""
        return self.feed({stream: [token] for stream, token in tokens.items()})

    def feed(self, tokens: Mapping[Stream, Sequence[int]]) -> dict[Stream, np.ndarray]:
        """Feed each of these streams some tokens, as many streams at a time as their lengths and chunk edges allow.

        Returns the logits [V] float32 that follow each stream's last token. Raises `UserError`, before anything is
        computed, for a token outside the vocabulary and for a stream without tokens.
        """
        self.consume(tokens)
        return {stream: stream.last_logits for stream in tokens}

    def consume(self, tokens: Mapping[Stream, Sequence[int]]) -> None:
        """`feed`, but the logits stay where they are computed, for `choose`."""
        self._reclaim()
        checked = {stream: check_tokens(given, self.session.config.vocab_size) for stream, given in tokens.items()}
        for stream, given in checked.items():
            self._slot_of(stream)
            if not given and not stream.has_pending:
                raise UserError("a stream was fed no tokens; give at least one")
        waiting = {stream.slot: stream.take(given) for stream, given in checked.items()}
        while waiting := {slot: rest for slot, rest in waiting.items() if len(rest)}:
            length = min(min(len(rest), self._rows_left(slot)) for slot, rest in waiting.items())
            for rows in self._ranges(set(waiting), length):
                self._call(rows, length, waiting)
            waiting = {slot: rest[length:] for slot, rest in waiting.items()}

    def choose(self, sampling: Mapping[Stream, SamplingParams]) -> dict[Stream, int]:
        """The next token of each of these streams, pending from then on; broken streams are left out.

        Tokens that were pending before are consumed first, in one call. Raises `UserError` for a fresh stream.
        """
        for stream in sampling:
            stream.check_begun()
        self.consume({stream: () for stream in sampling if stream.has_pending})
        choices = {stream: stream.choice(params) for stream, params in sampling.items()}
        in_memory = {self._slot_of(s): choice for s, choice in choices.items() if s.resumed_logits is None}
        tokens = self._memory.choose(in_memory)
        chosen = {}
        for stream, choice in choices.items():
            logits_V = stream.resumed_logits
            token = tokens.get(stream.slot) if logits_V is None else choice.of(logits_V)
            if token is not None:
                stream.chosen(token)
                chosen[stream] = token
        return chosen

    def logits(self, stream: Stream) -> np.ndarray:
        """A copy of the logits [V] float32 that follow a stream's last token, computed in this batch."""
        return self._memory.logits(self._slot_of(stream))

    def logits_on_gpu(self, stream: Stream) -> DeviceArray:
        from megalodon_deploy.runtime.cuda.memory import CudaMemory

        if not isinstance(self._memory, CudaMemory):
            raise UserError(f"the logits of {self.session.backend} are in main memory; use last_logits")
        return self._memory.logits_on_gpu(self._slot_of(stream))

    def _rows_left(self, slot: int) -> int:
        chunk_size = self.session.config.chunk_size
        return chunk_size - self._stream(slot).position % chunk_size

    def _ranges(self, active: set[int], length: int) -> Iterator[slice]:
        """The fewest contiguous ranges that hold every active slot and no stream that waits.

        In steps of one token free slots may lie between: they run as fresh streams, which their next stream takes no
        notice of. Longer pieces would cost time and rows for nobody.
        """
        taken = {slot for slot, reference in enumerate(self._slots) if reference is not None}
        if length == 1 and self._memory.prefers_whole_steps and taken <= active:
            yield slice(0, self.num_slots)
            return
        first = last = None
        for slot in range(self.num_slots + 1):
            if slot in active:
                first, last = (slot if first is None else first), slot
            elif first is not None and last is not None and (slot == self.num_slots or slot in taken or length > 1):
                yield slice(first, last + 1)
                first = last = None

    def _call(self, rows: slice, length: int, waiting: Mapping[int, np.ndarray]) -> None:
        slots = range(self.num_slots)[rows]
        tokens_BT = np.zeros((len(slots), length), np.int64)
        position_B = np.zeros(len(slots), np.int64)
        for row, slot in enumerate(slots):
            if slot in waiting:
                tokens_BT[row] = waiting[slot][:length]
                position_B[row] = self._stream(slot).position
        self._memory.run(rows, tokens_BT, position_B)
        for slot in slots:
            if slot in waiting:
                self._stream(slot).consumed(length)

    def snapshot_tensors(self, stream: Stream) -> dict[str, np.ndarray]:
        """A copy of a stream's state tensors."""
        return self._memory.read(self._slot_of(stream), stream.position)

    def _free_slot(self) -> int:
        self._reclaim()
        if None not in self._slots:
            raise UserError(f"all {self.num_slots} slots of the batch are taken; retire a stream first")
        return self._slots.index(None)

    def _reclaim(self) -> None:
        """Free the slots of streams that nobody keeps any more."""
        for slot, reference in enumerate(self._slots):
            if reference is not None and reference() is None:
                self._memory.retire(slot)
                self._slots[slot] = None

    def _occupant(self, slot: int) -> Stream | None:
        reference = self._slots[slot]
        return None if reference is None else reference()

    def _stream(self, slot: int) -> Stream:
        stream = self._occupant(slot)
        assert stream is not None, f"Bug: slot {slot} is free"
        return stream

    def _slot_of(self, stream: Stream) -> int:
        if not (0 <= stream.slot < self.num_slots and self._occupant(stream.slot) is stream):
            raise StateError("the stream was retired, or belongs to another batch; start or resume one with admit()")
        return stream.slot

    def _source_of(self, stream: Stream) -> StreamBatch:
        """The batch of a stream that is copied or moved here."""
        if stream.batch.session is not self.session:
            raise StateError("the stream is another session's; take a snapshot of it, and resume that")
        return stream.batch

    def _saved(self, resume: str | Path | SavedStream) -> SavedStream:
        manifest = self.session.bundle.manifest
        if isinstance(resume, SavedStream):
            check_origin((resume.fingerprint, resume.model_fingerprint), manifest, "snapshot")
            return resume
        return read_saved_stream(Path(resume), manifest)
