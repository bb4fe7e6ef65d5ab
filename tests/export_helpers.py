"""Seeded checkpoints and bundles, and one call of a graph beside the same call in PyTorch, float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from helpers import assert_close

from megalodon_deploy.bundle import Bundle
from megalodon_deploy.config import MegalodonConfig
from megalodon_deploy.export import export_checkpoint
from megalodon_deploy.model.checkpoint import load_checkpoint
from megalodon_deploy.model.checkpoint.native import write_native
from megalodon_deploy.parameters import parameter_specs
from megalodon_deploy.state import LOGITS, POSITION, TOKENS, concrete_shape, state_specs

Arrays = dict[str, np.ndarray]


def seeded_state(config: MegalodonConfig, seed: int = 0) -> dict[str, torch.Tensor]:
    """Weights of which none is zero or alike; matrices keep the size of what they multiply."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for spec in parameter_specs(config):
        is_matrix = len(spec.shape) == 2 and min(spec.shape) > 2
        scale = spec.shape[-1] ** -0.5 if is_matrix else 0.3
        state[spec.name] = torch.randn(spec.shape, generator=generator) * scale
    return state


def write_seeded(path: Path, config: MegalodonConfig, seed: int = 0) -> Path:
    path.mkdir(parents=True)
    write_native(path, config, seeded_state(config, seed), None)
    return path


def export_seeded(root: Path, config: MegalodonConfig, seed: int = 0, **options: Any) -> Bundle:
    return export_checkpoint(write_seeded(root / "ckpt", config, seed), root / "bundle", **options)


def random_call(
    config: MegalodonConfig, positions: list[int], num_tokens: int, *, capacity: int | None = None, seed: int = 0
) -> Arrays:
    """Plausible state for rows at any position; key/value rows that must not be read hold large stale values."""
    rng = np.random.default_rng(seed)
    filled = [position % config.chunk_size for position in positions]
    capacity = max(filled) if capacity is None else capacity
    feeds: Arrays = {
        TOKENS: rng.integers(0, config.vocab_size, (len(positions), num_tokens)),
        POSITION: np.array(positions, np.int64),
    }
    for spec in state_specs(config):
        shape = concrete_shape(spec.past_shape, batch=len(positions), capacity=capacity)
        value = rng.normal(0, 1, shape).astype(np.float32)
        if spec.kind == "norm":
            value[..., 2] = np.abs(value[..., 2]) + 0.1
            value[..., 1::2] *= 2.0**-26
        if spec.is_activation:
            for row, count in enumerate(filled):
                value[row, :, count:] *= 1e30
        feeds[spec.past] = value
    return feeds


def open_onnx(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def run_onnx(bundle: Bundle, feeds: Arrays) -> Arrays:
    return run_session(open_onnx(bundle.model_path), feeds)


def run_session(session: onnxruntime.InferenceSession, feeds: Arrays) -> Arrays:
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


def run_torch(path: Path, feeds: Arrays, *, all_logits: bool = False) -> Arrays:
    """The same call in PyTorch, float64; norm states as the sum of their parts."""
    model = load_checkpoint(path).double()
    past = {name: torch.from_numpy(value).double() for name, value in feeds.items() if name not in (TOKENS, POSITION)}
    with torch.inference_mode():
        logits, present = model.forward_one_chunk(
            torch.from_numpy(feeds[TOKENS]), torch.from_numpy(feeds[POSITION]), past
        )
    outputs = {LOGITS: logits if all_logits else logits[:, -1:]} | present
    return {name: value.numpy() for name, value in outputs.items()}


def assert_outputs_close(actual: Arrays, expected: Arrays, tolerance: float) -> None:
    """Every output is there, and close; norm states are compared as float64 numbers."""
    assert set(actual) == set(expected)
    for name, value in expected.items():
        if "_norm" in name:
            assert_close(norm_values(actual[name]), norm_values(value), tolerance, name)
        else:
            assert_close(actual[name], value, tolerance, name)


def norm_values(state: np.ndarray) -> np.ndarray:
    """[..., 4] -> float64 mean and variance [..., 2]."""
    return state.astype(np.float64).reshape(*state.shape[:-1], 2, 2).sum(-1)
