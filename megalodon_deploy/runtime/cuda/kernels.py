"""The kernels of libmegalodon that the runtime calls itself, through its C interface (megalodon/megalodon.h)."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megalodon_deploy.errors import EngineError

_I64, _POINTER = ctypes.c_int64, ctypes.c_void_p


@dataclass(frozen=True)
class Append:
    """New rows [B, heads, T] of `row_bytes` each, and the memory [B, heads, S] they go to; device addresses."""

    rows: int
    memory: int
    heads: int
    row_bytes: int


class _Append(ctypes.Structure):  # struct mgd_append
    _fields_ = [("rows", _POINTER), ("memory", _POINTER), ("heads", _I64), ("row_bytes", _I64)]


class Kernels:
    """Raises `EngineError` when the library at `path` cannot be loaded or lacks a function."""

    def __init__(self, path: Path) -> None:
        try:
            library = ctypes.CDLL(str(path))
            self._append_rows = library.mgd_append_rows
            self._status_string = library.mgd_status_string
        except (OSError, AttributeError) as error:
            raise EngineError(f"{path} is no libmegalodon of this release ({error}); build it again") from error
        self._append_rows.argtypes = [ctypes.POINTER(_Append), *[_I64] * 5, _POINTER, _POINTER]
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

    def _check(self, status: int) -> None:
        if status:
            text = self._status_string(status).decode(errors="replace")
            raise EngineError(f"libmegalodon: {text}; build it again for this GPU")
