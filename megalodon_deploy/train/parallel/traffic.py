"""Bytes that each mode moves: what a rank receives in the forward and backward pass of one micro-batch.

A rank receives of a gather over W ranks W - 1 parts, and of a sum as many again, made as a ring: each part once to be
added up and once as the sum. Weights are trained in float32, so are gradients.
"""

from __future__ import annotations

import math

from megalodon_deploy.config import MegalodonConfig
from megalodon_deploy.parameters import ParameterSpec, parameter_specs

_FLOAT32_BYTES, _FLOAT64_BYTES = 4, 8
_CUT_MATRICES = ("wv", "wr", "wh2", "fc1", "fc2", "fc3")  # over tensor ranks: see `tensor`


def replica_bytes(config: MegalodonConfig, world_size: int, itemsize: int = _FLOAT32_BYTES) -> float:
    """Of whole weights on each rank: the gradients' sum."""
    size_bytes = sum(math.prod(spec.shape) for spec in parameter_specs(config) if is_trained(config, spec)) * itemsize
    return 2 * size_bytes * (world_size - 1) / world_size


def shard_bytes(
    config: MegalodonConfig, world_size: int, itemsize: int = _FLOAT32_BYTES, *, runs: int = 1, tensor: int = 1
) -> int:
    """Of weights in parts: they are gathered forward, those of the blocks again backward, and gradients are summed
    where they are kept. Parts are as long as the longest, so a first axis is filled up to a multiple of W. Packed
    documents run, and so gather, the blocks once for each of `runs` groups of similar lengths. Of matrices that are cut
    over `tensor` ranks, only the rank's part is shared out.
    """
    received = 0
    for spec in parameter_specs(config):
        is_block, is_summed = spec.name.startswith("layers."), is_trained(config, spec)
        times = (2 * runs if is_block else 1) + is_summed
        shape = _shape_of_part(spec, tensor)
        part = -(-shape[0] // world_size) * math.prod(shape[1:])
        received += times * (world_size - 1) * part * itemsize
    return received


def _shape_of_part(spec: ParameterSpec, tensor: int) -> tuple[int, ...]:
    """On one of `tensor` ranks."""
    is_cut = spec.name.split(".")[-2] in _CUT_MATRICES
    return tuple(size // tensor if is_cut and axis == spec.shard_dim else size for axis, size in enumerate(spec.shape))


def chunk_bytes(config: MegalodonConfig, rows: int, world_size: int, itemsize: int = _FLOAT32_BYTES) -> int:
    """Of sequences over `world_size` ranks: the operators' summaries, and in the backward pass the gradients' sum.

    A CEMA sends B x D x N complex numbers for its rows, a TimestepNorm B x G pairs of float64; recomputation sends
    nothing.
    """
    num_averages = 0 if config.ema == "none" else config.num_layers
    num_norms = config.num_layers + 1 if config.stream_norm == "timestep" else 0
    averages = num_averages * config.model_dim * config.cema_ndim * 2 * itemsize
    norms = num_norms * config.norm_num_groups * 2 * _FLOAT64_BYTES
    return (1 + 2) * (world_size - 1) * rows * (averages + norms)


def tensor_bytes(config: MegalodonConfig, num_tokens: int, world_size: int, itemsize: int = _FLOAT32_BYTES) -> float:
    """Of layers over `world_size` ranks: sums of [tokens, D], two forward and three backward, and of the gradients of
    queries and keys. Recomputation repeats those of the forward pass."""
    channels = (2 + 3) * config.model_dim + 2 * config.z_dim
    return 2 * config.num_layers * num_tokens * channels * itemsize * (world_size - 1) / world_size


def pipeline_bytes(config: MegalodonConfig, num_tokens: int, itemsize: int = _FLOAT32_BYTES) -> int:
    """Of layers over stages: the stream [tokens, D] from the stage before, and its gradient from the stage behind. The
    first and the last stage receive half as much; with a tied embedding its gradient once a step."""
    return 2 * num_tokens * config.model_dim * itemsize


def is_trained(config: MegalodonConfig, spec: ParameterSpec) -> bool:
    """A moving average that does not rotate keeps its angles."""
    return config.ema == "complex" or not spec.name.endswith("cema.theta")
