"""Both operators over millions of tokens, against float64: how far the state drifts, by the precision it is kept in.

Norms, each over the four signals of `signals` (mean and variance of all tokens so far):

- "pair, in calls" and "pair, token by token": what this package keeps, two float32 for each number;
- "float32, in calls" and "float32, token by token": one float32 for each number, as is usual.

The reference sums in the widest float of the machine, shifted to each group's first mean. CEMA, over the same signals:
the float32 state that this package keeps, and half precision. A moving average forgets, so its error does not grow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from megalodon_deploy.model.operators import complex_ema, timestep_norm
from megalodon_deploy.state import pack_norm, unpack_norm
from megalodon_deploy.verify.signals import GROUP_SIZE, SIGNALS, checkpoints, signal

CALL_TOKENS = 4096
_EPS = 1e-5
Tick = Callable[[str, int], None]  # told who computes and how many tokens
Moments = tuple[np.ndarray, np.ndarray]  # of mean and variance, [G] or [T, G], float64


@dataclass(frozen=True)
class Curve:
    """Error against position of one thing kept in one way."""

    what: str  # "norm mean, drifting"
    state: str  # "float32, token by token"
    positions: tuple[int, ...]
    errors: tuple[float, ...]

    @property
    def last(self) -> float:
        return self.errors[-1]

    @property
    def worst(self) -> float:
        return float(np.max(self.errors))  # NaN if one is


class ExactMoments:
    """Mean and variance of all tokens so far, from sums in the widest float there is."""

    def __init__(self) -> None:
        self._count = 0
        self._shift_G: Any = 0  # until the first token
        self._sums = [np.zeros(len(SIGNALS), np.longdouble) for _ in range(3)]

    def add(self, means_TG: np.ndarray, vars_TG: np.ndarray) -> None:
        if self._count == 0:
            self._shift_G = means_TG[0].astype(np.longdouble)
        shifted_TG = means_TG.astype(np.longdouble) - self._shift_G
        for total, values_TG in zip(
            self._sums, (shifted_TG, shifted_TG**2, vars_TG.astype(np.longdouble)), strict=True
        ):
            total += values_TG.sum(0)
        self._count += len(means_TG)

    def moments(self) -> Moments:
        mean, square, var = (total / self._count for total in self._sums)
        return (self._shift_G + mean).astype(np.float64), (var + square - mean**2).astype(np.float64)


class StepwiseMoments:
    """Welford's update a token at a time, state kept as plain float32 or as pairs; letters as in the norm operator."""

    def __init__(self, *, is_pair: bool) -> None:
        self._is_pair = is_pair
        self._dtype: Any = np.float64 if is_pair else np.float32
        self._mean = np.zeros(len(SIGNALS), self._dtype)
        self._var = np.zeros(len(SIGNALS), self._dtype)

    def add(self, position: int, means_TG: np.ndarray, vars_TG: np.ndarray) -> None:
        means_TG, vars_TG = means_TG.astype(self._dtype), vars_TG.astype(self._dtype)
        mean, var = self._mean, self._var
        for index in range(len(means_TG)):
            count = self._dtype(position + index)
            following = self._dtype(position + index + 1)
            delta = means_TG[index] - mean
            step = delta / following
            mean = mean + step
            var = (count * var + vars_TG[index] + delta * step * count) / following
            if self._is_pair:
                mean, var = _as_pair(mean), _as_pair(var)
        self._mean, self._var = mean, var

    def moments(self) -> Moments:
        return self._mean.astype(np.float64), self._var.astype(np.float64)


def _as_pair(values: np.ndarray) -> np.ndarray:
    """A float64 number as the sum of two float32."""
    high = values.astype(np.float32)
    rounded: np.ndarray = high + (values - high).astype(np.float32).astype(np.float64)
    return rounded


class CallMoments:
    """The norm operator in calls of many tokens; `keeps_low` False drops the low halves between calls."""

    def __init__(self, *, keeps_low: bool) -> None:
        self._keeps_low = keeps_low
        self._state = torch.from_numpy(pack_norm(np.zeros((1, len(SIGNALS))), np.ones((1, len(SIGNALS)))))
        self._ones = torch.ones(len(SIGNALS) * GROUP_SIZE)

    def add(self, position: int, x_TD: np.ndarray) -> None:
        x_1TD, position_1 = torch.from_numpy(x_TD)[None], torch.tensor([position])
        _, self._state = timestep_norm(x_1TD, self._state, position_1, self._ones, 0 * self._ones, _EPS)
        if not self._keeps_low:
            self._state[..., 1::2] = 0

    def moments(self) -> Moments:
        mean, var = unpack_norm(self._state[0].numpy())
        return mean, var


def norm_drift(total: int, tick: Tick, seed: int = 0) -> list[Curve]:
    """Errors of mean and variance, relative to sqrt(mean^2 + var) and to the variance, for every way to keep them."""
    exact = ExactMoments()
    stepwise = {
        "pair, token by token": StepwiseMoments(is_pair=True),
        "float32, token by token": StepwiseMoments(is_pair=False),
    }
    in_calls = {"pair, in calls": CallMoments(keeps_low=True), "float32, in calls": CallMoments(keeps_low=False)}
    errors: dict[tuple[str, str], list[float]] = {}
    places = checkpoints(total, CALL_TOKENS)
    for position, x_TD in _calls(total, seed):
        tick("norm", len(x_TD))
        x_TGs = x_TD.reshape(len(x_TD), len(SIGNALS), GROUP_SIZE).astype(np.float64)
        means_TG, vars_TG = x_TGs.mean(2), x_TGs.var(2)
        exact.add(means_TG, vars_TG)
        for steps in stepwise.values():
            steps.add(position, means_TG, vars_TG)
        for calls in in_calls.values():
            calls.add(position, x_TD)
        if position + len(x_TD) in places:
            _note(errors, exact.moments(), {name: it.moments() for name, it in (stepwise | in_calls).items()})
    return [Curve(what, state, tuple(places), tuple(values)) for (what, state), values in errors.items()]


def _note(errors: dict[tuple[str, str], list[float]], exact: Moments, found: Mapping[str, Moments]) -> None:
    mean_G, var_G = exact
    scale_G = np.sqrt(mean_G**2 + var_G)
    for state, (found_mean_G, found_var_G) in found.items():
        for group, name in enumerate(SIGNALS):
            mean_error = abs(found_mean_G[group] - mean_G[group]) / scale_G[group]
            var_error = abs(found_var_G[group] - var_G[group]) / var_G[group]
            errors.setdefault((f"norm mean, {name}", state), []).append(float(mean_error))
            errors.setdefault((f"norm var, {name}", state), []).append(float(var_error))


def cema_drift(
    coefficients: tuple[torch.Tensor, torch.Tensor, torch.Tensor], total: int, tick: Tick, seed: int = 0
) -> list[Curve]:
    """Largest error of the state over its largest magnitude, by the type it is kept in between calls.

    `coefficients`: p [D, N], q [D, N, 2] and gamma [D, N, 2] float32 of as many channels as the signals have.
    """
    kept = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    omega_D = torch.zeros(len(SIGNALS) * GROUP_SIZE)
    exact = torch.zeros(1, *coefficients[1].shape, dtype=torch.float64)
    states = {name: exact.float() for name in kept}
    errors: dict[str, list[float]] = {name: [] for name in kept}
    wide = [tensor.double() for tensor in coefficients]
    places = checkpoints(total, CALL_TOKENS)
    for position, x_TD in _calls(total, seed):
        tick("moving average", len(x_TD))
        x_1TD, position_1 = torch.from_numpy(x_TD)[None], torch.tensor([position])
        _, exact = complex_ema(x_1TD.double(), exact, position_1, *wide, omega_D.double())
        for name, dtype in kept.items():
            _, present = complex_ema(x_1TD, states[name], position_1, *coefficients, omega_D)
            states[name] = present.to(dtype).float()
            if position + len(x_TD) in places:
                errors[name].append(float((states[name] - exact).abs().max() / exact.abs().max()))
    return [Curve("moving-average state", name, tuple(places), tuple(values)) for name, values in errors.items()]


def _calls(total: int, seed: int) -> Iterator[tuple[int, np.ndarray]]:
    for position in range(0, total, CALL_TOKENS):
        yield position, signal(position, min(CALL_TOKENS, total - position), total, seed)
