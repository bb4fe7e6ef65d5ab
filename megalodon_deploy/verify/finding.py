"""One compared tensor of one call, and how to say so to a person."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

_WORDS = {
    "key": "keys of layer {}",
    "value": "values of layer {}",
    "key_scale": "scales of the keys of layer {}",
    "value_scale": "scales of the values of layer {}",
    "cema": "moving-average state of layer {}",
    "norm": "norm statistics of layer {}",
}

_INNER_WORDS = {  # of the graph's tensors within a layer
    "mega.timenorm": "normalised input",
    "mega.cema": "moving average",
    "mega.rmsnorm": "normalised moving average",
    "mega.rmsnorm_cast": "normalised moving average",
    "mega.wv_biased": "value projection",
    "mega.wz": "query and key projection",
    "mega.wh1": "projection past attention",
    "mega.wh2": "output projection of attention",
    "mega.wh2_unscaled": "output projection of attention",
    "mega.attention.query": "rotated queries",
    "mega.attention.context": "attention",
    "mega.gated": "gated attention",
    "mega.hop": "output of the attention part",
    "nffn.norm": "input of the feed-forward part",
    "nffn.norm_cast": "input of the feed-forward part",
    "nffn.fc1": "first feed-forward product",
    "nffn.hidden": "hidden units",
    "nffn.fc2": "second feed-forward product",
    "nffn.fc2_unscaled": "second feed-forward product",
    "nffn.out": "output",
}


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One tensor of one call, compared. Where `problem` is set, the numbers after it mean nothing.

    Two errors are held against one tolerance, and both must keep it: `error` at the worst element, over the largest
    magnitude of the reference, and `relative_error` of the whole tensor, norm over norm.
    """

    schedule: str
    call: int
    reference: str
    candidate: str
    tensor: str
    kind: str
    problem: str | None = None
    missed_rows: tuple[int, ...] = ()  # rows of the batch that are not right
    hint: str = ""  # what the two arrays say about the cause
    error: float = 0.0  # over the scale of the reference, at the worst element
    relative_error: float = 0.0  # of the worst row of the batch
    tolerance: float = 0.0
    absolute_error: float = 0.0
    expected: float = 0.0
    found: float = 0.0
    index: tuple[int, ...] = ()  # of the worst element
    position: int | None = None  # of the token in its stream to which that element belongs

    @property
    def passed(self) -> bool:
        return self.problem is None and self.error <= self.tolerance and self.relative_error <= self.tolerance

    @property
    def worst_error(self) -> float:
        """The larger of the two; NaN if one is."""
        return float(np.maximum(self.error, self.relative_error))

    @property
    def share(self) -> float:
        """Error over tolerance; infinite where nothing could be compared, or the error is NaN."""
        is_nothing = self.problem is not None or math.isnan(self.worst_error)
        return math.inf if is_nothing else self.worst_error / self.tolerance

    def __bool__(self) -> bool:
        return self.passed

    def describe(self) -> str:
        """One line for a person."""
        where = f"{in_words(self.tensor)} in call {self.call} of schedule {self.schedule}, {self.candidate}"
        if self.problem is not None:
            return f"{where}: {self.problem}"
        return (
            f"{where}: error {self.worst_error:.2g} against {self.reference}, "
            f"tolerance {self.tolerance:.2g}, at index {list(self.index)} (token {self.position}): "
            f"{self.found:.6g} instead of {self.expected:.6g}"
        )


def in_words(tensor: str) -> str:
    """`present_cema.1` -> `moving-average state of layer 1 (present_cema.1)`; other names as they are."""
    parts = tensor.split(".")
    if parts[0] == "layers":
        words = _INNER_WORDS.get(".".join(parts[2:]), "")
        return f"{words} of layer {parts[1]} ({tensor})" if words else tensor
    stem, _, layer = tensor.rpartition(".")
    kind = stem.removeprefix("new_").removeprefix("present_")
    if kind == stem or kind not in _WORDS:
        return tensor
    words = "statistics of the final norm" if layer == "final" else _WORDS[kind].format(layer)
    return f"{words} ({tensor})"
