"""How many bytes a token has to read."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from megalodon_deploy.bundle import WEIGHTS_FILE
from megalodon_deploy.config import MegalodonConfig
from megalodon_deploy.parameters import ParameterSpec, parameter_specs
from megalodon_deploy.state import state_bytes

if TYPE_CHECKING:
    from megalodon_deploy.bundle import Bundle, Precision

MATRIX_BYTES: dict[Precision, int] = {"fp32": 4, "fp16": 2, "bf16": 2}


def weight_bytes_of(bundle: Bundle) -> int:
    """Bytes of weights that a step of this bundle reads."""
    manifest, config = bundle.manifest, bundle.config
    if manifest.quantization is None:
        return weight_bytes_per_token(config, manifest.precision)
    # Codes and scales lie in the file as they are read, but for an embedding that is only looked up.
    scalar_bytes = MATRIX_BYTES[manifest.precision]
    is_quantized = manifest.quantization.embedding is not None
    row_bytes = config.model_dim + scalar_bytes if is_quantized else config.model_dim * scalar_bytes
    unread_rows = 0 if config.share_emb else config.vocab_size - 1
    return manifest.files[WEIGHTS_FILE].size_bytes - unread_rows * row_bytes


def weight_bytes_per_token(config: MegalodonConfig, precision: Precision) -> int:
    """Bytes of weights that a step reads: all of them, but one row of an embedding that is not the output too."""

    def size(spec: ParameterSpec) -> int:
        is_matrix = spec.name.endswith(".weight") and len(spec.shape) == 2
        return int(np.prod(spec.shape)) * (MATRIX_BYTES[precision] if is_matrix else 4)

    read_whole = [s for s in parameter_specs(config) if config.share_emb or s.name != "embed.weight"]
    row_bytes = 0 if config.share_emb else config.model_dim * MATRIX_BYTES[precision]
    return sum(map(size, read_whole)) + row_bytes


def state_bytes_per_token(config: MegalodonConfig, precision: Precision, positions: np.ndarray) -> int:
    """Bytes of state that a step reads, mean over steps at these positions."""
    rows = int((positions % config.chunk_size).mean())
    return state_bytes(config, activation_bytes=MATRIX_BYTES[precision], capacity=rows)
