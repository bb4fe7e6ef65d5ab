"""What a bundle holds: the numbers behind `megalodon-deploy inspect`."""

from __future__ import annotations

import json
from typing import Any

from megalodon_deploy.bundle import ENGINE_FILE, ENGINE_INFO_FILE, WEIGHTS_FILE, Bundle
from megalodon_deploy.parameters import num_parameters
from megalodon_deploy.state import state_bytes

ACTIVATION_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}


def inspect_bundle(bundle: Bundle) -> dict[str, Any]:
    """Everything worth knowing before deploying: sizes in bytes, state of one stream, engines, where it came from."""
    manifest, config = bundle.manifest, bundle.config
    activation_bytes = ACTIVATION_BYTES[manifest.precision]
    return {
        "name": manifest.name,
        "path": str(bundle.path),
        "fingerprint": manifest.fingerprint,
        "precision": manifest.precision,
        "logits": manifest.logits,
        "tokenizer": manifest.tokenizer.kind,
        "config": config.to_dict(),
        "num_parameters": num_parameters(config),
        "weights_bytes": manifest.files[WEIGHTS_FILE].size_bytes,
        "state_bytes_per_stream": {
            "full_chunk": state_bytes(config, activation_bytes=activation_bytes),
            "without_key_value_rows": state_bytes(config, activation_bytes=activation_bytes, capacity=0),
        },
        "files": {path: entry.size_bytes for path, entry in manifest.files.items()},
        "engines": [_engine(directory) for directory in bundle.engine_dirs()],
        "source": dict(manifest.source),
        "tools": dict(manifest.tools),
    }


def _engine(directory: Any) -> dict[str, Any]:
    info = json.loads((directory / ENGINE_INFO_FILE).read_text(encoding="utf-8"))
    return {"id": directory.name, "size_bytes": (directory / ENGINE_FILE).stat().st_size, "info": info}
