"""From chosen tokens to text, until a reason to stop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from megalodon_deploy.errors import UserError
from megalodon_deploy.runtime.sampling import SamplingParams
from megalodon_deploy.runtime.stop_strings import StopStrings
from megalodon_deploy.tokenizers import Detokenizer

if TYPE_CHECKING:
    from megalodon_deploy.runtime.session import Session

Finish = Literal["length", "stop_token", "stop_string"]


@dataclass(frozen=True)
class GeneratedToken:
    """One generated token, and the text that it completes."""

    token: int
    text: str  # whole characters only; "" while one is unfinished or may begin a stop string
    finish: Finish | None = None  # why generation ends with this token


class Generation:
    """One run of generation on a stream, with the arguments of `Stream.generate`. Raises `UserError` for a value that
    makes no sense."""

    def __init__(
        self,
        session: Session,
        *,
        max_new_tokens: int | None,
        sampling: SamplingParams | None,
        stop_tokens: Sequence[int] | None,
        stop_strings: Sequence[str],
    ) -> None:
        if max_new_tokens is not None and max_new_tokens < 1:
            raise UserError(f"max_new_tokens = {max_new_tokens} is not a positive integer")
        self.sampling = sampling or SamplingParams.greedy()
        self._tokenizer = session.tokenizer
        self._left = max_new_tokens
        default_stops = session.bundle.manifest.tokenizer.stop_tokens
        self._stop_tokens = frozenset(default_stops if stop_tokens is None else stop_tokens)
        self._stops = StopStrings(stop_strings)
        self._detokenizer: Detokenizer | None = None

    def begin(self, history: Sequence[int]) -> None:
        """`history`: the stream's last tokens before the first that is generated, oldest first."""
        self._detokenizer = self._tokenizer.detokenizer(history)

    def push(self, token: int) -> GeneratedToken:
        """Take the token that was chosen."""
        assert self._detokenizer is not None, "Bug: the generation has not begun"
        if self._left is not None:
            self._left -= 1
        if token in self._stop_tokens:
            return GeneratedToken(token, self._stops.flush(), "stop_token")
        text, is_stopped = self._stops.push(self._detokenizer.push(token))
        if is_stopped:
            return GeneratedToken(token, text, "stop_string")
        if self._left == 0:
            return GeneratedToken(token, text + self._stops.flush(), "length")
        return GeneratedToken(token, text)
