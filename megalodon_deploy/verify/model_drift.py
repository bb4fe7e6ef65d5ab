"""A small model of a bundle's kind over millions of tokens.

ONNX Runtime streams it, state fed back, in calls of a chunk; PyTorch in float64 computes the same beside it, and
PyTorch in float32 with a plain float32 norm state, to show what that would do. Letters as in `MegalodonConfig`.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from megalodon_deploy.bundle import Bundle
from megalodon_deploy.config import MegalodonConfig
from megalodon_deploy.export import export_checkpoint, load_bundle_model
from megalodon_deploy.model.checkpoint import save_checkpoint
from megalodon_deploy.model.megalodon import Megalodon, ModelState
from megalodon_deploy.parameters import num_parameters
from megalodon_deploy.state import state_specs, unpack_norm
from megalodon_deploy.verify.operator_drift import Curve, Tick
from megalodon_deploy.verify.signals import checkpoints, drifting_tokens
from megalodon_deploy.verify.tolerance import SCALE_FLOOR

_CHUNK = 256
_STATES = ("pair (ONNX Runtime)", "float32 (PyTorch)")


@dataclass(frozen=True)
class ModelDrift:
    """Errors against position, and the process's memory beside them."""

    model: str
    curves: tuple[Curve, ...]
    resident_bytes: tuple[tuple[int, int], ...]  # (position, bytes); empty where the system does not say


def model_drift(bundle: Bundle, total: int, tick: Tick, seed: int = 0) -> ModelDrift:
    """Stream `total` tokens whose distribution drifts."""
    with _small_bundle(bundle, seed) as (small, what):
        step = small.config.chunk_size
        places, memory = checkpoints(total, step), []
        streams = _Streams(small)
        for position in range(0, total, step):
            num_tokens = min(step, total - position)
            tick("small model", num_tokens)
            streams.feed(drifting_tokens(position, num_tokens, total, small.config.vocab_size, seed))
            if position + num_tokens in places:
                streams.note()
                memory += [(position + num_tokens, size) for size in _resident_bytes()]
    curves = [Curve(*name, tuple(places), tuple(errors)) for name, errors in streams.errors.items()]
    return ModelDrift(what, tuple(curves), tuple(memory))


class _Streams:
    """The same stream three times; errors since the last `note` are kept by (what, state)."""

    def __init__(self, bundle: Bundle) -> None:
        self.errors: dict[tuple[str, str], list[float]] = {}
        self._config = bundle.config
        self._exact, self._plain = load_bundle_model(bundle).double(), load_bundle_model(bundle)
        self._exact_state, self._plain_state = self._exact.initial_state(1), self._plain.initial_state(1)
        self._stream = bundle.session("onnxruntime", threads=1).stream()
        self._worst = dict.fromkeys(_STATES, 0.0)

    def feed(self, tokens_T: np.ndarray) -> None:
        exact_V, self._exact_state = _feed(self._exact, self._exact_state, tokens_T)
        plain_V, self._plain_state = _feed(self._plain, _without_low_halves(self._plain_state), tokens_T)
        found = self._stream.prefill(tokens_T.tolist()), plain_V
        for state, found_V in zip(_STATES, found, strict=True):
            self._worst[state] = float(np.maximum(self._worst[state], _relative(found_V, exact_V)))  # keeps a NaN

    def note(self) -> None:
        plain = {name: tensor.numpy() for name, tensor in self._plain_state.tensors.items()}
        for state, tensors in zip(_STATES, (self._stream.snapshot().tensors, plain), strict=True):
            error = _norm_error(self._config, tensors, self._exact_state)
            self.errors.setdefault(("small model, norm statistics", state), []).append(error)
            self.errors.setdefault(("small model, logits", state), []).append(self._worst[state])
        self._worst = dict.fromkeys(_STATES, 0.0)


@contextmanager
def _small_bundle(bundle: Bundle, seed: int) -> Iterator[tuple[Bundle, str]]:
    config = shrink(bundle.config)
    torch.manual_seed(seed)
    model = Megalodon(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():  # norm weights and biases start at zero
                parameter.normal_(std=0.1)
    with tempfile.TemporaryDirectory(prefix="megalodon-verify.") as folder:
        save_checkpoint(model, Path(folder) / "checkpoint")
        small = export_checkpoint(Path(folder) / "checkpoint", Path(folder) / "bundle")
        yield small, f"the bundle's options, {num_parameters(config):,} random parameters, chunks of {_CHUNK} tokens"


def shrink(config: MegalodonConfig) -> MegalodonConfig:
    """A model of the same kind, small enough for millions of tokens."""
    heads = min(2, config.num_heads)
    return replace(
        config,
        vocab_size=256,
        model_dim=32,
        num_layers=2,
        num_heads=heads,
        z_dim=16 * heads,
        value_dim=32 * heads,
        ffn_hidden_dim=48,
        norm_num_groups=4,
        cema_ndim=min(4, config.cema_ndim),
        chunk_size=_CHUNK,
        kv_dtype="activation",
    )


@torch.inference_mode()
def _feed(model: Megalodon, state: ModelState, tokens_T: np.ndarray) -> tuple[np.ndarray, ModelState]:
    """Logits [V] of the last token, and the state after it."""
    logits_1TV, state = model(torch.from_numpy(tokens_T)[None], state)
    logits_V: np.ndarray = logits_1TV[0, -1].numpy()
    return logits_V, state


@torch.inference_mode()
def _without_low_halves(state: ModelState) -> ModelState:
    for name, tensor in state.tensors.items():
        if name.startswith("past_norm"):
            tensor[..., 1::2] = 0
    return state


def _relative(found_V: np.ndarray, exact_V: np.ndarray) -> float:
    """Largest error over the largest logit; NaN where something is not finite."""
    return float(np.abs(found_V - exact_V).max() / max(np.abs(exact_V).max(), SCALE_FLOOR))


def _norm_error(config: MegalodonConfig, found: Mapping[str, np.ndarray], exact: ModelState) -> float:
    """Of all norms' statistics the largest error: of means over sqrt(mean^2 + var), of variances over themselves."""
    worst = []
    for spec in state_specs(config):
        if spec.kind == "norm":
            mean, var = unpack_norm(exact.tensors[spec.past].numpy())
            found_mean, found_var = unpack_norm(found[spec.past])
            worst += [(np.abs(found_mean - mean) / np.sqrt(mean**2 + var)).max(), (np.abs(found_var - var) / var).max()]
    return float(np.max(worst))  # NaN if one is


def _resident_bytes() -> list[int]:
    """One number, or none where the system does not say."""
    statm = Path("/proc/self/statm")
    return [int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")] if statm.exists() else []
