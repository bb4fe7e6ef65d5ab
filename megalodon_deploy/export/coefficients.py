"""The moving average's coefficients: from alpha, delta, theta, gamma to p, powers of q, gamma/sqrt(N), and back.

p = a = sigmoid(alpha),  q = (1 - a sigmoid(delta)) exp(i n phase),  phase = 2 pi sigmoid(theta) / N,  n = 1..N
"""

from __future__ import annotations

import math

import numpy as np

_SMALLEST = 1e-30  # keeps logarithms finite where a coefficient has rounded to 0


def fold_cema(
    alpha: np.ndarray, delta: np.ndarray, theta: np.ndarray, gamma: np.ndarray, omega: np.ndarray, *, levels: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """alpha, delta [D, N, 1], theta [D, 1, 1], gamma [D, N, 2], omega [D, 1] -> what `ComplexEMA` reads, float32.

    Returns p [D, N], q_powers [levels, D, N, 2], gamma / sqrt(N) [D, N, 2], omega [D]. q is rounded to float32 first
    and every power is one of the rounded q, so that a step and a block use the same number.
    """
    a, d = _sigmoid(alpha[..., 0]), _sigmoid(delta[..., 0])
    modes = a.shape[1]
    phase = _sigmoid(theta[..., 0]) * (2 * math.pi / modes) * np.arange(1, modes + 1)
    q = _to_complex(_to_pairs((1 - a * d) * np.exp(1j * phase)))
    powers = []
    for _ in range(levels):
        powers.append(_to_pairs(q))
        q = q * q
    scaled = (gamma.astype(np.float64) / math.sqrt(modes)).astype(np.float32)
    return a.astype(np.float32), np.stack(powers), scaled, omega.astype(np.float32).reshape(-1)


def unfold_cema(
    p: np.ndarray, q_powers: np.ndarray, gamma: np.ndarray, omega: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The inverse: alpha, delta [D, N, 1], theta [D, 1, 1], gamma [D, N, 2], omega [D, 1], float32."""
    q, modes = _to_complex(q_powers[0]), p.shape[1]
    a = p.astype(np.float64)
    d = np.clip((1 - np.abs(q)) / np.maximum(a, _SMALLEST), _SMALLEST, 1 - 2**-53)
    theta = _logit(_base_phase(q) * modes / (2 * math.pi))
    values = (_logit(a)[..., None], _logit(d)[..., None], theta[:, None, None], gamma * math.sqrt(modes))
    alpha, delta, theta_D11, gamma_DN2 = (value.astype(np.float32) for value in values)
    return alpha, delta, theta_D11, gamma_DN2, omega.reshape(-1, 1)


def _base_phase(q_DN: np.ndarray) -> np.ndarray:
    """Phase of mode 1 [D] from the ratios of neighbouring modes, weighted by how well their sizes determine it."""
    first = q_DN[:, :1]
    ratios = np.concatenate([first * np.abs(first), q_DN[:, 1:] * q_DN[:, :-1].conj()], axis=1)
    coarse = np.angle(ratios.sum(axis=1))
    # Up to 2 pi / N: a little below 0 is a rounded 0 unless there is one mode only.
    coarse += np.where(coarse < (0 if q_DN.shape[1] == 1 else -math.pi / 2), 2 * math.pi, 0)
    # Mode n has n times the phase, up to whole turns, which the coarse value tells: the finest estimate of all.
    n = np.arange(1, q_DN.shape[1] + 1)
    expected = coarse[:, None] * n
    correction = np.angle(q_DN * np.exp(-1j * expected))
    weight = np.abs(q_DN) ** 2 * n**2
    refined: np.ndarray = coarse + (weight * correction / n).sum(axis=1) / np.maximum(weight.sum(axis=1), _SMALLEST)
    return refined


def _sigmoid(values: np.ndarray) -> np.ndarray:
    result: np.ndarray = 1 / (1 + np.exp(-values.astype(np.float64)))
    return result


def _logit(values: np.ndarray) -> np.ndarray:
    clipped = np.clip(values, _SMALLEST, 1 - 2**-53)
    result: np.ndarray = np.log(clipped) - np.log1p(-clipped)
    return result


def _to_pairs(values: np.ndarray) -> np.ndarray:
    """complex128 [...] -> float32 [..., 2]."""
    return np.stack([values.real, values.imag], axis=-1).astype(np.float32)


def _to_complex(pairs: np.ndarray) -> np.ndarray:
    """float32 [..., 2] -> complex128 [...]."""
    parts = pairs.astype(np.float64)
    values: np.ndarray = parts[..., 0] + 1j * parts[..., 1]
    return values
