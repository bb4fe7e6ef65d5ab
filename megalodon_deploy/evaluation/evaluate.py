"""Loss on documents, read as streams: perplexity, bits per byte, and loss against position.

Every token but a document's first is predicted from all that came before it in the document, however much that is,
or from as much as `context` allows: comparing the two tells what the context beyond is worth.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from megalodon_deploy.errors import UserError
from megalodon_deploy.evaluation.language_model import LanguageModel
from megalodon_deploy.train.config import DataConfig
from megalodon_deploy.train.data.sources import find_sources, read_documents

POSITION_EDGES = (0, 1 << 10, 1 << 12, 1 << 15, 1 << 18)  # 1K, 4K, 32K, 256K
_PART = 512  # tokens that are scored at a time


@dataclass(frozen=True)
class PositionLoss:
    """Mean loss of the tokens at positions begin <= position < end of their documents."""

    begin: int
    end: int | None  # None: no limit
    num_tokens: int
    loss: float  # nats per token


@dataclass(frozen=True)
class Evaluation:
    """What a model's predictions of some text are worth."""

    model: str
    num_documents: int
    num_tokens: int  # predicted
    num_bytes: int  # of text that those tokens stand for
    loss: float  # nats per token
    perplexity: float
    bits_per_byte: float
    positions: tuple[PositionLoss, ...]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def evaluate(
    model: LanguageModel,
    data: DataConfig,
    *,
    max_tokens: int | None = None,
    context: int | None = None,
    progress: Callable[[str, float], None] | None = None,
) -> Evaluation:
    """Score the documents of `data` (see `train.data.sources`; its tokenizer is not used, the model's is).

    Args:
        max_tokens: stop after so many tokens; a document may be cut. None: all.
        context: forget everything after so many tokens. None: never.

    Raises `UserError` when there is nothing to predict, and `TrainError` for text that cannot be read.
    """
    for what, given, least in (("context", context, 1), ("max tokens", max_tokens, 2)):
        if given is not None and given < least:
            raise UserError(f"{what} = {given}: at least {least} is needed to predict anything")
    report = progress or (lambda stage, fraction: None)
    losses, positions, num_documents, num_bytes, left = [], [], 0, 0.0, max_tokens or math.inf
    done = 0
    for text in _documents(data):
        tokens = model.tokenizer.encode(text)
        kept = tokens[: int(min(left, len(tokens)))]
        if len(kept) < 2:
            continue
        for part in score(model, kept, context):
            losses.append(part)
            done += len(part)
            report(f"loss {np.concatenate(losses[-100:]).mean():.3f}, {done:,} tokens", done / (max_tokens or math.inf))
        positions.append(np.arange(1, len(kept)))
        num_documents, left = num_documents + 1, left - len(kept)
        num_bytes += len(text.encode()) * (len(kept) - 1) / len(tokens)
        if left < 2:
            break
    if not losses:
        raise UserError("no document has two tokens; give other text")
    return _summary(model.name, np.concatenate(losses), np.concatenate(positions), num_documents, num_bytes)


def score(model: LanguageModel, tokens: Sequence[int], context: int | None = None) -> Iterator[np.ndarray]:
    """Losses in nats, float64, of tokens[1:] in order, part by part. Raises `UserError` for one that is not finite."""
    length = context or len(tokens)
    for begin in range(0, len(tokens) - 1, length):
        reader, end = model.open(), min(begin + length, len(tokens) - 1)
        for part in range(begin, end, _PART):
            inputs = tokens[part : min(part + _PART, end)]
            targets = np.asarray(tokens[part + 1 : part + 1 + len(inputs)])
            losses = token_losses(reader.read(inputs), targets)
            if not np.isfinite(losses).all():
                at = part + 1 + int(np.flatnonzero(~np.isfinite(losses))[0])
                raise UserError(f"{model.name}: the loss at position {at} is not a finite number")
            yield losses


def token_losses(logits_TV: np.ndarray, targets_T: np.ndarray) -> np.ndarray:
    """-log softmax(logits)[target] in float64, [T]."""
    wide = logits_TV.astype(np.float64)
    highest = wide.max(-1)
    log_sum = highest + np.log(np.exp(wide - highest[:, None]).sum(-1))
    losses: np.ndarray = log_sum - wide[np.arange(len(targets_T)), targets_T]
    return losses


def _documents(data: DataConfig) -> Iterator[str]:
    for source in find_sources(data):
        yield from read_documents(source, data)


def _summary(name: str, losses: np.ndarray, positions: np.ndarray, num_documents: int, num_bytes: float) -> Evaluation:
    edges = [*POSITION_EDGES, None]
    parts = []
    for begin, end in pairwise(edges):
        assert begin is not None, "Bug: only the last edge is open"
        inside = (positions >= begin) & (positions < (math.inf if end is None else end))
        if inside.any():
            parts.append(PositionLoss(begin, end, int(inside.sum()), float(losses[inside].mean())))
    loss = float(losses.mean())
    bits = float(losses.sum()) / math.log(2) / num_bytes
    return Evaluation(name, num_documents, len(losses), round(num_bytes), loss, math.exp(loss), bits, tuple(parts))


def draw_positions(evaluations: Sequence[Evaluation], target: Path) -> None:
    """Loss against position as a picture, of the format that the name tells."""
    from megalodon_deploy.train.log import pyplot_figure

    with pyplot_figure(target) as axes:
        for evaluation in evaluations:
            begins = [max(part.begin, 1) for part in evaluation.positions]
            axes.plot(begins, [part.loss for part in evaluation.positions], "o-", label=evaluation.model)
        axes.set(xlabel="position in the document", ylabel="nats per token", xscale="log")
