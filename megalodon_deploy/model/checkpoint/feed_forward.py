"""Feed-forward biases, which megalodon-hf has and the released model lacks, absorbed into its matrices.

LayerNorm's normalised vector x sums to zero over D, so n = x + 1 (weight 1, bias 1) carries a constant that any row
vector of equal elements reads off: sum(n) = D. With the stored weight w and bias b of the norm,

    fc (x w + b) + bias = fc' n    for    fc' = fc diag(w) + c 1^T,    c = (fc (b - w) + bias) / D

and one more hidden unit with fc1' = 1^T / D (and fc3' likewise) is the constant silu(1): its column of fc2' adds the
bias of fc2. The same function, up to rounding; all of it is computed in float32.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from functools import partial

import torch
from torch.nn import functional

from megalodon_deploy.config import MegalodonConfig
from megalodon_deploy.model.checkpoint.recipes import Recipe, stored_name
from megalodon_deploy.model.checkpoint.validate import Shape

_WIDTH_MULTIPLE = 32  # of the widened hidden layer: blocks of quantisation, alignment of kernels
_UNIT = 1 / (1 + math.exp(-1.0))  # silu(1), what the constant hidden unit gives


def absorb_biases(
    config: MegalodonConfig, recipes: dict[str, Recipe], stored: Mapping[str, Shape], *, widen: bool
) -> MegalodonConfig:
    """Replace the feed-forward recipes of every layer in place. `stored` has the shapes of all stored tensors.

    Returns the configuration that they have then: `widen` adds the hidden unit for the biases of fc2.
    """
    hidden = config.ffn_hidden_dim
    width = math.ceil((hidden + 1) / _WIDTH_MULTIPLE) * _WIDTH_MULTIPLE if widen else hidden
    dim = config.model_dim
    for layer in range(config.num_layers):
        released, prefix = f"layers.{layer}.nffn", stored_name(f"layers.{layer}.nffn.")
        norm = {name: stored[name] for name in (f"{prefix}norm.weight", f"{prefix}norm.bias") if name in stored}
        recipes[f"{released}.norm.weight"] = Recipe({}, partial(torch.zeros, dim))
        recipes[f"{released}.norm.bias"] = Recipe({}, partial(torch.ones, dim))
        for matrix in ("fc1", "fc3") if config.swiglu else ("fc1",):
            parts = {name: stored[name] for name in (f"{prefix}{matrix}.weight", f"{prefix}{matrix}.bias")}
            recipes[f"{released}.{matrix}.weight"] = Recipe(parts | norm, partial(_inward, width=width), torch.float32)
        if widen:
            parts = {name: stored[name] for name in (f"{prefix}fc2.weight", f"{prefix}fc2.bias")}
            recipes[f"{released}.fc2.weight"] = Recipe(parts, partial(_outward, width=width), torch.float32)
    return dataclasses.replace(config, ffn_hidden_dim=width)


def _inward(
    matrix: torch.Tensor,
    bias: torch.Tensor,
    norm_weight: torch.Tensor | None = None,
    norm_bias: torch.Tensor | None = None,
    *,
    width: int,
) -> torch.Tensor:
    """fc1 or fc3 [F, D] -> [width, D]; the first added row reads off 1, the others are zero."""
    hidden, dim = matrix.shape
    weight = torch.ones(dim) if norm_weight is None else norm_weight
    shift = torch.zeros(dim) if norm_bias is None else norm_bias
    constant = (torch.mv(matrix, shift - weight) + bias) / dim
    absorbed = torch.zeros(width, dim)
    torch.addcmul(constant.unsqueeze(1), matrix, weight, out=absorbed[:hidden])
    absorbed[hidden : hidden + 1] = 1 / dim
    return absorbed


def _outward(matrix: torch.Tensor, bias: torch.Tensor, *, width: int) -> torch.Tensor:
    """fc2 [D, F] -> [D, width]; the first added column is the bias over what its hidden unit gives."""
    hidden = matrix.shape[1]
    absorbed = functional.pad(matrix, (0, width - hidden))
    absorbed[:, hidden] = bias / _UNIT
    return absorbed
