"""One stream of tokens: a conversation, a document, anything that goes on and on in constant memory."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from megalodon_deploy.errors import StateError, UserError
from megalodon_deploy.runtime.device_array import DeviceArray, download, is_device_array
from megalodon_deploy.runtime.generation import GeneratedToken, Generation
from megalodon_deploy.runtime.sampling import HISTORY_TOKENS, Choice, Generator, SamplingParams
from megalodon_deploy.runtime.saved_stream import SavedStream
from megalodon_deploy.runtime.stats import StreamStats
from megalodon_deploy.state import zero_state

if TYPE_CHECKING:
    from megalodon_deploy.runtime.batch import StreamBatch

_FRESH = "a fresh stream has nothing to go on from; give a prompt of at least one token"


class Stream:
    """Made by `Session.stream` and `StreamBatch.admit`."""

    def __init__(self, batch: StreamBatch, slot: int) -> None:
        self._batch = batch
        self._session = batch.session
        self.slot = slot
        self.position = 0  # tokens consumed
        self.stats = StreamStats(state_bytes=self._session.state_bytes)
        self._recent: list[int] = []  # the last tokens, oldest first; HISTORY_TOKENS of them at least
        self._pending: tuple[int, ...] = ()  # a generated token that is not consumed yet; it is the last of `_recent`
        self._resumed_logits_V: np.ndarray | None = None  # of the last consumed token, when no call has computed them
        self._generator: Generator | None = None

    def prefill(self, tokens: Sequence[int]) -> np.ndarray:
        """Consume tokens, in calls of a chunk at most; returns the logits [V] float32 that follow the last one.

        Tokens, here and elsewhere, may also be an array of integers, of numpy or on a GPU.
        """
        start = time.perf_counter()
        tokens = check_tokens(tokens, self._session.config.vocab_size)
        logits_V = self._batch.feed({self: tokens})[self]
        self.stats.prefill_tokens += len(tokens)
        self.stats.prefill_seconds += time.perf_counter() - start
        return logits_V

    def step(self, token: int) -> np.ndarray:
        """Consume one token; returns the logits [V] float32 that follow it."""
        start = time.perf_counter()
        logits_V = self._batch.step({self: token})[self]
        self.stats.decode_tokens += 1
        self.stats.decode_seconds += time.perf_counter() - start
        return logits_V

    def generate(
        self,
        prompt: str | Sequence[int] = (),
        *,
        max_new_tokens: int | None = 256,
        sampling: SamplingParams | None = None,
        stop_tokens: Sequence[int] | None = None,
        stop_strings: Sequence[str] = (),
    ) -> Iterator[GeneratedToken]:
        """Consume a prompt, then generate token by token while the caller iterates.

        Without a prompt the stream goes on where it is. `max_new_tokens` None: until a stop. `sampling` None: always
        the most probable token. `stop_tokens` None: those of the bundle's tokenizer. The text ends before a stop
        token or stop string. The token that was generated last is consumed by the next call on the stream.
        Raises `UserError` for a value that makes no sense, and for a fresh stream without a prompt.
        """
        generation = Generation(
            self._session,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            stop_tokens=stop_tokens,
            stop_strings=stop_strings,
        )
        return self._generate(self.prompt_tokens(prompt), generation)

    @property
    def logits_on_gpu(self) -> DeviceArray:
        """`last_logits` where they are computed, without a copy: an array that PyCUDA, CuPy and PyTorch take, valid
        until the next call of the stream's batch. What is written there is what `generate` chooses from.

        Raises `UserError` where the logits are not on a GPU, and on a stream that no call has advanced yet.
        """
        if self._resumed_logits_V is not None or not self.position:
            raise UserError("no logits of this stream are on the GPU yet; step it or prefill it first")
        return self._batch.logits_on_gpu(self)

    def snapshot(self) -> SavedStream:
        """The stream's whole state, copied; `resume` takes it as it takes a file."""
        if self.position:
            tensors = self._batch.snapshot_tensors(self)
        else:  # what lies in the slot is not this stream's
            tensors = zero_state(self._session.config, batch=1, capacity=0, activation=self._session.activation)
        return SavedStream(
            fingerprint=self._session.bundle.manifest.fingerprint,
            model_fingerprint=self._session.bundle.manifest.model_fingerprint,
            position=self.position,
            tensors=tensors,
            recent=tuple(self.history),
            pending=self._pending,
            logits=None if self._pending or not self.position else self.last_logits.copy(),
            generator=None if self._generator is None else replace(self._generator),
        )

    def save(self, path: str | Path) -> None:
        """Write the stream to a file, whole or not at all. Raises `StateError` when it has gone non-finite."""
        self.snapshot().write(Path(path), self._session.config)

    def fork(self) -> Stream:
        """A second stream in this state, in a memory of its own. Both go on alike, random choices included."""
        return self._session.batch(1).admit_copy(self)

    # What follows up to the next comment is for `StreamBatch`.

    def take(self, tokens: Sequence[int]) -> np.ndarray:
        """Note checked tokens that are about to be consumed; returns them with the pending one before them."""
        self._note(tokens)
        taken, self._pending = np.array([*self._pending, *tokens], np.int64), ()
        return taken

    def consumed(self, num_tokens: int) -> None:
        self.position += num_tokens
        self._resumed_logits_V = None

    @property
    def has_pending(self) -> bool:
        return bool(self._pending)

    @property
    def last_logits(self) -> np.ndarray:
        """Logits [V] float32 that follow the last consumed token. Raises `UserError` on a fresh stream."""
        if self._resumed_logits_V is not None:
            return self._resumed_logits_V
        self.check_begun()
        return self._batch.logits(self)

    def check_begun(self) -> None:
        """Raises `UserError` on a stream that has consumed nothing."""
        if not self.position:
            raise UserError(_FRESH)

    @property
    def resumed_logits(self) -> np.ndarray | None:
        """The logits of a resumed stream until its first call: they are not in the batch's memory."""
        return self._resumed_logits_V

    def choice(self, sampling: SamplingParams) -> Choice:
        return Choice(sampling, self._recent, self._generator_for(sampling))

    def chosen(self, token: int) -> None:
        """Take the token that follows; it is pending until it is consumed."""
        self._note([token])
        self._pending = (token,)

    @property
    def batch(self) -> StreamBatch:
        return self._batch

    def moved(self, batch: StreamBatch, slot: int) -> None:
        self._batch, self.slot = batch, slot

    def copy_from(self, other: Stream) -> None:
        """Take over everything that is not in the batch's memory."""
        self.position, self._recent, self._pending = other.position, list(other._recent), other._pending
        self._resumed_logits_V = other._resumed_logits_V
        self._generator = None if other._generator is None else replace(other._generator)

    def restore(self, saved: SavedStream) -> None:
        self.position, self._recent, self._pending = saved.position, list(saved.recent), saved.pending
        self._resumed_logits_V = None if saved.logits is None else saved.logits.copy()
        self._generator = None if saved.generator is None else replace(saved.generator)

    def prompt_tokens(self, prompt: str | Sequence[int]) -> list[int]:
        """A prompt's tokens. Raises `UserError` when one is outside the vocabulary, or a fresh stream gets none."""
        is_fresh = not self._recent
        if isinstance(prompt, str):
            prompt = self._session.tokenizer.encode(prompt, start=is_fresh)
        tokens = check_tokens(prompt, self._session.config.vocab_size)
        if is_fresh and not tokens:
            raise UserError(_FRESH)
        return tokens

    @property
    def history(self) -> list[int]:
        """The last tokens, consumed or pending, oldest first."""
        return self._recent[-HISTORY_TOKENS:]

    # What follows is for `generate`.

    def _generate(self, tokens: Sequence[int], generation: Generation) -> Iterator[GeneratedToken]:
        if tokens:
            self.prefill(tokens)
        generation.begin(self.history)
        while True:
            start, is_step = time.perf_counter(), self.has_pending
            item = generation.push(self._choose(generation.sampling))
            if is_step:  # the first token comes from the prompt's logits
                self.stats.decode_tokens += 1
                self.stats.decode_seconds += time.perf_counter() - start
            yield item
            if item.finish is not None:
                return

    def _choose(self, sampling: SamplingParams) -> int:
        chosen = self._batch.choose({self: sampling})
        if self not in chosen:
            raise StateError("the stream is broken: its logits are not finite; start or resume another stream")
        return chosen[self]

    def _generator_for(self, sampling: SamplingParams) -> Generator:
        """The stream's own generator goes on, also over `save` and `fork`; another seed starts another one."""
        if sampling.temperature == 0.0:
            return Generator(seed=0)  # nothing is drawn from it
        if self._generator is None or sampling.seed not in (None, self._generator.seed):
            self._generator = Generator.from_system() if sampling.seed is None else Generator(sampling.seed)
        return self._generator

    def _note(self, tokens: Sequence[int]) -> None:
        self._recent += tokens
        if len(self._recent) > 2 * HISTORY_TOKENS:  # not at every token
            del self._recent[:-HISTORY_TOKENS]


def check_tokens(tokens: Sequence[int], vocab_size: int) -> list[int]:
    """Tokens as plain integers, also those of a GPU array. Raises `UserError` when one is none, or is outside the
    vocabulary."""
    if is_device_array(tokens):
        from megalodon_deploy.runtime.cuda.driver import copy_to_host

        tokens = download(tokens, copy_to_host).tolist()
    array = np.asarray(list(tokens) if isinstance(tokens, bytes) else tokens)
    if array.size and (array.ndim != 1 or not np.issubdtype(array.dtype, np.integer)):
        raise UserError(f"tokens = {tokens!r:.60} is not a list of integers")
    outside = array[(array < 0) | (array >= vocab_size)]
    if outside.size:
        raise UserError(f"token {outside[0]} is outside the model's vocabulary of {vocab_size}")
    return [int(token) for token in array]
