"""Tensors in parts: safetensors files that each hold a block of every tensor, as torch.distributed.checkpoint writes
them (`HuggingFaceStorageWriter`). The metadata of a file says where its blocks begin.

Parts may be cut anyhow, along any axis; together they must be each tensor once.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megalodon_deploy.errors import CheckpointError
from megalodon_deploy.model.checkpoint.tensor_file import TensorFile, open_tensor_file
from megalodon_deploy.model.checkpoint.types import LazyTensor
from megalodon_deploy.model.checkpoint.validate import Shape, read_checked

_PLACES, _OFFSETS = "DCP_SHARDING_INFO", "saved_offsets"


@dataclass(frozen=True)
class _Part:
    file: TensorFile
    begin: Shape  # of the block in the whole tensor
    shape: Shape

    @property
    def index(self) -> tuple[slice, ...]:
        return tuple(slice(begin, begin + size) for begin, size in zip(self.begin, self.shape, strict=True))


def open_parts(paths: Sequence[Path], expected: Mapping[str, Shape]) -> tuple[list[TensorFile], dict[str, LazyTensor]]:
    """The files, and every expected tensor as one that is joined when it is read; the files may hold others.

    Raises `CheckpointError` in one line for a file that is absent or damaged, and for a tensor that the parts do not
    make up.
    """
    files, parts = [], {name: list[_Part]() for name in expected}
    for path in paths:
        file = open_tensor_file(path)
        places = _places(file)
        for name in file.entries.keys() & expected.keys():
            shape = file.entries[name].shape
            parts[name].append(_Part(file, _begin(path, places, name, shape, expected[name]), shape))
        files.append(file)
    return files, {name: _joined(name, shape, parts[name]) for name, shape in expected.items()}


def _places(file: TensorFile) -> dict[str, Any]:
    try:
        places = json.loads(file.metadata[_PLACES])
    except (KeyError, ValueError):
        places = None
    if not isinstance(places, dict):
        raise CheckpointError(
            f"{file.path}: does not say where its parts of tensors belong; write the checkpoint again"
        )
    return places


def _begin(path: Path, places: Mapping[str, Any], name: str, shape: Shape, whole: Shape) -> Shape:
    stated = places.get(name)
    begin = stated.get(_OFFSETS) if isinstance(stated, dict) else None
    if (
        not isinstance(begin, list)
        or len(begin) != len(whole)
        or len(shape) != len(whole)
        or not all(isinstance(at, int) and at >= 0 for at in begin)
        or any(at + size > end for at, size, end in zip(begin, shape, whole, strict=True))
    ):
        raise CheckpointError(
            f"{path}: tensor {name} has a part of shape {list(shape)} at {begin}, expected it within {list(whole)}"
        )
    return tuple(begin)


def _joined(name: str, shape: Shape, parts: Sequence[_Part]) -> LazyTensor:
    filled = [part for part in parts if math.prod(part.shape)]
    found = sum(math.prod(part.shape) for part in filled)
    where = parts[0].file.path.parent if parts else "no file"
    if not parts or found < math.prod(shape):
        raise CheckpointError(
            f"{where}: the parts of tensor {name} hold {found} of its {math.prod(shape)} values; a file is missing"
        )
    if found > math.prod(shape) or _overlap(filled):
        raise CheckpointError(f"{where}: parts of tensor {name} overlap; files of several checkpoints are mixed")
    dtypes = {part.file.entries[name].dtype for part in parts}
    if len(dtypes) > 1:
        raise CheckpointError(f"{where}: parts of tensor {name} have several types: {', '.join(map(str, dtypes))}")
    return LazyTensor(shape, dtypes.pop(), partial(_join, name, shape, filled))


def _overlap(parts: Sequence[_Part]) -> bool:
    begin = np.array([part.begin for part in parts])
    end = begin + np.array([part.shape for part in parts])
    shared = np.minimum(end[:, None], end) > np.maximum(begin[:, None], begin)
    return bool(np.triu(shared.all(-1), 1).any())


def _join(name: str, shape: Shape, parts: Sequence[_Part]) -> torch.Tensor:
    """A tensor of which one file holds all stays a view of it."""
    tensors = [read_checked(part.file, name) for part in parts]
    if len(parts) == 1:
        return tensors[0]
    whole = torch.empty(shape, dtype=tensors[0].dtype)
    for part, tensor in zip(parts, tensors, strict=True):
        whole[part.index] = tensor
        part.file.copied(tensor.nbytes)
    return whole
