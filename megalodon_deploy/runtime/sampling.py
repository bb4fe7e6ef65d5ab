"""Choosing the next token from logits: the filters, and a random generator that fits in two integers.

The order is: repetition penalty, temperature, top-k, top-p, min-p, draw. Filters look at the distribution that the
filter before them left. Equal logits are taken in token order, so that a choice never depends on a sort algorithm.
V: vocabulary size.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from megalodon_deploy.errors import StateError, UserError

HISTORY_TOKENS = 1024  # how many of a stream's last tokens are kept, and so the longest repetition window

_WORD = (1 << 64) - 1
_GOLDEN_GAMMA = 0x9E3779B97F4A7C15


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to choose a token. Raises `UserError` for a value out of range."""

    temperature: float = 1.0  # 0: always the most probable token
    top_k: int | None = None  # keep the k most probable tokens
    top_p: float = 1.0  # keep the fewest most probable tokens that together have this probability
    min_p: float = 0.0  # keep tokens with at least this share of the most probable token's probability
    repetition_penalty: float = 1.0  # positive logits of recent tokens are divided by it, negative ones multiplied
    repetition_window: int = 256  # how many recent tokens, prompt included, the penalty looks at
    seed: int | None = None  # None: continue the stream's generator; a fresh stream takes a seed from the system

    def __post_init__(self) -> None:
        _check_number("temperature", self.temperature, lambda x: 0.0 <= x < math.inf, "0 or a positive number")
        _check_number("top_p", self.top_p, lambda x: 0.0 < x <= 1.0, "a number above 0 and at most 1")
        _check_number("min_p", self.min_p, lambda x: 0.0 <= x <= 1.0, "a number from 0 to 1")
        penalty = self.repetition_penalty
        _check_number("repetition_penalty", penalty, lambda x: 0.0 < x < math.inf, "a positive number")
        _check_integer("repetition_window", self.repetition_window, 0, HISTORY_TOKENS)
        if self.top_k is not None:
            _check_integer("top_k", self.top_k, 1, _WORD)
        if self.seed is not None:
            _check_integer("seed", self.seed, 0, _WORD)

    @classmethod
    def greedy(cls) -> SamplingParams:
        return cls(temperature=0.0)


@dataclass
class Generator:
    """A stream of uniform numbers, SplitMix64 in counter form: the whole state is the seed and the number of draws.

    Small enough for a saved stream, and a few lines in any language, so that every runtime draws the same numbers.
    """

    seed: int
    draws: int = 0

    def uniform(self) -> float:
        """The next number in [0, 1), a multiple of 2^-53."""
        self.draws += 1
        word = _mix(_mix(self.seed) + self.draws * _GOLDEN_GAMMA)
        return (word >> 11) * 2.0**-53

    @classmethod
    def from_system(cls) -> Generator:
        return cls(secrets.randbits(64))


@dataclass(frozen=True)
class Choice:
    """All that a choice depends on besides the logits."""

    params: SamplingParams
    recent: Sequence[int]  # the stream's last tokens, newest last
    generator: Generator  # advanced by one draw, unless the temperature is 0

    def of(self, logits_V: np.ndarray) -> int | None:
        """The next token, None when the largest logit is NaN or infinite."""
        try:
            return choose_token(logits_V, self.params, self.recent, self.generator)
        except StateError:
            return None


def choose_token(logits_V: np.ndarray, params: SamplingParams, recent: Sequence[int], generator: Generator) -> int:
    """The next token. `recent`: the stream's last tokens, newest last. Raises `StateError` when a logit is NaN or
    infinite upwards, or all are -inf."""
    scores_V = penalise(np.asarray(logits_V, np.float64), recent, params)
    best = int(np.argmax(scores_V))
    if not math.isfinite(scores_V[best]):
        raise StateError(f"the stream is broken: its largest logit is {scores_V[best]}; start or resume another stream")
    if params.temperature == 0.0:
        return best
    tokens, probabilities = distribution(scores_V, params)
    cumulative = np.cumsum(probabilities)
    index = int(np.searchsorted(cumulative, generator.uniform() * cumulative[-1], side="right"))
    return int(tokens[min(index, len(tokens) - 1)])


def penalised_tokens(recent: Sequence[int], params: SamplingParams) -> np.ndarray:
    """The distinct tokens of the window, int64, to which the repetition penalty applies; none without a penalty."""
    window = recent[len(recent) - min(params.repetition_window, len(recent)) :]
    if params.repetition_penalty == 1.0 or not window:
        return np.zeros(0, np.int64)
    return np.unique(np.asarray(window, np.int64))


def penalise(scores_V: np.ndarray, recent: Sequence[int], params: SamplingParams) -> np.ndarray:
    """Scores with the repetition penalty applied once to every distinct token of the window."""
    seen = penalised_tokens(recent, params)
    if not len(seen):
        return scores_V
    penalised_V = scores_V.copy()
    values = scores_V[seen]
    penalised_V[seen] = np.where(values > 0, values / params.repetition_penalty, values * params.repetition_penalty)
    return penalised_V


def distribution(scores_V: np.ndarray, params: SamplingParams) -> tuple[np.ndarray, np.ndarray]:
    """Tokens that may be drawn, in token order, and their float64 probabilities. For temperatures above 0."""
    weights = np.exp((scores_V - scores_V.max()) / params.temperature)  # the most probable token has weight 1
    tokens = np.arange(len(weights))
    if params.top_k is not None and params.top_k < len(weights):
        tokens = _top_k(weights, params.top_k)
    if params.top_p < 1.0:
        tokens = _top_p(weights, tokens, params.top_p)
    if params.min_p > 0.0:
        tokens = tokens[weights[tokens] >= params.min_p]
    kept = weights[tokens]
    return tokens, kept / kept.sum()


def _top_k(weights: np.ndarray, k: int) -> np.ndarray:
    """The k heaviest tokens in token order; of equal ones at the border the first."""
    border = np.partition(weights, len(weights) - k)[len(weights) - k]
    above = np.flatnonzero(weights > border)
    at_border = np.flatnonzero(weights == border)[: k - len(above)]
    return np.sort(np.concatenate([above, at_border]))


def _top_p(weights: np.ndarray, tokens: np.ndarray, top_p: float) -> np.ndarray:
    """The fewest of `tokens` whose weights reach the share `top_p`, in token order."""
    total = weights[tokens].sum()
    # All tokens below the mean of the excess mass together have less than the excess: no need to sort those.
    candidates = tokens[weights[tokens] >= (1.0 - top_p) * total / len(tokens)]
    order = candidates[np.argsort(-weights[candidates], kind="stable")]
    count = int(np.searchsorted(np.cumsum(weights[order]), top_p * total, side="left")) + 1
    return np.sort(order[:count])


def _mix(word: int) -> int:
    """The output function of SplitMix64 (Steele, Lea, Flood 2014), modulo 2^64."""
    word &= _WORD
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & _WORD
    return word ^ (word >> 31)


def _check_number(name: str, value: object, is_valid: Callable[[float], bool], expected: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not is_valid(value):
        raise UserError(f"sampling: {name} = {value!r} is not {expected}")


def _check_integer(name: str, value: object, least: int, most: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise UserError(f"sampling: {name} = {value!r} is not an integer from {least} to {most}")
