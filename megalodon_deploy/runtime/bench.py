"""How fast a bundle streams here, against the speed at which this machine reads memory.

A token of one stream reads every weight and its state once and computes little with them, so memory bandwidth is the
limit of decode.
The limit and all backends are measured in one run, in turns, so that a machine that slows down slows down for all.
"""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megalodon_deploy.config import MegalodonConfig
from megalodon_deploy.cpus import usable_cpus
from megalodon_deploy.errors import UserError
from megalodon_deploy.parameters import ParameterSpec, parameter_specs
from megalodon_deploy.runtime.stats import peak_memory_bytes
from megalodon_deploy.state import state_bytes

if TYPE_CHECKING:
    from megalodon_deploy.bundle import Bundle, Precision
    from megalodon_deploy.runtime.session import Session

Progress = Callable[[str, float], None]

READ_BYTES = 2 << 30  # far more than a cache holds: server processors have up to half a GB of it
_MATRIX_BYTES: dict[Precision, int] = {"fp32": 4, "fp16": 2, "bf16": 2}


@dataclass(frozen=True, kw_only=True)
class BackendTimes:
    """What one backend took. A first token comes after the whole prompt, on a stream that is fresh."""

    backend: str
    load_seconds: float
    first_token_seconds: float
    prefill_tokens_per_second: float
    decode_tokens: int
    decode_median_ms: float
    decode_p95_ms: float
    decode_p99_ms: float
    share_of_bandwidth: (
        float  # weights read per token / median time, of the bandwidth; a large cache can lift it above 1
    )


@dataclass(frozen=True, kw_only=True)
class BenchReport:
    """Medians over the rounds of one run; `to_dict` is for JSON."""

    bundle: str
    precision: str
    processor: str
    threads: int | None  # None: each backend's own choice
    versions: dict[str, str]
    prompt_tokens: int
    bandwidth_bytes_per_second: float  # of memory beyond any cache
    reread_bytes_per_second: float  # of as many bytes as the weights, again and again: a large cache helps
    weight_bytes_per_token: int
    state_bytes_per_token: int  # key/value rows of the open chunk at the mean position, CEMA and norm states
    peak_memory_bytes: int | None
    times: list[BackendTimes]  # the bundle's backend, then the one to compare with

    @property
    def ratio(self) -> float | None:
        """How many times faster a token is than with the backend compared."""
        return self.times[1].decode_median_ms / self.times[0].decode_median_ms if len(self.times) > 1 else None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"ratio": self.ratio}


@dataclass
class _Contestant:
    """A session and what it has taken so far, in seconds."""

    session: Session
    load: float
    prompts: list[float] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)


def bench_bundle(
    bundle: Bundle,
    *,
    backend: str = "onnxruntime",
    compare: str | None = None,
    decode_tokens: int = 200,
    prompt_tokens: int = 256,
    rounds: int = 5,
    threads: int | None = None,
    read_bytes: int = READ_BYTES,
    progress: Progress | None = None,
) -> BenchReport:
    """Measure prefill and decode of one stream, in `rounds` turns with the other backend and the bandwidth.

    Every turn feeds a fresh stream `prompt_tokens` random tokens, then its share of `decode_tokens` one by one.
    `threads` None: each backend's own choice, and one for each core to read memory. Raises what `open_session`
    raises, and `UserError` for a count below 1.
    """
    for name, count in (("decode_tokens", decode_tokens), ("prompt_tokens", prompt_tokens), ("rounds", rounds)):
        if count < 1:
            raise UserError(f"bench: {name} = {count} is not a positive integer")
    report = progress or (lambda stage, fraction: None)
    contestants = [_open(bundle, name, threads) for name in dict.fromkeys([backend, compare or backend])]
    weight_bytes = weight_bytes_per_token(bundle.config, bundle.manifest.precision)
    reader = _MemoryReader(read_bytes, weight_bytes, threads or usable_cpus())
    tokens = np.random.default_rng(0).integers(0, bundle.config.vocab_size, prompt_tokens + decode_tokens).tolist()
    steps_per_round = -(-decode_tokens // rounds)
    for index in range(rounds):
        report("measuring", index / rounds)
        reader.measure()
        for contestant in contestants:
            _measure(contestant, tokens[:prompt_tokens], tokens[prompt_tokens:][:steps_per_round])
    report("measuring", 1.0)
    bandwidth = float(np.median(reader.large))
    positions = prompt_tokens + 1 + np.arange(steps_per_round)
    state = state_bytes_per_token(bundle.config, bundle.manifest.precision, positions)
    return BenchReport(
        bundle=bundle.manifest.name,
        precision=bundle.manifest.precision,
        processor=_processor(),
        threads=threads,
        versions={
            name: import_module(name).__version__ for name in ["numpy", *(c.session.backend for c in contestants)]
        },
        prompt_tokens=prompt_tokens,
        bandwidth_bytes_per_second=bandwidth,
        reread_bytes_per_second=float(np.median(reader.again)),
        weight_bytes_per_token=weight_bytes,
        state_bytes_per_token=state,
        peak_memory_bytes=peak_memory_bytes(),
        times=[_times(contestant, prompt_tokens, (weight_bytes + state) / bandwidth) for contestant in contestants],
    )


def weight_bytes_per_token(config: MegalodonConfig, precision: Precision) -> int:
    """Bytes of weights that a step reads: all of them, but one row of an embedding that is not the output too."""

    def size(spec: ParameterSpec) -> int:
        is_matrix = spec.name.endswith(".weight") and len(spec.shape) == 2
        return int(np.prod(spec.shape)) * (_MATRIX_BYTES[precision] if is_matrix else 4)

    read_whole = [s for s in parameter_specs(config) if config.share_emb or s.name != "embed.weight"]
    row_bytes = 0 if config.share_emb else config.model_dim * _MATRIX_BYTES[precision]
    return sum(map(size, read_whole)) + row_bytes


def state_bytes_per_token(config: MegalodonConfig, precision: Precision, positions: np.ndarray) -> int:
    """Bytes of state that a step reads, mean over steps at these positions."""
    rows = int((positions % config.chunk_size).mean())
    return state_bytes(config, activation_bytes=_MATRIX_BYTES[precision], capacity=rows)


class _MemoryReader:
    """Reads memory with all threads, as fast as numpy can: an OR over 64-bit words.

    Once a buffer far larger than any cache, once more a buffer of the size of the weights that was read just before:
    a large cache keeps a part of it, as it keeps a part of the weights from token to token.
    """

    def __init__(self, size_bytes: int, weight_bytes: int, threads: int) -> None:
        self._words = np.ones(max(size_bytes, weight_bytes) // 8, np.int64)
        self._weight_words = self._words[: weight_bytes // 8]
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads)
        self.large: list[float] = []  # bytes per second
        self.again: list[float] = []

    def measure(self) -> None:
        self.large.append(max(self._read(self._words) for _ in range(2)))
        self.again.append(max(self._read(self._weight_words) for _ in range(3)))

    def _read(self, words: np.ndarray) -> float:
        start = time.perf_counter()
        list(self._pool.map(np.bitwise_or.reduce, np.array_split(words, self._threads)))
        return words.nbytes / (time.perf_counter() - start)


def _processor() -> str:
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _open(bundle: Bundle, backend: str, threads: int | None) -> _Contestant:
    start = time.perf_counter()
    session = bundle.session(backend, threads=threads)
    contestant = _Contestant(session, time.perf_counter() - start)
    session.stream().prefill([0, 0])  # what is built at the first call is no part of the measurement
    return contestant


def _measure(contestant: _Contestant, prompt: list[int], tokens: list[int]) -> None:
    stream = contestant.session.stream()
    start = time.perf_counter()
    stream.prefill(prompt)
    contestant.prompts.append(time.perf_counter() - start)
    stream.step(tokens[0])  # binds its buffers
    for token in tokens:
        start = time.perf_counter()
        stream.step(token)
        contestant.steps.append(time.perf_counter() - start)


def _times(contestant: _Contestant, prompt_tokens: int, limit_seconds: float) -> BackendTimes:
    median, p95, p99 = np.percentile(contestant.steps, [50, 95, 99]).tolist()
    prompt_seconds = float(np.median(contestant.prompts))
    return BackendTimes(
        backend=contestant.session.backend,
        load_seconds=contestant.load,
        first_token_seconds=prompt_seconds,
        prefill_tokens_per_second=prompt_tokens / prompt_seconds,
        decode_tokens=len(contestant.steps),
        decode_median_ms=median * 1e3,
        decode_p95_ms=p95 * 1e3,
        decode_p99_ms=p99 * 1e3,
        share_of_bandwidth=limit_seconds / median,
    )
