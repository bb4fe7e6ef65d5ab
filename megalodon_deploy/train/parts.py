"""Checkpoints in parts, by torch.distributed.checkpoint: every rank writes what it holds, and reads what it will hold.

The files are safetensors: PyTorch's own format describes them by a pickle. `model.checkpoint.parts` reads them too.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor
from torch import distributed as dist

from megalodon_deploy.errors import TrainError

if TYPE_CHECKING:
    from torch.distributed.checkpoint.api import CheckpointException


def staged(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU, in parts as the tensors are, that later steps do not change."""
    from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

    stager = DefaultStager(StagingOptions(*[False] * 4))  # no pinned memory, no threads of its own
    copies = stager.stage(dict(tensors))
    assert isinstance(copies, dict), "Bug: staged without a thread, so at once"
    return copies


def save_parts(folder: Path, tensors: Mapping[str, Tensor], group: dist.ProcessGroup) -> None:
    """Write this rank's parts as one file of `folder`; all ranks of a group on CPUs call it, and then all is written.

    What several ranks hold is written by one of them. Raises `TrainError` on all ranks when one cannot write.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    try:
        writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
        save(dict(tensors), storage_writer=writer, process_group=group)
    except CheckpointException as error:  # which is no Exception
        raise TrainError(f"{folder}: the checkpoint cannot be written ({_first_line(error)})") from error


def load_parts(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Fill tensors, in parts or not, from the files of a folder, which hold them in parts or not; nothing is sent.

    Raises `ValueError` when the files do not have them.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that no other rank takes part
        try:
            load(dict(tensors), storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
        except CheckpointException as error:
            raise ValueError(_first_line(error)) from error


def _first_line(error: CheckpointException) -> str:
    failure, _ = next(iter(error.failures.values()))
    return (str(failure).strip() or type(failure).__name__).splitlines()[0]
