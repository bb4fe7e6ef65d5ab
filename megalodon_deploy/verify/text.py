"""What an error of logits means for text: agreement of executors over a text that a user knows.

PyTorch in float32 reads a text, and so does what is compared. At every token both have a distribution of the next one:
their divergence, in nats, and how often the most probable token is the same. Then both go on by themselves, always
with the most probable token, until they part.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from megalodon_deploy.bundle import Bundle
from megalodon_deploy.errors import UserError
from megalodon_deploy.model.megalodon import Megalodon, ModelState
from megalodon_deploy.parameters import num_parameters
from megalodon_deploy.runtime.session import Session
from megalodon_deploy.runtime.stream import Stream
from megalodon_deploy.tokenizers import open_tokenizer

TEXT_TOKENS = 256
CONTINUATION_TOKENS = 48
_FLOP = 2e11  # bounds what larger models read: 10 to 20 s on two cores
_CHARACTERS_PER_TOKEN = 16  # at most, as far as is worth reading


@dataclass(frozen=True, kw_only=True)
class TextAgreement:
    """One executor against PyTorch over one text; divergences and losses in nats per token."""

    candidate: str
    text: str  # where it came from
    num_tokens: int
    mean_divergence: float
    largest_divergence: float
    same_choice: float  # share of tokens after which both would choose the same
    loss: float  # of the text, by what is compared
    reference_loss: float
    continued: int  # tokens that both went on by themselves
    agreed: int  # of these, until they part
    lead: float | None  # there, of PyTorch's choice over its second, in logits; None where they never part

    @property
    def is_finite(self) -> bool:
        return bool(np.isfinite([self.mean_divergence, self.largest_divergence, self.loss, self.reference_loss]).all())

    def describe(self) -> str:
        """One line for a person."""
        parted = ""
        if self.lead is not None:
            parted = f", where PyTorch's choice led by {self.lead:.2g}"
        return (
            f"{self.candidate} on {self.num_tokens} tokens of {self.text}: divergence {self.mean_divergence:.1e} nats "
            f"a token (worst {self.largest_divergence:.1e}), the same choice after {self.same_choice:.1%}, loss "
            f"{self.loss:.5f} instead of {self.reference_loss:.5f}; alone, {self.agreed} of {self.continued} tokens "
            f"the same{parted}"
        )


@dataclass(frozen=True)
class TextReading:
    """A text as the reference reads it, and how it goes on."""

    text: str
    tokens: tuple[int, ...]  # what is read, and one more
    logits: np.ndarray  # [T, V], after each but the last
    continuation: tuple[int, ...]
    continuation_logits: np.ndarray  # [T, V], from which each was chosen


def default_text() -> Path:
    """A text that every machine has: a module of Python's standard library, with prose and code in it."""
    return Path(argparse.__file__)


def read_text(bundle: Bundle, model: Megalodon, path: Path) -> TextReading:
    """Read the beginning of `path` with the reference.

    Raises `UserError` when it cannot be read as UTF-8, is too short or needs tokens that the model does not have.
    """
    limit = max(2, min(TEXT_TOKENS, int(_FLOP / (2 * num_parameters(bundle.config)))))
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(limit * _CHARACTERS_PER_TOKEN)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as UTF-8 text ({error}); name another file with --text") from error
    tokens = open_tokenizer(bundle).encode(text)[: limit + 1]
    if len(tokens) < 2:
        raise UserError(f"{path} holds {len(tokens)} tokens, two are needed; name another file with --text")
    if max(tokens) >= bundle.config.vocab_size:
        raise UserError(f"{path}: token {max(tokens)} is outside the model's vocabulary of {bundle.config.vocab_size}")
    with torch.inference_mode():
        logits_1TV, state = model(torch.tensor([tokens[:-1]]), model.initial_state(1))
        chosen, logits = _continue(model, state, logits_1TV[0, -1].numpy(), min(CONTINUATION_TOKENS, limit))
    return TextReading(str(path), tuple(tokens), logits_1TV[0].numpy(), chosen, logits)


def _continue(
    model: Megalodon, state: ModelState, logits_V: np.ndarray, count: int
) -> tuple[tuple[int, ...], np.ndarray]:
    """The most probable token `count` times."""
    chosen, seen = [], []
    for _ in range(count):
        seen.append(logits_V)
        chosen.append(int(logits_V.argmax()))
        logits_11V, state = model(torch.tensor([[chosen[-1]]]), state)
        logits_V = logits_11V[0, -1].numpy()
    return tuple(chosen), np.stack(seen)


def compare_text(session: Session, reading: TextReading, candidate: str) -> TextAgreement:
    """Read the same text with a session, token by token, and go on from there."""
    stream = session.stream()
    logits_TV = np.stack([stream.step(token) for token in reading.tokens[:-1]])
    agreed = _agreed(stream, logits_TV[-1], reading.continuation)
    divergence_T = divergences(reading.logits, logits_TV)
    following = np.array(reading.tokens[1:])
    return TextAgreement(
        candidate=candidate,
        text=reading.text,
        num_tokens=len(following),
        mean_divergence=float(divergence_T.mean()),
        largest_divergence=float(divergence_T.max()),
        same_choice=float((reading.logits.argmax(1) == logits_TV.argmax(1)).mean()),
        loss=_loss(logits_TV, following),
        reference_loss=_loss(reading.logits, following),
        continued=len(reading.continuation),
        agreed=agreed,
        lead=None if agreed == len(reading.continuation) else _lead(reading.continuation_logits[agreed]),
    )


def _agreed(stream: Stream, logits_V: np.ndarray, continuation: Sequence[int]) -> int:
    for count, token in enumerate(continuation):
        if int(logits_V.argmax()) != token:
            return count
        logits_V = stream.step(token)
    return len(continuation)


def divergences(reference_TV: np.ndarray, found_TV: np.ndarray) -> np.ndarray:
    """Kullback-Leibler divergence of `found` from `reference` at every token, [T] float64, nats."""
    reference, found = _log_probabilities(reference_TV), _log_probabilities(found_TV)
    divergence_T: np.ndarray = (np.exp(reference) * (reference - found)).sum(1)
    return divergence_T


def _log_probabilities(logits_TV: np.ndarray) -> np.ndarray:
    shifted = logits_TV.astype(np.float64) - logits_TV.max(1, keepdims=True)
    logs: np.ndarray = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    return logs


def _loss(logits_TV: np.ndarray, following_T: np.ndarray) -> float:
    return float(-_log_probabilities(logits_TV)[np.arange(len(following_T)), following_T].mean())


def _lead(logits_V: np.ndarray) -> float:
    second, first = np.sort(logits_V)[-2:]
    return float(first - second)
