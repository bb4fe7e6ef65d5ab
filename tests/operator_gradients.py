"""Gradients of the two operators from autograd through the recurrences of the architecture page, in float64.

Token by token on plain tensors: no part of the package, so that a wrong formula there cannot hide here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray


def complex_ema_loop(
    x: Tensor, past: Tensor, position: Tensor, p: Tensor, q: Tensor, gamma: Tensor, omega: Tensor
) -> tuple[Tensor, Tensor]:
    """y [B, T, D] and the state [B, D, N, 2] after the last token; real arithmetic on both parts."""
    used = (position > 0).view(-1, 1, 1)
    re, im = (torch.where(used, past[..., part], 0) for part in (0, 1))
    outputs = []
    for t in range(x.shape[1]):
        u = x[:, t, :, None]
        re, im = q[..., 0] * re - q[..., 1] * im + p * u, q[..., 0] * im + q[..., 1] * re
        outputs.append((gamma[..., 0] * re - gamma[..., 1] * im).sum(-1) + omega * x[:, t])
    return torch.stack(outputs, 1), torch.stack([re, im], -1)


def timestep_norm_loop(
    x: Tensor, past: Tensor, position: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """y [B, T, D] and the state (mean, 0, var, 0) [B, G, 4] after the last token."""
    groups = past.shape[1]
    n = position.double().view(-1, 1)
    mean = torch.where(n > 0, past[..., 0] + past[..., 1], 0)
    var = torch.where(n > 0, past[..., 2] + past[..., 3], 0)
    outputs = []
    for t in range(x.shape[1]):
        token = x[:, t].unflatten(-1, (groups, -1))
        m = token.mean(-1)
        v = ((token - m[..., None]) ** 2).mean(-1)
        delta = m - mean
        mean = mean + delta / (n + 1)
        var = (n * var + v + delta**2 * n / (n + 1)) / (n + 1)
        n = n + 1
        outputs.append(((token - mean[..., None]) / (var[..., None] + eps).sqrt()).flatten(1) * weight + bias)
    zero = torch.zeros_like(mean)
    return torch.stack(outputs, 1), torch.stack([mean, zero, var, zero], -1)


def gradients_of(
    loop: Callable[..., tuple[Tensor, Tensor]], inputs: Sequence[Array], grads: Sequence[Array], *rest: float
) -> list[Array]:
    """Gradients of all floating-point inputs, float64, given those of both outputs."""
    leaves = [torch.from_numpy(array.copy()) for array in inputs]
    leaves = [leaf.double().requires_grad_() if leaf.is_floating_point() else leaf for leaf in leaves]
    outputs = loop(*leaves, *rest)
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    found = torch.autograd.grad(outputs, wanted, [torch.from_numpy(grad.astype(np.float64)) for grad in grads])
    return [grad.numpy() for grad in found]
