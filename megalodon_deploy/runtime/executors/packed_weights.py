"""Matrices in the order that this processor multiplies them, in a file of the user's cache.

ONNX Runtime rearranges matrices in memory when it opens a model: every process does the work anew and has a copy of its
own. Written to a file once, they are mapped: opening rearranges nothing, and all processes share the memory.
"""

from __future__ import annotations

import hashlib
import json
import platform
from pathlib import Path
from typing import TYPE_CHECKING

from megalodon_deploy.bundle import WEIGHTS_FILE
from megalodon_deploy.console import format_bytes
from megalodon_deploy.errors import EngineError
from megalodon_deploy.files import sha256_file
from megalodon_deploy.runtime.executors.packed_cache import packed_root

if TYPE_CHECKING:
    from megalodon_deploy.bundle import Bundle

_CPUINFO = Path("/proc/cpuinfo")
_INLINE_BYTES = 1024
# ONNX Runtime 1.31 aligns only larger tensors in the file, and misreads packed matrices that are not aligned, or dies.
_ALIGNED_BYTES = 1 << 20
_WEIGHT_BYTES = {"int4": 0.5, "int8": 1, "fp8": 1, "fp32": 4, "fp16": 2}


def packed_folder(bundle: Bundle, version: str, operators: Path | None) -> Path:
    """Where packed weights go, by all that their order and the nodes around them depend on.

    `version` is ONNX Runtime's, `operators` its library of compiled operators.
    """
    parts = {
        "bundle": bundle.manifest.fingerprint,
        "onnxruntime": version,
        "operators": None if operators is None else sha256_file(operators),
        "processor": _processor(),
    }
    key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]
    return packed_root() / key


def packing_entries() -> dict[str, str]:
    """Entries of session options that make ONNX Runtime write packed weights beside the optimised model."""
    return {
        "session.optimized_model_external_initializers_file_name": WEIGHTS_FILE,
        "session.optimized_model_external_initializers_min_size_in_bytes": str(_INLINE_BYTES),
        "session.save_external_prepacked_constant_initializers": "1",
    }


def check_sizes(bundle: Bundle) -> None:
    """Raises `EngineError` for a model with a matrix that is too small to be read from a file."""
    smallest = min(_matrix_bytes(bundle))
    if smallest < _ALIGNED_BYTES:
        raise EngineError(
            f"{bundle.path}: share_weights is for models whose matrices all take {format_bytes(_ALIGNED_BYTES)} or "
            f"more, one here takes {format_bytes(smallest)}; leave it out"
        )


def _matrix_bytes(bundle: Bundle) -> list[int]:
    """Of every kind of matrix in the graph."""
    config, manifest = bundle.config, bundle.manifest
    dim, inner, hidden = config.model_dim, config.value_dim, config.ffn_hidden_dim
    quantization = manifest.quantization
    kind = quantization.weights.kind if quantization else manifest.precision
    output = quantization.output.kind if quantization and quantization.output else manifest.precision
    layers = [dim * inner, dim * (config.z_dim + inner + dim), dim * hidden * (1 + config.swiglu), hidden * dim]
    return [int(count * _WEIGHT_BYTES[kind]) for count in layers] + [
        int(dim * config.vocab_size * _WEIGHT_BYTES[output])
    ]


def _processor(cpuinfo: Path = _CPUINFO) -> list[str]:
    """The architecture and the instructions that the processor has."""
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    features = next((line for line in lines if line.split(":")[0].strip() in ("flags", "Features")), "")
    return [platform.machine(), platform.processor(), *sorted(features.split())]
