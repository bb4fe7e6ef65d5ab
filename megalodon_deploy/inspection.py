"""What a bundle holds: the numbers behind `megalodon-deploy inspect`."""

from __future__ import annotations

import json
from typing import Any

from megalodon_deploy.bundle import WEIGHTS_FILE, Bundle
from megalodon_deploy.console import format_bytes
from megalodon_deploy.engine.info import list_engines
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
        "kv_dtype": manifest.precision if config.kv_dtype == "activation" else config.kv_dtype,
        "quality": manifest.quality.describe() if manifest.quality else None,
        "quantization": manifest.quantization.describe() if manifest.quantization else None,
        "logits": manifest.logits,
        "attention": manifest.attention,
        "tokenizer": manifest.tokenizer.kind,
        "config": config.to_dict(),
        "num_parameters": num_parameters(config),
        "weights_bytes": manifest.files[WEIGHTS_FILE].size_bytes,
        "state_bytes_per_stream": {
            "full_chunk": state_bytes(config, activation_bytes=activation_bytes),
            "without_key_value_rows": state_bytes(config, activation_bytes=activation_bytes, capacity=0),
        },
        "files": {path: entry.size_bytes for path, entry in manifest.files.items()},
        "engines": [json.loads(info.to_json()) for info in list_engines(bundle)],
        "source": dict(manifest.source),
        "tools": dict(manifest.tools),
    }


def inspection_rows(report: dict[str, Any]) -> list[tuple[str, str]]:
    """The report for people: (what, value)."""
    config, state = report["config"], report["state_bytes_per_stream"]
    dims = f"{config['num_layers']} layers, D {config['model_dim']}, {config['num_heads']} heads"
    return [
        ("model", f"{report['name']}: {dims}, chunk {config['chunk_size']}, vocabulary {config['vocab_size']:,}"),
        ("parameters", f"{report['num_parameters']:,}"),
        ("weights", f"{format_bytes(report['weights_bytes'])}, {report['precision']}"),
        *([("", report["quantization"])] if report["quantization"] else []),
        ("state per stream", f"{format_bytes(state['full_chunk'])} with a full chunk of keys and values"),
        ("", f"{format_bytes(state['without_key_value_rows'])} without; keys and values are {report['kv_dtype']}"),
        *([("quality", report["quality"])] if report["quality"] else []),
        ("tokenizer", report["tokenizer"]),
        ("logits", f"{report['logits']} position" + ("s" if report["logits"] == "all" else "")),
        ("attention in engines", report["attention"]),
        *[
            ("engine", f"{engine['id']}: {format_bytes(engine['engine']['size_bytes'])}")
            for engine in report["engines"]
        ],
        ("source", ", ".join(f"{key} {value[:60]}" for key, value in report["source"].items())),
        ("written by", ", ".join(f"{tool} {version}" for tool, version in report["tools"].items())),
        ("fingerprint", report["fingerprint"][:16]),
    ]
