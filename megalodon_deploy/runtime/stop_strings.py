"""Stop strings in text that arrives in pieces: what may be the start of one is held back."""

from __future__ import annotations

from collections.abc import Sequence

from megalodon_deploy.errors import UserError


class StopStrings:
    """Finds the first of several strings in a text that arrives in pieces."""

    def __init__(self, strings: Sequence[str]) -> None:
        if isinstance(strings, str) or not all(isinstance(string, str) and string for string in strings):
            raise UserError(f"stop_strings = {strings!r} is not a list of non-empty strings")
        self._strings = tuple(strings)
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """Take more text; returns the text that is free to go out, and whether a stop string ended it there."""
        text = self._held + text
        found = [start for string in self._strings if (start := text.find(string)) >= 0]
        if found:
            self._held = ""
            return text[: min(found)], True
        free = len(text) - self._num_held(text)
        self._held = text[free:]
        return text[:free], False

    def flush(self) -> str:
        """The held text, once nothing more can follow."""
        text, self._held = self._held, ""
        return text

    def _num_held(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        longest = min(len(text), max((len(string) - 1 for string in self._strings), default=0))
        for length in range(longest, 0, -1):
            end = text[-length:]
            if any(string.startswith(end) for string in self._strings):
                return length
        return 0
