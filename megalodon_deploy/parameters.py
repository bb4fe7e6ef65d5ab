"""The tensors of a Megalodon checkpoint: names, shapes, and how model-parallel shards join.

This is the released layout, and `Megalodon.state_dict()` has the same keys, so weights convert one to one. The
letters are those of `MegalodonConfig`. No PyTorch is needed to read this table.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from megalodon_deploy.config import MegalodonConfig


@dataclass(frozen=True)
class ParameterSpec:
    """One tensor of a checkpoint."""

    name: str
    shape: tuple[int, ...]
    shard_dim: int | None  # the dimension along which shards are joined; None: equal on every shard


def _timestep_norm(prefix: str, dim: int) -> list[ParameterSpec]:
    return [ParameterSpec(f"{prefix}.weight", (dim,), 0), ParameterSpec(f"{prefix}.bias", (dim,), 0)]


def _linear(name: str, out_dim: int, in_dim: int, shard_dim: int, bias: bool = False) -> list[ParameterSpec]:
    specs = [ParameterSpec(f"{name}.weight", (out_dim, in_dim), shard_dim)]
    return specs + ([ParameterSpec(f"{name}.bias", (out_dim,), 0)] if bias else [])


def _cema_specs(prefix: str, dim: int, modes: int) -> list[ParameterSpec]:
    return [
        ParameterSpec(f"{prefix}.alpha", (dim, modes, 1), 0),
        ParameterSpec(f"{prefix}.delta", (dim, modes, 1), 0),
        ParameterSpec(f"{prefix}.theta", (dim, 1, 1), 0),
        ParameterSpec(f"{prefix}.gamma", (dim, modes, 2), 0),
        ParameterSpec(f"{prefix}.omega", (dim, 1), 0),
    ]


def _attention_specs(config: MegalodonConfig, prefix: str) -> list[ParameterSpec]:
    dim, modes = config.model_dim, config.cema_ndim
    return [
        *_timestep_norm(f"{prefix}.timenorm", dim),
        *(_cema_specs(f"{prefix}.cema", dim, modes) if config.ema != "none" else []),
        *([ParameterSpec(f"{prefix}.rmsnorm.weight", (dim,), None)] if config.norm_affine else []),
        *_linear(f"{prefix}.wz", config.z_dim, dim, 0, bias=True),
        *_linear(f"{prefix}.wv", config.value_dim, dim, 0, bias=True),
        *_linear(f"{prefix}.wr", config.value_dim, dim, 0, bias=True),
        *_linear(f"{prefix}.wh1", dim, dim, 0, bias=True),
        *_linear(f"{prefix}.wh2", dim, config.value_dim, 1),
        ParameterSpec(f"{prefix}.gamma", (2, config.z_dim), 1),
        ParameterSpec(f"{prefix}.beta", (2, config.z_dim), 1),
    ]


def _ffn_specs(config: MegalodonConfig, prefix: str) -> list[ParameterSpec]:
    dim, hidden = config.model_dim, config.ffn_hidden_dim
    norm = [ParameterSpec(f"{prefix}.norm.{part}", (dim,), None) for part in ("weight", "bias")]
    return [
        *(norm if config.norm_affine else []),
        *_linear(f"{prefix}.fc1", hidden, dim, 0),
        *_linear(f"{prefix}.fc2", dim, hidden, 1),
        *(_linear(f"{prefix}.fc3", hidden, dim, 0) if config.swiglu else []),
        *([ParameterSpec(f"{prefix}.alpha", (dim,), None)] if config.rescale_nffn else []),
    ]


def parameter_specs(config: MegalodonConfig) -> Iterator[ParameterSpec]:
    """Every trainable tensor once, in model order; `output.output.weight` is absent when it is the embedding."""
    yield ParameterSpec("embed.weight", (config.vocab_size, config.model_dim), 1)
    for layer in range(config.num_layers):
        yield from _attention_specs(config, f"layers.{layer}.mega")
        yield from _ffn_specs(config, f"layers.{layer}.nffn")
    yield from _timestep_norm("output.final_norm", config.model_dim)
    if not config.share_emb:
        yield ParameterSpec("output.output.weight", (config.vocab_size, config.model_dim), 1)


def timestep_norm_prefixes(config: MegalodonConfig) -> list[str]:
    """The modules that carry the released `prior_count`, `prior_mean` and `prior_logv` buffers (all zero)."""
    return [f"layers.{layer}.mega.timenorm" for layer in range(config.num_layers)] + ["output.final_norm"]


def num_parameters(config: MegalodonConfig) -> int:
    """Trainable scalars; a shared embedding counts once."""
    return sum(math.prod(spec.shape) for spec in parameter_specs(config))
