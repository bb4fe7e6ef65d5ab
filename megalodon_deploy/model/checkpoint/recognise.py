"""Which layout a path holds, told from what is in it and not from what it is called."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from megalodon_deploy.errors import CheckpointError
from megalodon_deploy.model.checkpoint import huggingface, jax, native, released
from megalodon_deploy.model.checkpoint.document import CONFIG_FILE, read_json_if_present
from megalodon_deploy.model.checkpoint.shards import WEIGHTS_GLOB
from megalodon_deploy.model.checkpoint.tensor_file import TensorFile, is_safetensors, open_tensor_file
from megalodon_deploy.model.checkpoint.types import Checkpoint

LATEST_OF_RUN = "latest"  # a training run's folder links to its checkpoints
_KNOWN = "megalodon-deploy's own, the released one, megalodon-jax, megalodon-hf"


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Open a checkpoint of any supported layout: a directory, or one weight file; of a training run the latest one.

    Names, shapes and types of all tensors are checked here; values are read by `Checkpoint.tensor`. Raises
    `CheckpointError` in one line naming the file, the tensor, and what was expected and found.
    """
    root = Path(path)
    if not root.exists():
        raise CheckpointError(f"{root} does not exist; expected a checkpoint directory or a weight file")
    if (root / LATEST_OF_RUN).is_dir() and not (root / CONFIG_FILE).exists():
        root = root / LATEST_OF_RUN
    if root.is_dir() and not any(root.iterdir()):
        raise CheckpointError(f"{root} is an empty directory; expected a checkpoint")
    reader = _recognise(root)
    if reader is None:
        raise _unknown(root)
    return reader(root)


def _unknown(root: Path) -> CheckpointError:
    if root.is_file():
        open_tensor_file(root)  # raises when it holds no weights at all
        if not (root.parent / CONFIG_FILE).is_file():
            return CheckpointError(f"{root}: no {CONFIG_FILE} beside it; the weights alone do not tell the model")
    return CheckpointError(f"{root} is not a checkpoint of a known layout; there are: {_KNOWN}")


def _recognise(root: Path) -> Callable[[Path], Checkpoint] | None:
    directory = root if root.is_dir() else root.parent
    if (file := _jax_file(root)) is not None:
        return partial(jax.read_jax, file=file)
    document = read_json_if_present(directory / CONFIG_FILE) or {}
    if document.get("format") == native.FORMAT:
        return native.read_native
    if document.get("model_type") == huggingface.MODEL_TYPE:
        return huggingface.read_huggingface
    if "model" in document or any(directory.glob(WEIGHTS_GLOB)):
        return released.read_released
    return None


def _jax_file(root: Path) -> TensorFile | None:
    """The one safetensors file that `root` is or holds, when its metadata says megalodon-jax."""
    candidates = [root] if root.is_file() else sorted(root.glob("*.safetensors"))
    if len(candidates) != 1 or not is_safetensors(candidates[0]):
        return None
    file = open_tensor_file(candidates[0])
    return file if file.metadata.get("format", "").startswith(jax.FORMAT) else None
