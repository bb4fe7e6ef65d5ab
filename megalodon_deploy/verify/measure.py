"""How far two arrays of one kind are apart, and what their difference says about its cause."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from megalodon_deploy.state import MEAN_LO, ROW_AXIS, VAR_LO, unpack_norm
from megalodon_deploy.verify.finding import Finding
from megalodon_deploy.verify.schedule import Call
from megalodon_deploy.verify.tolerance import ROW_KINDS, SCALE_FLOOR

_ALIKE = 0.7  # cosine of two heads that hold the same thing; of unrelated ones it is near 0


@dataclass(frozen=True)
class Measured:
    """Two arrays of one kind, and the size that an error is held against; rows of the batch come first."""

    kind: str
    expected: np.ndarray
    found: np.ndarray
    scale: np.ndarray  # broadcasts against them
    hint: str = ""  # what would explain a miss

    def finding(self, blank: Finding, tolerance_B: np.ndarray, call: Call) -> Finding:
        """The worst element: the one with the largest share of its tolerance."""
        absolute = np.abs(self.found - self.expected)
        error = absolute / self.scale
        tolerance = np.broadcast_to(tolerance_B.reshape(-1, *[1] * (error.ndim - 1)), error.shape)
        index = np.unravel_index(int(np.argmax(error / tolerance)), error.shape)
        relative_B = self._relative(absolute, error)
        worst_B = np.maximum(error.reshape(len(error), -1).max(1, initial=0.0), relative_B)
        missed = np.flatnonzero(~(worst_B <= tolerance_B))
        worst_row = int(np.argmax(relative_B / tolerance_B))
        return replace(
            blank,
            kind=self.kind,
            missed_rows=tuple(missed.tolist()),
            hint=self._explain() if missed.size else "",
            error=float(error[index]),
            relative_error=float(relative_B[worst_row] / tolerance_B[worst_row] * tolerance[index]),
            tolerance=float(tolerance[index]),
            absolute_error=float(absolute[index]),
            expected=float(self.expected[index]),
            found=float(self.found[index]),
            index=tuple(int(axis) for axis in index),
            position=_token_position(self.kind, index, error.shape, call),
        )

    def _relative(self, absolute: np.ndarray, error: np.ndarray) -> np.ndarray:
        """[B], root mean square of the errors over that of the numbers; a norm's numbers have scales of their own."""
        if self.kind.startswith("norm"):
            return _rms(error)
        relative_B: np.ndarray = _rms(absolute) / np.maximum(_rms(self.expected), SCALE_FLOOR)
        return relative_B

    def _explain(self) -> str:
        return _swapped_heads(self.expected, self.found) if self.kind in ("key", "value") else self.hint


def measure(kind: str, expected: np.ndarray, found: np.ndarray, eps: float) -> Iterator[Measured]:
    """What to compare of two tensors of a kind of the state table, or of logits."""
    if kind == "norm":
        (mean, var), (found_mean, found_var) = unpack_norm(expected), unpack_norm(found)
        rms = np.sqrt(mean**2 + var + eps)
        hint = "" if found[..., [MEAN_LO, VAR_LO]].any() else "the low halves are all zero"
        yield Measured("norm mean", mean, found_mean, rms, hint)
        yield Measured("norm var", var, found_var, rms * np.sqrt(var + eps), hint)
        return
    # float32 is enough here: the difference of two close float32 numbers is exact
    expected, found = expected.astype(np.float32, copy=False), found.astype(np.float32, copy=False)
    scale = np.abs(expected).max(axis=tuple(range(1, expected.ndim)), keepdims=True)
    yield Measured(kind, expected, found, np.maximum(scale, SCALE_FLOOR))


def _rms(values: np.ndarray) -> np.ndarray:
    """[B], over all that a row of the batch has."""
    flat = values.reshape(len(values), -1).astype(np.float64)
    rms_B: np.ndarray = np.sqrt(np.mean(flat**2, axis=1))
    return rms_B


def _token_position(kind: str, index: tuple[np.intp, ...], shape: tuple[int, ...], call: Call) -> int:
    """Which token of its stream the element belongs to; a recurrent tensor belongs to the last one of the call."""
    token = call.num_tokens - 1
    if kind == "logits":
        token += int(index[1]) - (shape[1] - 1)
    elif kind in ROW_KINDS:
        token = int(index[ROW_AXIS])
    elif kind == "activation":  # [B, T, .], or [B, H, T, .]
        token = int(index[-2])
    return call.positions[int(index[0])] + token


def _swapped_heads(expected_BHTd: np.ndarray, found_BHTd: np.ndarray) -> str:
    """Says so when each head holds what another one should."""
    expected, found = (
        np.moveaxis(rows, 1, 0).reshape(rows.shape[1], -1).astype(np.float64) for rows in (expected_BHTd, found_BHTd)
    )
    sizes = np.linalg.norm(found, axis=1)[:, None] * np.linalg.norm(expected, axis=1)
    cosines = found @ expected.T / np.maximum(sizes, SCALE_FLOOR)
    matches = cosines.argmax(1)
    num_heads = len(matches)
    is_other_order = sorted(matches) == list(range(num_heads)) and (matches != np.arange(num_heads)).any()
    if not is_other_order or cosines[np.arange(num_heads), matches].min() < _ALIKE:
        return ""
    head = int(np.flatnonzero(matches != np.arange(num_heads))[0])
    return f"heads are swapped: head {head} holds what head {matches[head]} should"
