"""The kernels of libmegalodon that the runtime calls itself, through its C interface (megalodon/megalodon.h)."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megalodon_deploy.errors import EngineError

_I64, _POINTER, _SIZE = ctypes.c_int64, ctypes.c_void_p, ctypes.c_size_t
CHOICE_DTYPE = np.dtype(  # struct mgd_choice
    [(name, np.float64) for name in ("temperature", "top_p", "min_p", "repetition_penalty", "uniform")]
    + [(name, np.int64) for name in ("top_k", "num_recent", "is_wanted")]
)


@dataclass(frozen=True)
class Append:
    """New rows [B, heads, T] of `row_bytes` each, and the memory [B, heads, S] they go to; device addresses."""

    rows: int
    memory: int
    heads: int
    row_bytes: int


@dataclass(frozen=True)
class ChoiceCall:
    """A choice of one token for each row; all but the numbers are device addresses."""

    logits: int  # [batch, vocab_size] float32
    choices: int  # [batch] of `CHOICE_DTYPE`
    recent: int  # [batch, max_recent] int64, tokens that penalties apply to
    tokens: int  # [batch] int64, output: -1 for logits that are not finite
    workspace: int
    workspace_bytes: int
    batch: int
    vocab_size: int
    max_recent: int


class _Append(ctypes.Structure):  # struct mgd_append
    _fields_ = [("rows", _POINTER), ("memory", _POINTER), ("heads", _I64), ("row_bytes", _I64)]


class Kernels:
    """Raises `EngineError` when the library at `path` cannot be loaded or lacks a function."""

    def __init__(self, path: Path) -> None:
        try:
            library = ctypes.CDLL(str(path))
            self._append_rows = library.mgd_append_rows
            self._choose_tokens = library.mgd_choose_tokens
            self._workspace_bytes = library.mgd_choose_tokens_workspace_bytes
            self._status_string = library.mgd_status_string
        except (OSError, AttributeError) as error:
            raise EngineError(f"{path} is no libmegalodon of this release ({error}); build it again") from error
        self._append_rows.argtypes = [ctypes.POINTER(_Append), *[_I64] * 5, _POINTER, _POINTER]
        self._choose_tokens.argtypes = [_I64, _I64, *[_POINTER] * 3, _I64, _POINTER, _POINTER, _SIZE, _POINTER]
        self._workspace_bytes.argtypes, self._workspace_bytes.restype = [_I64, _I64], _SIZE
        self._status_string.restype = ctypes.c_char_p

    def append_rows(
        self,
        appends: Sequence[Append],
        *,
        batch: int,
        num_tokens: int,
        capacity: int,
        chunk_size: int,
        position: int,
        stream: int,
    ) -> None:
        """Enqueue writing each new row t to row (position mod C) + t of its memory, which has `capacity` rows.

        `position`: device address of int64 [B], read when the work is done.
        """
        table = (_Append * len(appends))(*[_Append(a.rows, a.memory, a.heads, a.row_bytes) for a in appends])
        self._check(self._append_rows(table, len(appends), batch, num_tokens, capacity, chunk_size, position, stream))

    def choose_tokens_workspace_bytes(self, batch: int, vocab_size: int) -> int:
        return int(self._workspace_bytes(batch, vocab_size))

    def choose_tokens(self, call: ChoiceCall, stream: int) -> None:
        """Enqueue choosing a token for each row."""
        sizes, work = (call.batch, call.vocab_size), (call.workspace, call.workspace_bytes)
        inputs = (call.logits, call.choices, call.recent, call.max_recent)
        self._check(self._choose_tokens(*sizes, *inputs, call.tokens, *work, stream))

    def _check(self, status: int) -> None:
        if status:
            text = self._status_string(status).decode(errors="replace")
            raise EngineError(f"libmegalodon: {text}; build it again for this GPU")
