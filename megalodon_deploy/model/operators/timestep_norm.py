r"""TimestepNorm, the cumulative group norm, parallel over time.

Shapes: B rows, T tokens, D channels in G groups of s scalars. A stream's statistics are float64 numbers, kept in the
state [B, G, 4] as (mean hi, mean lo, var hi, var lo) of the state's dtype.

With token moments (m_t, v_t) of a group, n tokens before the call and n_t = n + t + 1 after token t:

    mean_t = c + (1/n_t) sum_{i<=t} (m_i - c)                          c: the past mean, or m_0 where n = 0
    var_t  = (1/n_t) (n var_past + sum_{i<=t} (v_i + (m_i - mean_{i-1})^2 (n_i - 1)/n_i))
    y_t    = (x_t - mean_t) r_t (weight) + bias,    r_t = (var_t + eps)^(-1/2)

The first line holds for any c since the past contributes n (mean_past - c) = 0; the second is Welford's update summed
up. All terms are differences from nearby values or positive: nothing cancels as in E[x^2] - E[x]^2.

**Backward.** Let a_t = -r_t sum_s g w and b_t = -r_t^2/2 sum_s g w xhat be what y sends to mean_t and var_t (plus, at
the last token, the gradients of the present state). Since n_t var_t = sum of (v_i + m_i^2) - n_t mean_t^2,
d var_t / d m_i = 2 (m_i - mean_t) / n_t, d var_t / d v_i = d mean_t / d m_i = 1/n_t for i <= t, and with the sums from
the right R1_i = sum_{t>=i} a_t/n_t, R2_i = sum b_t/n_t, R3_i = sum b_t (mean_t - c)/n_t:

    g_m = R1 + 2 (m - c) R2 - 2 R3,   g_v = R2
    g_x = g w r + (R1 - 2 R3 + 2 R2 (x - c)) / s
    g_mean_past = n (R1_0 - 2 R3_0),  g_var_past = n R2_0

`hi` carries the whole gradient of a present number, `lo` being its rounding error; both parts of a past number
receive it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from megalodon_deploy.model.operators import kernels


class _Statistics(NamedTuple):
    """float64; what the norm knows after each token."""

    mean: Tensor  # [B, T, G]
    var: Tensor  # [B, T, G]
    reference: Tensor  # [B, 1, G], c in the formulas
    seen: Tensor  # [B, T, 1], n_t


def _in_groups(x_BTD: Tensor, num_groups: int) -> Tensor:
    """[B, T, D] -> [B, T, G, s]."""
    return x_BTD.reshape(*x_BTD.shape[:-1], num_groups, -1)


def _moments(x_BTGs: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of every group of every token; `torch.var_mean` takes ten times longer on short groups."""
    mean = x_BTGs.mean(-1, keepdim=True)
    return mean.squeeze(-1), (x_BTGs - mean).square_().mean(-1)


def _step_statistics(x_B1Gs: Tensor, past_BG4: Tensor, position_B: Tensor) -> _Statistics:
    """Welford's update for one token. The reference is the past mean, 0 in a fresh row."""
    before = position_B.double().view(-1, 1, 1)
    past = past_BG4.double().reshape(-1, 1, past_BG4.shape[1], 2, 2).sum(-1)
    past_mean, past_var = past.masked_fill(before.unsqueeze(-1) == 0, 0).unbind(-1)
    token_var, token_mean = torch.var_mean(x_B1Gs.double(), -1, correction=0)
    seen = before + 1
    delta = token_mean - past_mean
    var = torch.addcmul(token_var, before, past_var + delta * delta / seen) / seen
    return _Statistics(past_mean + delta / seen, var, past_mean, seen)


def _statistics(x_BTGs: Tensor, past_BG4: Tensor, position_B: Tensor) -> _Statistics:
    """In float64, for all tokens at once; see the module's docstring."""
    if x_BTGs.shape[1] == 1:
        return _step_statistics(x_BTGs, past_BG4, position_B)
    mean_BTG, var_BTG = _moments(x_BTGs.double())
    before_B11 = position_B.double().view(-1, 1, 1)
    fresh_B11 = before_B11 == 0
    past = past_BG4.double().unsqueeze(1)
    reference = torch.where(fresh_B11, mean_BTG[:, :1], past[..., 0] + past[..., 1])
    past_var = (past[..., 2] + past[..., 3]).masked_fill(fresh_B11, 0)
    before = before_B11 + torch.arange(x_BTGs.shape[1], device=x_BTGs.device).view(1, -1, 1)
    seen = before + 1
    mean = reference + (mean_BTG - reference).cumsum(1) / seen
    delta = mean_BTG - torch.cat([reference, mean[:, :-1]], 1)
    var = (before_B11 * past_var + (var_BTG + delta * delta * (before / seen)).cumsum(1)) / seen
    return _Statistics(mean, var, reference, seen)


def _split(values: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    high = values.to(dtype)
    return high, (values - high).to(dtype)


def _normalised(x_BTGs: Tensor, stats: _Statistics, eps: float) -> tuple[Tensor, Tensor]:
    """((x - mean) r, r) in the dtype of x."""
    inverse_std = (stats.var + eps).rsqrt().to(x_BTGs.dtype).unsqueeze(-1)
    return (x_BTGs - stats.mean.to(x_BTGs.dtype).unsqueeze(-1)) * inverse_std, inverse_std


@torch.library.custom_op("megalodon::timestep_norm", mutates_args=())
def timestep_norm(
    x: Tensor, past: Tensor, position: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """TimestepNorm of T more tokens.

    Args:
        x: [B, T, D], any floating dtype; T >= 1.
        past: [B, G, 4] state before the call, float32 (float64 in a float64 model).
        position: [B] int64, tokens consumed before the call. At 0 the row's past has no effect, NaN included.
        weight, bias: [D] of the dtype of `past`; the effective weight, one already added.
        eps: added to the variance.

    Returns:
        y [B, T, D] in the dtype of x, and the state after the call, [B, G, 4].
    """
    if found := kernels.kernels_for(x, past):
        return found.timestep_norm(x, past, position, weight, bias, eps)
    x_BTGs = _in_groups(x.to(past.dtype), past.shape[1])
    stats = _statistics(x_BTGs, past, position)
    normalised, _ = _normalised(x_BTGs, stats, eps)
    y = torch.addcmul(bias, normalised.flatten(2), weight)
    present = [*_split(stats.mean[:, -1], past.dtype), *_split(stats.var[:, -1], past.dtype)]
    return y.to(x.dtype), torch.stack(present, -1)


@timestep_norm.register_fake
def _timestep_norm_fake(
    x: Tensor, past: Tensor, position: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, memory_format=torch.contiguous_format), past.new_empty(past.shape)


def _sum_from_right(values_BTG: Tensor) -> Tensor:
    return values_BTG.flip(1).cumsum(1).flip(1)


@torch.library.custom_op("megalodon::timestep_norm_backward", mutates_args=())
def timestep_norm_backward(
    grad_y: Tensor, grad_present: Tensor, x: Tensor, past: Tensor, position: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, past, weight, bias, each of its tensor's shape and dtype; statistics are recomputed."""
    if found := kernels.kernels_for(x, past):
        grads = found.timestep_norm_backward(grad_y, grad_present, x, past, position, weight, eps)
        return grads[0], grads[1], grads[2], grads[3]
    x_BTGs = _in_groups(x.to(past.dtype), past.shape[1])
    stats = _statistics(x_BTGs, past, position)
    normalised, inverse_std = _normalised(x_BTGs, stats, eps)
    grad = grad_y.to(past.dtype)
    grad_weight, grad_bias = (grad * normalised.flatten(2)).sum((0, 1)), grad.sum((0, 1))

    grad_scaled = _in_groups(grad * weight, past.shape[1])
    inverse_std_BTG = inverse_std.squeeze(-1).double()
    grad_mean = -inverse_std_BTG * grad_scaled.sum(-1)
    grad_var = -0.5 * inverse_std_BTG.square() * (grad_scaled * normalised).sum(-1)
    grad_mean[:, -1] += grad_present[..., 0]
    grad_var[:, -1] += grad_present[..., 2]
    offset = stats.mean - stats.reference
    r1 = _sum_from_right(grad_mean / stats.seen)
    r2 = _sum_from_right(grad_var / stats.seen)
    r3 = _sum_from_right(grad_var * offset / stats.seen)

    # x - c = (x - mean) + (mean - c), and x - mean = normalised / r
    size = x_BTGs.shape[-1]
    constant = (r1 - 2 * r3 + 2 * r2 * offset) / size
    slope = 2 * r2 / (size * inverse_std_BTG)
    grad_x = torch.addcmul(constant.to(past.dtype).unsqueeze(-1), slope.to(past.dtype).unsqueeze(-1), normalised)
    grad_x.addcmul_(grad_scaled, inverse_std)
    before_B1 = position.double().view(-1, 1)
    past_mean, past_var = before_B1 * (r1 - 2 * r3)[:, 0], before_B1 * r2[:, 0]
    grad_past = torch.stack([past_mean, past_mean, past_var, past_var], -1).to(past.dtype)
    return grad_x.flatten(2).to(x.dtype), grad_past, grad_weight, grad_bias


@timestep_norm_backward.register_fake
def _timestep_norm_backward_fake(
    grad_y: Tensor, grad_present: Tensor, x: Tensor, past: Tensor, position: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    empty_D = weight.new_empty(weight.shape)
    return x.new_empty(x.shape), past.new_empty(past.shape), empty_D, torch.empty_like(empty_D)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, past, position, weight, _, eps = inputs
    ctx.save_for_backward(x, past, position, weight)
    ctx.eps = eps


def _backward(ctx, grad_y, grad_present):  # type: ignore[no-untyped-def]
    grad_x, grad_past, grad_weight, grad_bias = timestep_norm_backward(
        grad_y, grad_present, *ctx.saved_tensors, ctx.eps
    )
    return grad_x, grad_past, None, grad_weight, grad_bias, None


timestep_norm.register_autograd(_backward, setup_context=_setup_context)

for _device in ("cpu", "cuda"):  # under autocast the operator still computes in the dtype of its state
    timestep_norm.register_autocast(_device, torch.float32)
    timestep_norm_backward.register_autocast(_device, torch.float32)
