"""Key and value rows from one type to another, when a saved stream resumes in another export of its model.

The arithmetic of quantised rows is that of the graphs: a row's scale is its largest magnitude over the largest code,
and codes are rounded to nearest, halves to even. Letters as in `megalodon_deploy.state`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from megalodon_deploy.config import KeyValueType, MegalodonConfig
from megalodon_deploy.state import QUANTIZED_ROW_MAX, SMALLEST_ROW_SCALE, StateSpec, state_specs

Arrays = dict[str, np.ndarray]
_KINDS: dict[str, KeyValueType] = {"int8": "int8", "float8_e4m3fn": "fp8"}


def type_of_rows(tensors: Mapping[str, np.ndarray]) -> KeyValueType:
    """The type in which a stream's tensors, by `past_*` name, hold keys and values."""
    first = tensors.get("past_key.0")
    return "activation" if first is None else _KINDS.get(first.dtype.name, "activation")


def convert_rows(tensors: Mapping[str, np.ndarray], config: MegalodonConfig, activation: np.dtype) -> Arrays:
    """All tensors, with keys and values as `config` and `activation` want them; numbers too large become infinite."""
    kept, wanted = type_of_rows(tensors), config.kv_dtype
    converted = {spec.past: tensors[spec.past] for spec in state_specs(config) if spec.past in tensors}
    if kept == wanted != "activation":
        return converted
    for spec in state_specs(replace(config, kv_dtype="activation")):
        if not spec.is_rows:
            continue
        rows = tensors[spec.past]
        if kept != "activation":
            rows = rows.astype(np.float32) * tensors[_scale_name(spec)][..., None]
        if wanted == "activation":
            with np.errstate(over="ignore"):
                converted[spec.past] = rows.astype(activation)
        else:
            converted[spec.past], converted[_scale_name(spec)] = _quantized(rows.astype(np.float32), wanted)
    return converted


def _quantized(rows: np.ndarray, kind: KeyValueType) -> tuple[np.ndarray, np.ndarray]:
    """Codes [..., w] and scales [...] of float32 rows [..., w]."""
    largest = np.float32(QUANTIZED_ROW_MAX[kind])
    scale = np.maximum(np.abs(rows).max(-1, initial=0.0) / largest, np.float32(SMALLEST_ROW_SCALE))
    scaled = np.clip(rows / scale[..., None], -largest, largest)
    if kind == "int8":
        return np.rint(scaled).astype(np.int8), scale
    import ml_dtypes

    return scaled.astype(ml_dtypes.float8_e4m3fn), scale


def _scale_name(spec: StateSpec) -> str:
    return spec.past.replace(spec.kind, f"{spec.kind}_scale", 1)
