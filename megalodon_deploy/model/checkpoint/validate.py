"""The checks that every layout shares: names, shapes, types, and values that are numbers."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

import torch

from megalodon_deploy.errors import CheckpointError
from megalodon_deploy.model.checkpoint.tensor_file import FLOAT_DTYPES, TensorEntry, TensorFile

Shape = tuple[int, ...]
PRIOR_COUNT = ".prior_count"  # the one tensor of integers


def check_tensors(
    where: Path, found: Mapping[str, TensorEntry], expected: Mapping[str, Shape], optional: Collection[str] = ()
) -> None:
    """Every expected tensor is there with its shape, and nothing else; `optional` ones may be absent.

    Raises `CheckpointError` naming the first offending tensor and its file, or `where` it is missing.
    """
    for name, shape in expected.items():
        if name in found:
            _check_entry(name, found[name], shape)
        elif name not in optional:
            raise CheckpointError(f"{where}: tensor {name} is missing; expected shape {list(shape)}")
    if extra := [name for name in found if name not in expected]:
        raise CheckpointError(
            f"{found[extra[0]].path}: unexpected tensor {extra[0]} of shape {list(found[extra[0]].shape)}; "
            "this configuration has no such weight"
        )


def _check_entry(name: str, entry: TensorEntry, shape: Shape) -> None:
    if entry.shape != shape:
        raise CheckpointError(f"{entry.path}: tensor {name} has shape {list(entry.shape)}, expected {list(shape)}")
    if entry.dtype not in FLOAT_DTYPES and not name.endswith(PRIOR_COUNT):
        raise CheckpointError(f"{entry.path}: tensor {name} has type {entry.dtype}, expected floating point")


def read_checked(file: TensorFile, name: str) -> torch.Tensor:
    """The stored tensor. Raises `CheckpointError` naming the file and the first position that is not a finite number.

    The usual case is decided by the two extremes, which NaN passes through: no temporary of the tensor's size.
    """
    tensor = file.read(name)
    if tensor.numel() == 0 or all(bool(torch.isfinite(extreme)) for extreme in torch.aminmax(tensor)):
        return tensor
    position = (~torch.isfinite(tensor)).nonzero()[0].tolist()
    value = tensor[tuple(position)].item()
    raise CheckpointError(f"{file.path}: tensor {name} holds {value} at {position}, expected finite numbers")
