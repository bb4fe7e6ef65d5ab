"""The C interface of libmegalodon_runtime through ctypes: what a language without our bindings would write."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megalodon_deploy.runtime.sampling import SamplingParams
from megalodon_deploy.runtime.stream import GeneratedToken

FINISH = (None, "length", "stop_token", "stop_string", "callback")
_CALLBACK = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_int64, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p
)
_LOGGER = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)


class SessionOptions(ctypes.Structure):
    _fields_ = (
        ("backend", ctypes.c_char_p),
        ("threads", ctypes.c_int32),
        ("device", ctypes.c_int32),
        ("library", ctypes.c_char_p),
        ("plugin_library", ctypes.c_char_p),
        ("operators_library", ctypes.c_char_p),
    )


class Sampling(ctypes.Structure):
    _fields_ = (
        ("temperature", ctypes.c_double),
        ("top_k", ctypes.c_uint64),
        ("top_p", ctypes.c_double),
        ("min_p", ctypes.c_double),
        ("repetition_penalty", ctypes.c_double),
        ("repetition_window", ctypes.c_int32),
        ("has_seed", ctypes.c_int32),
        ("seed", ctypes.c_uint64),
    )


class GenerateOptions(ctypes.Structure):
    _fields_ = (
        ("max_new_tokens", ctypes.c_int64),
        ("sampling", Sampling),
        ("has_stop_tokens", ctypes.c_int32),
        ("stop_tokens", ctypes.POINTER(ctypes.c_int64)),
        ("num_stop_tokens", ctypes.c_size_t),
        ("stop_strings", ctypes.POINTER(ctypes.c_char_p)),
        ("num_stop_strings", ctypes.c_size_t),
    )


class Feed(ctypes.Structure):
    _fields_ = (
        ("stream", ctypes.c_void_p),
        ("tokens", ctypes.POINTER(ctypes.c_int64)),
        ("num_tokens", ctypes.c_size_t),
    )


class Sample(ctypes.Structure):
    _fields_ = (("stream", ctypes.c_void_p), ("sampling", Sampling))


class CError(Exception):
    """A status other than 0, with its sentence."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class CLibrary:
    """The functions of megalodon_runtime.h."""

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))
        self._library.mgr_last_error.restype = ctypes.c_char_p
        self._library.mgr_session_vocab_size.restype = ctypes.c_int64
        for name in ("mgr_session_close", "mgr_batch_close", "mgr_stream_close", "mgr_session_vocab_size"):
            getattr(self._library, name).argtypes = [ctypes.c_void_p]

    def call(self, name: str, *arguments: Any) -> None:
        """Raises `CError` with what mgr_last_error says."""
        status = getattr(self._library, name)(*arguments)
        if status:
            raise CError(status, self._library.mgr_last_error().decode())

    def get(self, name: str, *arguments: Any) -> Any:
        return getattr(self._library, name)(*arguments)

    def log_to(self, messages: list[tuple[int, str]]) -> Any:
        """Collects log messages while the returned object is kept."""
        logger = _LOGGER(lambda level, text, user: messages.append((level, text.decode())))
        self._library.mgr_set_logger(logger, None)
        return logger

    def session(self, bundle: Path, library: Path | None = None, **options: Any) -> CSession:
        filled = SessionOptions(library=None if library is None else str(library).encode(), **options)
        handle = ctypes.c_void_p()
        self.call("mgr_session_open", str(bundle).encode(), ctypes.byref(filled), ctypes.byref(handle))
        return CSession(self, handle)


class CSession:
    def __init__(self, library: CLibrary, handle: ctypes.c_void_p) -> None:
        self.library, self.handle = library, handle
        self.vocab_size = library.get("mgr_session_vocab_size", handle)

    def stream(self, resume: Path | None = None) -> CStream:
        handle = ctypes.c_void_p()
        path = None if resume is None else str(resume).encode()
        self.library.call("mgr_stream_open", self.handle, path, ctypes.byref(handle))
        return CStream(self, handle)

    def batch(self, num_slots: int) -> CBatch:
        handle = ctypes.c_void_p()
        self.library.call("mgr_batch_open", self.handle, ctypes.c_int64(num_slots), ctypes.byref(handle))
        return CBatch(self, handle)

    def __del__(self) -> None:
        self.library.get("mgr_session_close", self.handle)


class CBatch:
    def __init__(self, session: CSession, handle: ctypes.c_void_p) -> None:
        self._session, self._library, self._handle = session, session.library, handle

    def __del__(self) -> None:
        self._library.get("mgr_batch_close", self._handle)

    @property
    def num_free(self) -> int:
        value = ctypes.c_int64()
        self._library.call("mgr_batch_num_free", self._handle, ctypes.byref(value))
        return value.value

    def admit(self, resume: Path | None = None) -> CStream:
        handle = ctypes.c_void_p()
        path = None if resume is None else str(resume).encode()
        self._library.call("mgr_batch_admit", self._handle, path, ctypes.byref(handle))
        return CStream(self._session, handle)

    def feed(self, tokens: Mapping[CStream, Sequence[int]]) -> None:
        feeds = [
            Feed(stream.handle, (ctypes.c_int64 * len(given))(*given), len(given)) for stream, given in tokens.items()
        ]
        table = (Feed * len(feeds))(*feeds)
        self._library.call("mgr_batch_feed", self._handle, table, ctypes.c_size_t(len(feeds)))

    def sample(self, params: Mapping[CStream, SamplingParams]) -> list[int]:
        samples = [Sample(stream.handle, _sampling(given)) for stream, given in params.items()]
        table, tokens = (Sample * len(samples))(*samples), (ctypes.c_int64 * len(samples))()
        self._library.call("mgr_batch_sample", self._handle, table, ctypes.c_size_t(len(samples)), tokens)
        return list(tokens)


class CStream:
    def __init__(self, session: CSession, handle: ctypes.c_void_p) -> None:
        self._session, self._library, self.handle = session, session.library, handle

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        self._library.get("mgr_stream_close", self.handle)
        self.handle = ctypes.c_void_p()

    @property
    def position(self) -> int:
        value = ctypes.c_int64()
        self._library.call("mgr_stream_position", self.handle, ctypes.byref(value))
        return value.value

    def prefill(self, tokens: Sequence[int]) -> np.ndarray:
        logits = np.empty(self._session.vocab_size, np.float32)
        given = (ctypes.c_int64 * len(tokens))(*tokens)
        pointer = logits.ctypes.data_as(ctypes.c_void_p)
        self._library.call("mgr_stream_feed", self.handle, given, ctypes.c_size_t(len(tokens)), pointer)
        return logits

    @property
    def logits(self) -> np.ndarray:
        logits = np.empty(self._session.vocab_size, np.float32)
        self._library.call("mgr_stream_logits", self.handle, logits.ctypes.data_as(ctypes.c_void_p))
        return logits

    def sample(self, params: SamplingParams | None = None) -> int:
        token = ctypes.c_int64()
        given = None if params is None else ctypes.byref(_sampling(params))
        self._library.call("mgr_stream_sample", self.handle, given, ctypes.byref(token))
        return token.value

    def save(self, path: Path) -> None:
        self._library.call("mgr_stream_save", self.handle, str(path).encode())

    def fork(self) -> CStream:
        handle = ctypes.c_void_p()
        self._library.call("mgr_stream_fork", self.handle, ctypes.byref(handle))
        return CStream(self._session, handle)

    def generate(
        self,
        prompt: str | Sequence[int] = (),
        *,
        max_new_tokens: int | None = 256,
        sampling: SamplingParams | None = None,
        stop_tokens: Sequence[int] | None = None,
        stop_strings: Sequence[str] = (),
        goes_on: Callable[[int], bool] = lambda token: True,
    ) -> list[GeneratedToken]:
        """As `Stream.generate`, all at once; `goes_on` may end it."""
        items: list[GeneratedToken] = []

        def take(token: int, text: int, text_bytes: int, finish: int, user: Any) -> int:
            decoded = ctypes.string_at(text, text_bytes).decode()
            items.append(GeneratedToken(token, decoded, FINISH[finish]))  # type: ignore[arg-type]
            return goes_on(token)

        options = _options(max_new_tokens, sampling or SamplingParams.greedy(), stop_tokens, stop_strings)
        callback, finish = _CALLBACK(take), ctypes.c_int()
        rest = (ctypes.byref(options), callback, None, ctypes.byref(finish))
        if isinstance(prompt, str):
            self._library.call("mgr_stream_generate_text", self.handle, prompt.encode(), *rest)
        else:
            given = (ctypes.c_int64 * len(prompt))(*prompt)
            self._library.call("mgr_stream_generate", self.handle, given, ctypes.c_size_t(len(prompt)), *rest)
        assert FINISH[finish.value] == (items[-1].finish or "callback")
        return items


def _sampling(params: SamplingParams) -> Sampling:
    return Sampling(
        temperature=params.temperature,
        top_k=params.top_k or 0,
        top_p=params.top_p,
        min_p=params.min_p,
        repetition_penalty=params.repetition_penalty,
        repetition_window=params.repetition_window,
        has_seed=params.seed is not None,
        seed=params.seed or 0,
    )


def _options(
    max_new_tokens: int | None,
    sampling: SamplingParams,
    stop_tokens: Sequence[int] | None,
    stop_strings: Sequence[str],
) -> GenerateOptions:
    stops = [] if stop_tokens is None else list(stop_tokens)
    return GenerateOptions(
        max_new_tokens=max_new_tokens or 0,
        sampling=_sampling(sampling),
        has_stop_tokens=stop_tokens is not None,
        stop_tokens=(ctypes.c_int64 * len(stops))(*stops),
        num_stop_tokens=len(stops),
        stop_strings=(ctypes.c_char_p * len(stop_strings))(*[text.encode() for text in stop_strings]),
        num_stop_strings=len(stop_strings),
    )
