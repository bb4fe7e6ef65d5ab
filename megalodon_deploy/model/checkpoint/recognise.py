"""Which layout a path holds, told from what is in it and not from what it is called."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from megalodon_deploy.errors import CheckpointError
from megalodon_deploy.model.checkpoint import native, released
from megalodon_deploy.model.checkpoint.document import CONFIG_FILE, read_json_if_present
from megalodon_deploy.model.checkpoint.types import Checkpoint

_KNOWN = "megalodon-deploy's own, the released one, megalodon-jax, megalodon-hf"


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Open a checkpoint of any supported layout: a directory, or one weight file.

    Names, shapes and types of all tensors are checked here; values are read by `Checkpoint.tensor`. Raises
    `CheckpointError` in one line naming the file, the tensor, and what was expected and found.
    """
    root = Path(path)
    if not root.exists():
        raise CheckpointError(f"{root} does not exist; expected a checkpoint directory or a weight file")
    if root.is_dir() and not any(root.iterdir()):
        raise CheckpointError(f"{root} is an empty directory; expected a checkpoint")
    reader = _recognise(root)
    if reader is None:
        raise CheckpointError(f"{root} is not a checkpoint of a known layout; there are: {_KNOWN}")
    return reader(root)


def _recognise(root: Path) -> Callable[[Path], Checkpoint] | None:
    directory = root if root.is_dir() else root.parent
    document = read_json_if_present(directory / CONFIG_FILE) or {}
    if document.get("format") == native.FORMAT:
        return native.read_native
    if "model" in document or any(directory.glob(released.WEIGHTS_GLOB)):
        return released.read_released
    return None
