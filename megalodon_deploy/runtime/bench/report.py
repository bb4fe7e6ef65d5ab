"""What a benchmark found; all of it goes to JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class BatchTimes:
    """Steps of several streams in one call."""

    batch: int
    median_ms: float  # of a step of all
    tokens_per_second: float  # of all together


@dataclass(frozen=True, kw_only=True)
class PositionTimes:
    """Steps of a stream that has gone on for so long."""

    position: int
    median_ms: float
    p95_ms: float


@dataclass(frozen=True, kw_only=True)
class BackendTimes:
    """What one backend took. A first token comes after the whole prompt, on a stream that is fresh."""

    backend: str
    device: str
    clocks: dict[str, str]  # as the device reports them at the end of the run
    load_seconds: float
    first_token_seconds: float
    prefill_tokens_per_second: float
    decode_tokens: int
    decode_median_ms: float
    decode_p95_ms: float
    decode_p99_ms: float
    bandwidth_bytes_per_second: float  # of the device's memory, beyond any cache
    share_of_bandwidth: float  # time that reading takes at that speed / median time; a large cache can lift it above 1
    state_bytes_per_stream: int  # with a full chunk
    by_batch: list[BatchTimes]
    by_position: list[PositionTimes]


@dataclass(frozen=True, kw_only=True)
class BenchReport:
    """Medians over the rounds of one run; `to_dict` is for JSON."""

    date: str
    command: str
    bundle: str
    precision: str
    processor: str
    threads: int | None  # None: each backend's own choice
    versions: dict[str, str]
    prompt_tokens: int
    bandwidth_bytes_per_second: float  # of the first backend's memory, beyond any cache
    reread_bytes_per_second: float  # of as many bytes as the weights, again and again: a large cache helps
    weight_bytes_per_token: int
    state_bytes_per_token: int  # key/value rows of the open chunk at the mean position, CEMA and norm states
    peak_memory_bytes: int | None
    times: list[BackendTimes]  # the bundle's backend, then the one to compare with
    stock_tools: list[str]  # command lines that reproduce the engine's part with NVIDIA's own tools

    @property
    def ratio(self) -> float | None:
        """How many times faster a token is than with the backend compared."""
        return self.times[1].decode_median_ms / self.times[0].decode_median_ms if len(self.times) > 1 else None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"ratio": self.ratio}
