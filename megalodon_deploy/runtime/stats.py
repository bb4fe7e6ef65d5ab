"""What a stream has cost so far."""

from __future__ import annotations

import sys
from dataclasses import dataclass


@dataclass
class StreamStats:
    """Tokens and seconds of one stream; `--stats` prints it."""

    state_bytes: int  # of the stream with a full chunk
    prefill_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_tokens: int = 0
    decode_seconds: float = 0.0  # of whole tokens: model, choice and text

    @property
    def prefill_tokens_per_second(self) -> float | None:
        return self.prefill_tokens / self.prefill_seconds if self.prefill_seconds else None

    @property
    def decode_tokens_per_second(self) -> float | None:
        return self.decode_tokens / self.decode_seconds if self.decode_seconds else None

    def to_dict(self) -> dict[str, float | int | None]:
        """For JSON, with the process's peak memory."""
        return {
            "prefill_tokens": self.prefill_tokens,
            "prefill_seconds": self.prefill_seconds,
            "prefill_tokens_per_second": self.prefill_tokens_per_second,
            "decode_tokens": self.decode_tokens,
            "decode_seconds": self.decode_seconds,
            "decode_tokens_per_second": self.decode_tokens_per_second,
            "state_bytes": self.state_bytes,
            "peak_memory_bytes": peak_memory_bytes(),
        }


def peak_memory_bytes() -> int | None:
    """The most main memory that this process has had resident; None where the system does not say (Windows)."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
