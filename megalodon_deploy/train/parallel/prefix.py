r"""The recurrent state as a prefix: what a segment of tokens adds, and how that joins what came before.

    CEMA            s' = q^L s + a,   a: the state after the segment when it starts from zero
    TimestepNorm    moments of two stretches of tokens, joined as in Chan, Golub and LeVeque (1979)

Both are associative, so the state that enters segment r follows from the summaries of the segments before it.

Shapes: B rows, L tokens of a segment, D channels, N modes, G groups.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from megalodon_deploy.model.layers import ComplexEMA, TimestepNorm
from megalodon_deploy.model.operators import complex_ema


class AveragePrefix:
    """Of one CEMA; states and summaries are [B, D, N, 2]."""

    def __init__(self, module: ComplexEMA, x_BLD: Tensor, past: Tensor, is_fresh_B: Tensor) -> None:
        p, q, gamma = module.coefficients()
        omega_D, start_B = module.omega.squeeze(-1), torch.zeros_like(is_fresh_B, dtype=torch.int64)
        self.summary = complex_ema(x_BLD, torch.zeros_like(past), start_B, p, q, gamma, omega_D)[1]
        self.state = past.masked_fill(is_fresh_B[:, None, None, None], 0)
        self._decay_DN = _power(torch.view_as_complex(q.double()), x_BLD.shape[1])

    def append(self, summary: Tensor) -> None:
        """Go on over a segment of L tokens."""
        state = torch.view_as_complex(self.state.double()) * self._decay_DN
        self.state = summary + torch.view_as_real(state).to(summary.dtype)

    def past(self) -> Tensor:
        """The state as the operator takes it."""
        return self.state


class _Moments(NamedTuple):
    """Of all tokens so far, float64: their number [B, 1], mean and population variance [B, G]."""

    seen: Tensor
    mean: Tensor
    var: Tensor


class StatisticsPrefix:
    """Of one TimestepNorm; summaries are [B, G, 2], mean and variance of a segment in float64."""

    def __init__(self, module: TimestepNorm, x_BLD: Tensor, past: Tensor, position_B: Tensor) -> None:
        self._dtype, self._length = past.dtype, x_BLD.shape[1]
        x_BLGs = x_BLD.double().view(*x_BLD.shape[:2], past.shape[1], -1)
        var_BG, mean_BG = torch.var_mean(x_BLGs, (1, 3), correction=0)
        self.summary = torch.stack([mean_BG, var_BG], -1)
        is_fresh_B11 = (position_B == 0)[:, None, None]
        exact_BG22 = past.double().view(*past.shape[:2], 2, 2).sum(-1).masked_fill(is_fresh_B11, 0)
        self.state = _Moments(position_B.double()[:, None], *exact_BG22.unbind(-1))

    def append(self, summary: Tensor) -> None:
        """Go on over a segment of L tokens."""
        (seen, mean, var), (own_mean, own_var) = self.state, summary.unbind(-1)
        total = seen + self._length
        delta, share = own_mean - mean, self._length / total
        joined = var * (1 - share) + own_var * share + delta.square() * share * (1 - share)
        self.state = _Moments(total, mean + delta * share, joined)

    def past(self) -> Tensor:
        """[B, G, 4]: mean hi, lo, variance hi, lo; the gradient of both parts is that of their sum."""
        parts = []
        for exact in (self.state.mean, self.state.var):
            hi = exact.to(self._dtype)
            parts += [hi, (exact - hi.double()).to(self._dtype)]
        return torch.stack(parts, -1)


def _power(base: Tensor, exponent: int) -> Tensor:
    """base^exponent by squaring, exact to rounding where the library's complex power is not; differentiable."""
    result = torch.ones_like(base)
    while exponent:
        if exponent & 1:
            result = result * base
        base, exponent = base * base, exponent >> 1
    return result
