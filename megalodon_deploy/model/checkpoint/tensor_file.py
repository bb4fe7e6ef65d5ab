"""Weight files, memory-mapped: names, shapes and types are known at once, values are read when asked for.

Two formats, told apart by their first bytes: safetensors, and what `torch.save` writes (read with `weights_only=True`
alone, so that no code in a pickle ever runs).
"""

from __future__ import annotations

import pickle
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from megalodon_deploy.errors import CheckpointError

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_SAFETENSORS_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16} | {
    "I64": torch.int64,
    "I32": torch.int32,
}
_ZIP_MAGIC = b"PK\x03\x04"
_PICKLE_MAGIC = b"\x80"
_SAFETENSORS_HEADER_START = 8  # bytes: the header's length comes first
_COPY_BELOW_BYTES = 1 << 20  # norms and the like: a view of one would keep a whole mapping, with its pages, alive
_MIN_REMAP_BYTES = 16 << 20
_REMAPS_PER_FILE = 16  # each reads the file's table of contents again: tens of milliseconds for the largest


@dataclass(frozen=True)
class TensorEntry:
    """What a weight file says about one tensor without reading it."""

    path: Path
    shape: tuple[int, ...]
    dtype: torch.dtype


class TensorFile(ABC):
    """One opened weight file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: dict[str, TensorEntry] = {}
        self.metadata: Mapping[str, str] = {}
        self._copied_bytes = 0

    def read(self, name: str) -> torch.Tensor:
        """The stored tensor, contiguous: a view of the mapping, or a copy when it is small."""
        tensor = self._view(name)
        return tensor.clone() if tensor.nbytes < _COPY_BELOW_BYTES else tensor

    @abstractmethod
    def _view(self, name: str) -> torch.Tensor: ...

    @abstractmethod
    def _remap(self) -> None:
        """Map the file afresh; the old mapping, with the pages it made resident, goes with its last view."""

    def copied(self, size_bytes: int) -> None:
        """Tell that so many bytes were copied out and their views dropped.

        Pages of a mapping count as resident memory until it is closed, so a reader that copies (joins shards,
        converts types) would seem to hold the file beside its copy.
        """
        self._copied_bytes += size_bytes
        if self._copied_bytes >= max(_MIN_REMAP_BYTES, self.path.stat().st_size // _REMAPS_PER_FILE):
            self._copied_bytes = 0
            self._remap()


class _SafetensorsFile(TensorFile):
    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._remap()
        self.metadata = self._file.metadata() or {}
        for name in self._file.keys():  # noqa: SIM118 -- safe_open is not a mapping
            view = self._file.get_slice(name)
            dtype = _SAFETENSORS_DTYPES.get(view.get_dtype())
            if dtype is None:
                raise CheckpointError(f"{path}: tensor {name} has type {view.get_dtype()}; weights are floating point")
            self.entries[name] = TensorEntry(path, tuple(view.get_shape()), dtype)

    def _remap(self) -> None:
        try:
            self._file: Any = safe_open(self.path, framework="pt")
        except SafetensorError as error:
            raise CheckpointError(
                f"{self.path}: damaged or truncated safetensors file ({_one_line(error)}); copy it again"
            ) from error

    def _view(self, name: str) -> torch.Tensor:
        tensor: torch.Tensor = self._file.get_tensor(name)
        return tensor


class _TorchFile(TensorFile):
    def __init__(self, path: Path, *, is_zip: bool) -> None:
        super().__init__(path)
        self._is_zip = is_zip
        self._tensors = self._load()
        self.entries = {
            name: TensorEntry(path, tuple(value.shape), value.dtype) for name, value in self._tensors.items()
        }

    def _remap(self) -> None:
        if self._is_zip:  # the older format cannot be mapped: it is in memory once and stays there
            self._tensors = self._load()

    def _load(self) -> dict[str, torch.Tensor]:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about pickle protocols; what cannot be read raises
                values = torch.load(self.path, map_location="cpu", weights_only=True, mmap=self._is_zip)
        except pickle.UnpicklingError as error:
            raise CheckpointError(
                f"{self.path}: holds more than tensors (its pickle asks for code, which is never run) or is damaged; "
                "save a flat dictionary of tensors"
            ) from error
        except MemoryError:
            raise
        except Exception as error:  # whatever a parser meets in foreign bytes
            raise CheckpointError(
                f"{self.path}: damaged or truncated PyTorch file ({_one_line(error)}); copy it again"
            ) from error
        return self._flat(values)

    def _flat(self, values: Any) -> dict[str, torch.Tensor]:
        if not isinstance(values, dict):
            raise CheckpointError(f"{self.path}: holds a {type(values).__name__}, expected a dictionary of tensors")
        for name, value in values.items():
            if not isinstance(name, str) or not isinstance(value, torch.Tensor) or value.layout != torch.strided:
                raise CheckpointError(
                    f"{self.path}: entry {name!r} is a {type(value).__name__}, expected a flat dictionary of tensors"
                )
        return dict(values)

    def _view(self, name: str) -> torch.Tensor:
        return self._tensors[name].detach().contiguous()


def is_safetensors(path: Path) -> bool:
    """Whether the first bytes are a safetensors header's; the rest may still be damaged."""
    return _head(path)[_SAFETENSORS_HEADER_START:] == b"{"


def open_tensor_file(path: Path) -> TensorFile:
    """Map a weight file; its first bytes tell the format. Raises `CheckpointError` when it is damaged or neither."""
    head = _head(path)
    if head.startswith(_ZIP_MAGIC):
        return _TorchFile(path, is_zip=True)
    if head[_SAFETENSORS_HEADER_START:] == b"{":
        return _SafetensorsFile(path)
    if head.startswith(_PICKLE_MAGIC):
        return _TorchFile(path, is_zip=False)
    raise CheckpointError(f"{path}: neither a safetensors nor a PyTorch file; its first bytes are {head!r}")


def _head(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(_SAFETENSORS_HEADER_START + 1)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error


def _one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:160] if lines else type(error).__name__
