"""From the tensors of a checkpoint to the initializers of the graph, and back.

A `Fold` makes some initializers from some released tensors. What a graph would compute from weights alone is computed
here in float64 and rounded once: sigmoids, rotations, the +1 of norm weights, 1/sqrt(N) and 1/sqrt(dz). Matrices that
multiply the same input stand side by side, transposed to [in, out].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from megalodon_deploy.config import MegalodonConfig
from megalodon_deploy.errors import UserError
from megalodon_deploy.export.arrays import transpose_into
from megalodon_deploy.export.coefficients import fold_cema, unfold_cema
from megalodon_deploy.quantization import BLOCK_SIZES, Quantization, WeightFormat

Arrays = tuple[np.ndarray, ...]


@dataclass(frozen=True)
class InitializerSpec:
    """One initializer of the graph. `is_activation`: it has the activation type, else float32."""

    name: str
    shape: tuple[int, ...]
    is_activation: bool


@dataclass(frozen=True)
class Fold:
    """Some initializers and the released tensors they come from; `unfold` is the inverse, up to rounding.

    `fold` takes float32, and where it `only_moves` values, any type, in which it also returns them.
    """

    targets: tuple[InitializerSpec, ...]
    sources: tuple[str, ...]
    fold: Callable[..., Arrays]
    unfold: Callable[..., Arrays]
    only_moves: bool = False


def folds(config: MegalodonConfig) -> Iterator[Fold]:
    """Every initializer once, in the order in which a call reads them."""
    yield _same("embed.weight", (config.vocab_size, config.model_dim))
    for layer in range(config.num_layers):
        yield from _attention_folds(config, f"layers.{layer}.mega")
        yield from _ffn_folds(config, f"layers.{layer}.nffn")
    yield from _norm_folds("output.final_norm", config.model_dim, bias=True)
    if not config.share_emb:
        yield _matrices("output.output", ("output.output",), (config.vocab_size,), config.model_dim)


def _attention_folds(config: MegalodonConfig, prefix: str) -> Iterator[Fold]:
    dim, inner, merged = config.model_dim, config.value_dim, merged_projection_sizes(config)
    yield from _norm_folds(f"{prefix}.timenorm", dim, bias=True)
    yield _cema(config, f"{prefix}.cema")
    if config.norm_affine:
        yield from _norm_folds(f"{prefix}.rmsnorm", dim, bias=False)
    yield _matrices(f"{prefix}.wv", (f"{prefix}.wv",), (inner,), dim)
    yield _same(f"{prefix}.wv.bias", (inner,))
    names = tuple(f"{prefix}.{name}" for name in merged)
    sizes = tuple(merged.values())
    yield _matrices(f"{prefix}.wz_wr_wh1", names, sizes, dim)
    yield _biases(f"{prefix}.wz_wr_wh1", names, sizes)
    yield _query_key_scale(config, prefix)
    yield _query_key_bias(config, prefix)
    yield _matrices(f"{prefix}.wh2", (f"{prefix}.wh2",), (dim,), inner)


def _ffn_folds(config: MegalodonConfig, prefix: str) -> Iterator[Fold]:
    dim, hidden = config.model_dim, config.ffn_hidden_dim
    if config.norm_affine:
        yield from _norm_folds(f"{prefix}.norm", dim, bias=True)
    if config.swiglu:
        yield _matrices(f"{prefix}.fc1_fc3", (f"{prefix}.fc1", f"{prefix}.fc3"), (hidden, hidden), dim)
    else:
        yield _matrices(f"{prefix}.fc1", (f"{prefix}.fc1",), (hidden,), dim)
    yield _matrices(f"{prefix}.fc2", (f"{prefix}.fc2",), (dim,), hidden)
    if config.rescale_nffn:
        yield _same(f"{prefix}.alpha", (dim,), is_activation=False)


def merged_projection_sizes(config: MegalodonConfig) -> dict[str, int]:
    """The projections of m that are one matrix in the graph, in order, with their widths."""
    return {"wz": config.z_dim, "wr": config.value_dim, "wh1": config.model_dim}


def _same(name: str, shape: tuple[int, ...], *, is_activation: bool = True) -> Fold:
    def copy(value: np.ndarray) -> Arrays:
        return (value.reshape(shape),)

    return Fold((InitializerSpec(name, shape, is_activation),), (name,), copy, copy, only_moves=True)


def _norm_folds(prefix: str, dim: int, *, bias: bool) -> Iterator[Fold]:
    """weight + 1 as `scale`, and bias, float32."""

    def add_one(weight: np.ndarray) -> Arrays:
        return ((weight.astype(np.float64) + 1).astype(np.float32),)

    def subtract_one(scale: np.ndarray) -> Arrays:
        return ((scale.astype(np.float64) - 1).astype(np.float32),)

    def keep(value: np.ndarray) -> Arrays:
        return (value.astype(np.float32),)

    yield Fold((InitializerSpec(f"{prefix}.scale", (dim,), False),), (f"{prefix}.weight",), add_one, subtract_one)
    if bias:
        yield Fold((InitializerSpec(f"{prefix}.bias", (dim,), False),), (f"{prefix}.bias",), keep, keep)


def _matrices(name: str, sources: Sequence[str], widths: Sequence[int], in_dim: int) -> Fold:
    """Linear weights [out, in] side by side as one [in, sum of out]."""
    edges = np.cumsum(widths)[:-1]

    def join(*weights: np.ndarray) -> Arrays:
        matrix = np.empty((in_dim, sum(widths)), weights[0].dtype)
        for part, weight in zip(np.split(matrix, edges, axis=1), weights, strict=True):
            transpose_into(part, weight)
        return (matrix,)

    def part(matrix: np.ndarray) -> Arrays:
        return tuple(np.ascontiguousarray(weight.T) for weight in np.split(matrix, edges, axis=1))

    target = InitializerSpec(f"{name}.weight", (in_dim, sum(widths)), True)
    return Fold((target,), tuple(f"{source}.weight" for source in sources), join, part, only_moves=True)


def _biases(name: str, sources: Sequence[str], widths: Sequence[int]) -> Fold:
    edges = np.cumsum(widths)[:-1]

    def join(*biases: np.ndarray) -> Arrays:
        return (np.concatenate(biases),)

    def part(bias: np.ndarray) -> Arrays:
        return tuple(np.split(bias, edges))

    target = InitializerSpec(f"{name}.bias", (sum(widths),), True)
    return Fold((target,), tuple(f"{source}.bias" for source in sources), join, part, only_moves=True)


def _query_key_scale(config: MegalodonConfig, prefix: str) -> Fold:
    """(gamma + 1) / sqrt(dz), float32 [2, H, 1, dz]."""
    shape = (2, config.num_heads, 1, config.key_head_dim)
    root = math.sqrt(config.key_head_dim)

    def fold(gamma: np.ndarray) -> Arrays:
        return (((gamma.astype(np.float64) + 1) / root).astype(np.float32).reshape(shape),)

    def unfold(scale: np.ndarray) -> Arrays:
        return ((scale.astype(np.float64).reshape(2, -1) * root - 1).astype(np.float32),)

    return Fold((InitializerSpec(f"{prefix}.query_key.scale", shape, False),), (f"{prefix}.gamma",), fold, unfold)


def _query_key_bias(config: MegalodonConfig, prefix: str) -> Fold:
    shape = (2, config.num_heads, 1, config.key_head_dim)

    def fold(beta: np.ndarray) -> Arrays:
        return (beta.astype(np.float32).reshape(shape),)

    def unfold(bias: np.ndarray) -> Arrays:
        return (bias.reshape(2, -1),)

    return Fold((InitializerSpec(f"{prefix}.query_key.bias", shape, False),), (f"{prefix}.beta",), fold, unfold)


def _cema(config: MegalodonConfig, prefix: str) -> Fold:
    dim, modes, levels = config.model_dim, config.cema_ndim, config.chunk_size.bit_length()
    shapes = {"p": (dim, modes), "q_powers": (levels, dim, modes, 2), "gamma": (dim, modes, 2), "omega": (dim,)}
    targets = tuple(InitializerSpec(f"{prefix}.{name}", shape, False) for name, shape in shapes.items())
    sources = tuple(f"{prefix}.{name}" for name in ("alpha", "delta", "theta", "gamma", "omega"))

    def fold(*values: np.ndarray) -> Arrays:
        return fold_cema(*values, levels=levels)

    return Fold(targets, sources, fold, unfold_cema)


def matrix_inputs(config: MegalodonConfig) -> set[int]:
    """Numbers of inputs of the matrices that may be quantised."""
    return {config.model_dim, config.value_dim, config.ffn_hidden_dim}


def check_quantization(config: MegalodonConfig, quantization: Quantization) -> None:
    """Raise `UserError` when a matrix of this model cannot have the format that was chosen for it."""
    if config.share_emb and quantization.output is not None:
        raise UserError(
            "this model's output matrix is its embedding, which is looked up and stays unquantised: "
            "choose no quantisation of the output (--quantize-output none)"
        )
    if config.share_emb and quantization.embedding is not None:
        raise UserError(
            "this model's embedding is its output matrix, too, and stays unquantised: "
            "leave out the quantisation of the embedding (--quantize-embedding)"
        )
    for spec in (spec for fold in folds(config) for spec in fold.targets):
        form = quantization.format_of(spec.name)
        if form is not None and not form.fits(spec.shape[0]):
            fitting = [size for size in BLOCK_SIZES[form.kind] if WeightFormat(form.kind, size).fits(spec.shape[0])]
            raise UserError(
                f"{spec.name}: {spec.shape[0]} inputs are not a multiple of the block size {form.block_size}; "
                f"{form.kind} block sizes that fit: {', '.join(map(str, fitting)) or 'none'}"
            )
