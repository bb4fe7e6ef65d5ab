"""Norms and the moving average as modules: parameters in the released layout around the operators.

Shapes: B rows, T tokens, D channels, N complex modes, G groups. Norm weights are stored minus one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from megalodon_deploy.config import MegalodonConfig
from megalodon_deploy.model.operators import complex_ema, timestep_norm

_HALF_DTYPES = (torch.float16, torch.bfloat16)


class Float32Module(nn.Module):
    """Parameters stay float32 when the model is converted to a half precision.

    `model.to(torch.bfloat16)`, `model.half()` and their kin move these parameters between devices and leave their
    dtype alone: coefficients close to 1 and norm weights lose what matters in 8 or 11 bits. float64 is followed.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        def keep_float32(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device) if moved.dtype in _HALF_DTYPES else moved

        return super()._apply(keep_float32, recurse)  # type: ignore[no-untyped-call]


class TimestepNorm(Float32Module):
    """Cumulative group norm: weight [D] (minus one), bias [D]."""

    def __init__(self, config: MegalodonConfig) -> None:
        super().__init__()
        self.eps = config.norm_eps
        self.weight = nn.Parameter(torch.zeros(config.model_dim))
        self.bias = nn.Parameter(torch.zeros(config.model_dim))

    def forward(self, x_BTD: Tensor, past_BG4: Tensor, position_B: Tensor) -> tuple[Tensor, Tensor]:
        y_BTD, present_BG4 = timestep_norm(x_BTD, past_BG4, position_B, self.weight + 1, self.bias, self.eps)
        return y_BTD, present_BG4


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """Over the last axis, computed in float32 at least, in the dtype of x. `weight` is stored minus one."""
    wide = x.float() if x.dtype in _HALF_DTYPES else x
    scale = None if weight is None else weight + 1
    return functional.rms_norm(wide, x.shape[-1:], scale, eps).to(x.dtype)


class RMSNorm(Float32Module):
    """Root-mean-square norm over D; without a weight when the configuration has `norm_affine` off."""

    def __init__(self, config: MegalodonConfig) -> None:
        super().__init__()
        self.eps = config.norm_eps
        self.weight = nn.Parameter(torch.zeros(config.model_dim)) if config.norm_affine else None

    def forward(self, x_BTD: Tensor) -> Tensor:
        return rms_norm(x_BTD, self.weight, self.eps)


class LayerNorm(Float32Module):
    """Layer norm over D; without weight and bias when the configuration has `norm_affine` off."""

    def __init__(self, config: MegalodonConfig) -> None:
        super().__init__()
        self.eps = config.norm_eps
        self.weight = nn.Parameter(torch.zeros(config.model_dim)) if config.norm_affine else None
        self.bias = nn.Parameter(torch.zeros(config.model_dim)) if config.norm_affine else None

    def forward(self, x_BTD: Tensor) -> Tensor:
        wide = x_BTD.float() if x_BTD.dtype in _HALF_DTYPES else x_BTD
        scale = None if self.weight is None else self.weight + 1
        return functional.layer_norm(wide, x_BTD.shape[-1:], scale, self.bias, self.eps).to(x_BTD.dtype)


class StreamLayerNorm(LayerNorm):
    """A layer norm in the place of `TimestepNorm`: weight [D] (minus one), bias [D]; its state passes through."""

    def __init__(self, config: MegalodonConfig) -> None:
        super().__init__(replace(config, norm_affine=True))

    def forward(  # type: ignore[override]
        self, x_BTD: Tensor, past_BG4: Tensor, position_B: Tensor
    ) -> tuple[Tensor, Tensor]:
        return super().forward(x_BTD), past_BG4


def stream_norm(config: MegalodonConfig) -> TimestepNorm | StreamLayerNorm:
    """The norm of the residual stream that the configuration names."""
    return TimestepNorm(config) if config.stream_norm == "timestep" else StreamLayerNorm(config)


def cema_coefficients(alpha: Tensor, delta: Tensor, theta: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The operator's p [D, N], q [D, N, 2] and gamma [D, N, 2] from the released parameters.

    Args:
        alpha, delta: [D, N, 1]; theta: [D, 1, 1]; gamma: [D, N, 2], all float32 or all float64.

    Computed in float64 and then rounded to the parameters' dtype: an angle computed in float32 is off by several
    times its rounding error, and the error grows with the number of tokens that a mode remembers.
    """
    num_modes = alpha.shape[1]
    p_DN = torch.sigmoid(alpha.squeeze(-1).double())
    modulus_DN = 1 - p_DN * torch.sigmoid(delta.squeeze(-1).double())
    mode_N = torch.arange(1, num_modes + 1, dtype=torch.float64, device=alpha.device)
    phase_DN = torch.sigmoid(theta.squeeze(-1).double()) * (mode_N * (2 * math.pi / num_modes))
    q_DN2 = torch.stack([modulus_DN * phase_DN.cos(), modulus_DN * phase_DN.sin()], -1)
    return p_DN.to(alpha.dtype), q_DN2.to(alpha.dtype), gamma / math.sqrt(num_modes)


_NO_ROTATION = -120.0  # as theta: an angle of 5e-52, which is 0 in float32
_Coefficients = tuple[Tensor, Tensor, Tensor]


class ComplexEMA(Float32Module):
    """Complex exponential moving average with its released parameters."""

    def __init__(self, config: MegalodonConfig) -> None:
        super().__init__()
        dim, modes = config.model_dim, config.cema_ndim
        self.alpha = nn.Parameter(torch.empty(dim, modes, 1))
        self.delta = nn.Parameter(torch.empty(dim, modes, 1))
        self.theta = nn.Parameter(torch.empty(dim, 1, 1))
        self.gamma = nn.Parameter(torch.empty(dim, modes, 2))
        self.omega = nn.Parameter(torch.empty(dim, 1))
        self.rotates = config.ema == "complex"
        self.theta.requires_grad_(self.rotates)
        self._cached: tuple[Any, _Coefficients] | None = None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Released initialisation: angles spread over the channels on a logarithmic scale, in random order."""
        dim = self.theta.shape[0]
        nn.init.normal_(self.alpha, std=0.2)
        nn.init.normal_(self.delta, std=0.2)
        rank = torch.randperm(dim, device=self.theta.device) + 1
        self.theta.copy_(torch.logit(torch.exp(rank * (-math.log(dim) / dim))).view(dim, 1, 1))
        if not self.rotates:
            self.theta.fill_(_NO_ROTATION)
        nn.init.normal_(self.gamma)
        self.gamma[..., 1].zero_()
        nn.init.trunc_normal_(self.omega, std=0.25, a=-1.0, b=1.0)

    def train(self, mode: bool = True) -> ComplexEMA:
        self._cached = None
        return super().train(mode)

    def coefficients(self) -> _Coefficients:
        """(p, q, gamma) of the operator.

        In evaluation without gradients they are kept from call to call, a tenth of a decode step otherwise. In-place
        changes of the parameters are noticed, except through `.data`; `eval()` forgets what is kept.
        """
        source = (self.alpha, self.delta, self.theta, self.gamma)
        if self.training or torch.is_grad_enabled() or torch.compiler.is_compiling() or self.alpha.is_inference():
            return cema_coefficients(*source)
        key = [(tensor.data_ptr(), tensor._version, tensor.dtype) for tensor in source]
        if self._cached is None or self._cached[0] != key:
            self._cached = key, cema_coefficients(*source)
        return self._cached[1]

    def forward(self, x_BTD: Tensor, past_BDN2: Tensor, position_B: Tensor) -> tuple[Tensor, Tensor]:
        p_DN, q_DN2, gamma_DN2 = self.coefficients()
        omega_D = self.omega.squeeze(-1)
        y_BTD, present_BDN2 = complex_ema(x_BTD, past_BDN2, position_B, p_DN, q_DN2, gamma_DN2, omega_D)
        return y_BTD, present_BDN2
