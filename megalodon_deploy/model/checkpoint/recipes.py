"""Released tensors made from what megalodon-jax and megalodon-hf store: the two packages share their names."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch

from megalodon_deploy.model.checkpoint.tensor_file import TensorFile
from megalodon_deploy.model.checkpoint.types import LazyTensor
from megalodon_deploy.model.checkpoint.validate import Shape, read_checked
from megalodon_deploy.parameters import ParameterSpec

_RENAMED = [  # released, stored
    (re.compile(r"^layers\.(\d+)\.mega\."), r"model.layers.\1.attn."),
    (re.compile(r"^layers\.(\d+)\.nffn\."), r"model.layers.\1.ffn."),
    (re.compile(r"^output\.final_norm\."), "model.norm."),
    (re.compile(r"^output\.output\."), "lm_head."),
    (re.compile(r"^embed\."), "model.embed."),
    (re.compile(r"\.rmsnorm\.weight$"), ".rmsnorm.gamma"),
]


@dataclass(frozen=True)
class Recipe:
    """The stored tensors, by name with their shapes, that `build` turns into a released one."""

    parts: Mapping[str, Shape]  # none: a constant in float32
    build: Callable[..., torch.Tensor] | None = None  # None: the one part as it is
    dtype: torch.dtype | None = None  # of the parts when they are built with; None: that of the first part


def stored_name(released: str) -> str:
    for pattern, replacement in _RENAMED:
        released = pattern.sub(replacement, released)
    return released


def shared_recipe(spec: ParameterSpec) -> Recipe:
    """What both packages do: `cema.gamma` in two real tensors, `cema.omega` without its trailing axis."""
    name = stored_name(spec.name)
    if name.endswith(".cema.gamma"):
        return Recipe({f"{name}_real": spec.shape[:-1], f"{name}_imag": spec.shape[:-1]}, _complex_parts)
    if name.endswith(".cema.omega"):
        return Recipe({name: spec.shape[:-1]}, _trailing_axis)
    return Recipe({name: spec.shape})


def _complex_parts(real: torch.Tensor, imag: torch.Tensor) -> torch.Tensor:
    return torch.stack([real, imag], dim=-1)


def _trailing_axis(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.unsqueeze(-1)


def lazy_tensor(spec: ParameterSpec, recipe: Recipe, files: Mapping[str, TensorFile]) -> LazyTensor:
    """The tensor of `spec`, made when it is loaded; `files` says which file holds a stored tensor."""
    stored = [files[name].entries[name].dtype for name in recipe.parts]
    dtype = recipe.dtype or (stored[0] if stored else torch.float32)
    return LazyTensor(spec.shape, dtype, partial(_load, recipe, dtype, files))


def _load(recipe: Recipe, dtype: torch.dtype, files: Mapping[str, TensorFile]) -> torch.Tensor:
    parts = [read_checked(files[name], name) for name in recipe.parts]
    if recipe.build is None:
        return parts[0]
    built = recipe.build(*(part.to(dtype) for part in parts)).contiguous()
    for name, part in zip(recipe.parts, parts, strict=True):
        files[name].copied(part.nbytes)
    return built
