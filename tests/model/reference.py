"""The architecture page in float64 numpy, token by token: what all implementations are measured against.

Nothing is imported from the package but the configuration. Every function loops over tokens and keeps its state in
plain variables, as the page writes it. Letters: B rows, T tokens, D channels, N modes, G groups, H heads, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from megalodon_deploy.config import MegalodonConfig

Array = np.ndarray
Weights = Mapping[str, Array]


def _sigmoid(x: Array) -> Array:
    return 1.0 / (1.0 + np.exp(-x))


def _silu(x: Array) -> Array:
    return x * _sigmoid(x)


def coefficients_reference(alpha: Array, delta: Array, theta: Array, gamma: Array) -> tuple[Array, Array, Array]:
    """Released parameters -> p [D, N] real, q [D, N] complex, gamma / sqrt(N) [D, N] complex."""
    num_modes = alpha.shape[1]
    a = _sigmoid(alpha[:, :, 0].astype(np.float64))
    d = _sigmoid(delta[:, :, 0].astype(np.float64))
    phase = _sigmoid(theta[:, :, 0].astype(np.float64)) * 2 * np.pi / num_modes * np.arange(1, num_modes + 1)
    mixed = gamma[..., 0].astype(np.float64) + 1j * gamma[..., 1].astype(np.float64)
    return a, (1 - a * d) * np.exp(1j * phase), mixed / np.sqrt(num_modes)


def complex_ema_reference(
    x: Array, past: Array, position: Array, p: Array, q: Array, gamma: Array, omega: Array
) -> tuple[Array, Array]:
    """The operator's inputs and outputs, any real dtype in, float64 out: (y [B, T, D], present [B, D, N, 2])."""
    x, past = x.astype(np.float64), past.astype(np.float64)
    factor = q[..., 0].astype(np.float64) + 1j * q[..., 1].astype(np.float64)
    mix = gamma[..., 0].astype(np.float64) + 1j * gamma[..., 1].astype(np.float64)
    y, present = np.empty_like(x), np.empty_like(past)
    for row in range(x.shape[0]):
        h = past[row, ..., 0] + 1j * past[row, ..., 1] if position[row] > 0 else np.zeros(factor.shape, complex)
        for t in range(x.shape[1]):
            u = x[row, t]
            h = factor * h + p * u[:, None]
            y[row, t] = (h * mix).sum(-1).real + omega * u
        present[row] = np.stack([h.real, h.imag], -1)
    return y, present


def timestep_norm_reference(
    x: Array, past: Array, position: Array, weight: Array, bias: Array, eps: float = 1e-5
) -> tuple[Array, Array]:
    """The operator's inputs and outputs; the present state comes as float64 (mean, 0, var, 0), [B, G, 4]."""
    x, past = x.astype(np.float64), past.astype(np.float64)
    num_groups = past.shape[1]
    y, present = np.empty_like(x), np.zeros_like(past)
    for row in range(x.shape[0]):
        n = int(position[row])
        mean = past[row, :, 0] + past[row, :, 1] if n else np.zeros(num_groups)
        var = past[row, :, 2] + past[row, :, 3] if n else np.zeros(num_groups)
        for t in range(x.shape[1]):
            groups = x[row, t].reshape(num_groups, -1)
            m, v = groups.mean(-1), groups.var(-1)
            delta = m - mean
            mean = mean + delta / (n + 1)
            var = (n * var + v + delta**2 * n / (n + 1)) / (n + 1)
            n += 1
            y[row, t] = ((groups - mean[:, None]) / np.sqrt(var[:, None] + eps)).reshape(-1) * weight + bias
        present[row, :, 0], present[row, :, 2] = mean, var
    return y, present


def _rms_norm(x: Array, eps: float, weight: Array | None = None) -> Array:
    y = x / np.sqrt((x**2).mean(-1, keepdims=True) + eps)
    return y if weight is None else y * (weight + 1)


def _layer_norm(x: Array, eps: float, weight: Array | None, bias: Array | None) -> Array:
    y = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps)
    return y if weight is None or bias is None else y * (weight + 1) + bias


def _rotate(x: Array, position_in_chunk: int, base: float) -> Array:
    """x [H, dz]: adjacent pairs as complex numbers."""
    width = x.shape[-1]
    angle = position_in_chunk * base ** (-np.arange(0, width, 2) / width)
    turned = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * angle)
    return np.stack([turned.real, turned.imag], -1).reshape(x.shape)


def _attention(config: MegalodonConfig, z: Array, v: Array, gamma: Array, beta: Array) -> Array:
    """One row: z [T, Z] before its norm, v [T, E] -> [T, E]."""
    heads, dz = config.num_heads, config.key_head_dim
    keys: list[Array] = []
    values: list[Array] = []
    out = np.empty_like(v)
    for t in range(z.shape[0]):
        place = t % config.chunk_size
        if place == 0:
            keys, values = [], []
        normed = _rms_norm(z[t].reshape(heads, dz), config.norm_eps).reshape(-1)
        query, key = (normed * (gamma[i] + 1) / np.sqrt(dz) + beta[i] for i in range(2))
        query = _rotate(query.reshape(heads, dz), place, config.rope_base)
        keys.append(_rotate(key.reshape(heads, dz), place, config.rope_base))
        values.append(v[t].reshape(heads, -1))
        scores = np.einsum("hd,jhd->hj", query, np.stack(keys))
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        out[t] = np.einsum("hj,jhe->he", weights, np.stack(values)).reshape(-1)
    return out


def _fresh_norm(config: MegalodonConfig, x: Array, w: Weights, name: str) -> Array:
    past = np.full((x.shape[0], config.norm_num_groups, 4), np.nan)
    start = np.zeros(x.shape[0], np.int64)
    return timestep_norm_reference(x, past, start, w[f"{name}.weight"] + 1, w[f"{name}.bias"], config.norm_eps)[0]


def _fresh_cema(x: Array, w: Weights, name: str) -> Array:
    p, q, gamma = coefficients_reference(*(w[f"{name}.{part}"] for part in ("alpha", "delta", "theta", "gamma")))
    pairs = [np.stack([value.real, value.imag], -1) for value in (q, gamma)]
    past = np.full((x.shape[0], *pairs[0].shape), np.nan)
    return complex_ema_reference(x, past, np.zeros(x.shape[0], np.int64), p, *pairs, w[f"{name}.omega"][:, 0])[0]


def _block(config: MegalodonConfig, x: Array, w: Weights, prefix: str) -> Array:
    mega, nffn = f"{prefix}.mega", f"{prefix}.nffn"

    def linear(value: Array, name: str) -> Array:
        return value @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0.0)

    u = _fresh_norm(config, x, w, f"{mega}.timenorm")
    m = _rms_norm(_fresh_cema(u, w, f"{mega}.cema"), config.norm_eps, w.get(f"{mega}.rmsnorm.weight"))
    z, v = linear(m, f"{mega}.wz"), _silu(linear(u, f"{mega}.wv"))
    attended = np.stack(
        [_attention(config, *row, w[f"{mega}.gamma"], w[f"{mega}.beta"]) for row in zip(z, v, strict=True)]
    )
    gated = attended * _silu(linear(m, f"{mega}.wr"))
    y = x + linear(m, f"{mega}.wh1") + linear(gated, f"{mega}.wh2")
    n = _layer_norm(y, config.norm_eps, w.get(f"{nffn}.norm.weight"), w.get(f"{nffn}.norm.bias"))
    hidden = _silu(linear(n, f"{nffn}.fc1"))
    if config.swiglu:
        hidden = hidden * linear(n, f"{nffn}.fc3")
    return x + w.get(f"{nffn}.alpha", 1.0) * linear(hidden, f"{nffn}.fc2")


def reference_forward(config: MegalodonConfig, weights: Weights, tokens: Array) -> Array:
    """Logits [B, T, V] in float64 of fresh streams; `weights` by released name, any real dtype."""
    w = {name: value.astype(np.float64) for name, value in weights.items()}
    x = w["embed.weight"][tokens]
    if config.scale_emb:
        x = x * np.sqrt(config.model_dim)
    for layer in range(config.num_layers):
        x = _block(config, x, w, f"layers.{layer}")
    x = _fresh_norm(config, x, w, "output.final_norm")
    return x @ w["embed.weight" if config.share_emb else "output.output.weight"].T
