"""`verify --tokens 10M`: both operators and a small model over a long stream, against float64, with a verdict."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from megalodon_deploy.bundle import Bundle
from megalodon_deploy.export import load_bundle_model
from megalodon_deploy.verify.model_drift import model_drift
from megalodon_deploy.verify.not_run import NotRun
from megalodon_deploy.verify.operator_drift import Curve, cema_drift, norm_drift
from megalodon_deploy.verify.signals import GROUP_SIZE, SIGNALS
from megalodon_deploy.verify.tolerance import FLOAT32_AGREEMENT

NORM_LIMIT = 1e-6  # of statistics, relative to float64, at any length
GROWN_LIMIT_BYTES = 64 << 20  # of memory, over the last nine tenths of the stream
_STAGES = 3  # norm, moving average, model: each streams all tokens


@dataclass(frozen=True)
class Check:
    """One promise about long streams."""

    what: str
    value: float
    limit: float

    @property
    def passed(self) -> bool:
        return self.value <= self.limit  # false for NaN

    def describe(self) -> str:
        return f"long stream: {self.what}: {self.value:.2g}, limit {self.limit:.2g}"


@dataclass(frozen=True)
class LongStream:
    """What a long stream showed."""

    tokens: int
    model: str  # which small model
    curves: tuple[Curve, ...]
    resident_bytes: tuple[tuple[int, int], ...]

    @property
    def checks(self) -> tuple[Check, ...]:
        pairs = [curve for curve in self.curves if curve.state.startswith("pair")]
        norms = [curve for curve in pairs if "norm" in curve.what]
        (logits,) = (curve for curve in pairs if "logits" in curve.what)
        (cema,) = (curve for curve in self.curves if curve.what.startswith("moving") and curve.state == "float32")
        checks = (
            Check("norm statistics, state as it is kept", float(np.max([curve.worst for curve in norms])), NORM_LIMIT),
            Check("moving-average state, float32", cema.worst, FLOAT32_AGREEMENT),
            Check("logits of the small model", logits.worst, FLOAT32_AGREEMENT),
        )
        memory = Check("memory grown, MiB", self.grown_bytes / 2**20, GROWN_LIMIT_BYTES / 2**20)
        return (*checks, memory) if self.resident_bytes else checks

    @property
    def not_run(self) -> tuple[NotRun, ...]:
        return () if self.resident_bytes else (NotRun("memory over the long stream", "this system has no /proc"),)

    @property
    def grown_bytes(self) -> int:
        early = [size for position, size in self.resident_bytes if position >= self.tokens / 10]
        return max(early) - early[0] if early else 0

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    def table_rows(self) -> list[tuple[str, ...]]:
        """A row for each curve: error at the first and the last place, and the worst."""
        return [
            (curve.what, curve.state, *(f"{error:.1e}" for error in (curve.errors[0], curve.last, curve.worst)))
            for curve in self.curves
        ]

    def to_dict(self) -> dict[str, Any]:
        return {
            "tokens": self.tokens,
            "passed": self.passed,
            "model": self.model,
            "checks": [asdict(check) | {"passed": check.passed} for check in self.checks],
            "curves": [asdict(curve) for curve in self.curves],
            "resident_bytes": [list(item) for item in self.resident_bytes],
        }


def run_long_stream(bundle: Bundle, tokens: int, progress: Callable[[str, float], None] | None) -> LongStream:
    """See `megalodon_deploy.verify.verify_long_stream`."""
    done = 0

    def tick(who: str, num_tokens: int) -> None:
        nonlocal done
        if progress is not None:
            progress(f"{tokens:,} tokens, {who}", done / (_STAGES * tokens))
        done += num_tokens

    coefficients = _slowest_channels(bundle)
    with _one_thread():
        with torch.inference_mode():
            curves = norm_drift(tokens, tick) + cema_drift(coefficients, tokens, tick)
        model = model_drift(bundle, tokens, tick)
    return LongStream(tokens, model.model, (*curves, *model.curves), model.resident_bytes)


@contextmanager
def _one_thread() -> Iterator[None]:
    """PyTorch on one thread: calls this small are shorter than the meeting of two threads at their ends."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _slowest_channels(bundle: Bundle) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Coefficients p, q and gamma of the bundle's channels that forget last, as many as the signals have channels."""
    model = load_bundle_model(bundle)
    with torch.inference_mode():
        layers: list[Any] = list(model.layers)
        by_layer = [layer.mega.cema.coefficients() for layer in layers]
        p, q, gamma = (torch.cat(tensors) for tensors in zip(*by_layer, strict=True))
        order = torch.view_as_complex(q.contiguous()).abs().max(1).values.argsort(descending=True)
        count = len(SIGNALS) * GROUP_SIZE
        chosen = order.repeat(-(-count // len(order)))[:count]
        return p[chosen], q[chosen], gamma[chosen]
