"""From a Megalodon checkpoint to a verified, streaming engine.

Heavy imports (PyTorch, ONNX, ONNX Runtime) happen when a name that needs them is first used.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Read when ONNX Runtime is first imported: its official builds otherwise send reports of their use to Microsoft, and
# keep an identifier and a database for that in the home directory. Who wants them sets the variable to 0.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

if TYPE_CHECKING:
    from megalodon_deploy.bundle import Bundle, open_bundle
    from megalodon_deploy.config import PRESETS, MegalodonConfig
    from megalodon_deploy.model.checkpoint import load_checkpoint, save_checkpoint
    from megalodon_deploy.model.megalodon import Megalodon

_HOMES = {
    "Bundle": "megalodon_deploy.bundle",
    "open_bundle": "megalodon_deploy.bundle",
    "MegalodonConfig": "megalodon_deploy.config",
    "PRESETS": "megalodon_deploy.config",
    "Megalodon": "megalodon_deploy.model.megalodon",
    "load_checkpoint": "megalodon_deploy.model.checkpoint",
    "save_checkpoint": "megalodon_deploy.model.checkpoint",
}
__all__ = ["PRESETS", "Bundle", "Megalodon", "MegalodonConfig", "load_checkpoint", "open_bundle", "save_checkpoint"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value
