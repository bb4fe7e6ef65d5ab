"""Small configurations and strict comparison, for the tests of every room."""

from __future__ import annotations

from typing import Any

import numpy as np

from megalodon_deploy.config import MegalodonConfig


def small_config(**overrides: Any) -> MegalodonConfig:
    """A model of a few thousand parameters with every dimension different, so that swapped axes show."""
    values: dict[str, Any] = {
        "vocab_size": 50,
        "model_dim": 24,
        "num_layers": 2,
        "num_heads": 2,
        "z_dim": 16,
        "value_dim": 20,
        "ffn_hidden_dim": 28,
        "chunk_size": 12,
        "norm_num_groups": 3,
        "cema_ndim": 4,
    }
    return MegalodonConfig(**(values | overrides))


def assert_close(actual: np.ndarray, expected: np.ndarray, tolerance: float, what: str = "") -> None:
    """Largest absolute error at most `tolerance` times the scale of `expected`; NaN and a wrong shape fail."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, f"{what}: shape {actual.shape}, expected {expected.shape}"
    scale = max(1.0, float(np.abs(expected).max(initial=0.0)))
    error = float(np.abs(actual - expected).max(initial=0.0)) / scale
    assert error <= tolerance, f"{what}: error {error:.3g}, tolerance {tolerance:.3g}"
