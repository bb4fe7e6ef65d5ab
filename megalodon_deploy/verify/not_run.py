"""What a verification left out."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class NotRun:
    """A comparison that this machine or this bundle did not allow, and why."""

    what: str
    why: str
