"""One benchmark run: every backend and the memory's speed, in turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from megalodon_deploy.cpus import usable_cpus
from megalodon_deploy.errors import UserError
from megalodon_deploy.runtime.bench import machine
from megalodon_deploy.runtime.bench.bandwidth import READ_BYTES, GpuReader, HostReader, MemoryReader
from megalodon_deploy.runtime.bench.reads import state_bytes_per_token, weight_bytes_of
from megalodon_deploy.runtime.bench.report import BackendTimes, BenchReport
from megalodon_deploy.runtime.bench.stock_tools import command_lines
from megalodon_deploy.runtime.bench.sweeps import BatchSweep, PositionSweep
from megalodon_deploy.runtime.bench.tokens import UNTIMED_TOKENS, next_tokens, timed_tokens
from megalodon_deploy.runtime.stats import peak_memory_bytes

if TYPE_CHECKING:
    from megalodon_deploy.bundle import Bundle
    from megalodon_deploy.runtime.cuda.gpu import Gpu
    from megalodon_deploy.runtime.session import Session

Progress = Callable[[str, float], None]


@dataclass
class _Contestant:
    """A session and what it has taken so far, in seconds."""

    session: Session
    load: float
    reader: MemoryReader
    by_batch: BatchSweep
    by_position: PositionSweep
    prompts: list[float] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)


def bench_bundle(
    bundle: Bundle,
    *,
    backend: str = "onnxruntime",
    compare: str | None = None,
    device: str | None = None,
    decode_tokens: int = 200,
    prompt_tokens: int = 256,
    batches: Sequence[int] = (),
    positions: Sequence[int] = (),
    rounds: int = 5,
    threads: int | None = None,
    read_bytes: int = READ_BYTES,
    progress: Progress | None = None,
) -> BenchReport:
    """Measure prefill and decode of one stream, in `rounds` turns with the other backend and the bandwidth.

    Every turn feeds a fresh stream `prompt_tokens` random tokens, then generates its share of `decode_tokens`, each the
    most probable; then as many with each of `batches` (streams in a call) and at each of `positions` (tokens before).
    `device` is for both backends. `threads` None: each backend's own choice, and one for each core to read memory.
    Raises what `open_session` raises, and `UserError` for a count below 1.
    """
    for name, count in (("decode_tokens", decode_tokens), ("prompt_tokens", prompt_tokens), ("rounds", rounds)):
        if count < 1:
            raise UserError(f"bench: {name} = {count} is not a positive integer")
    report = progress or (lambda stage, fraction: None)
    weight_bytes = weight_bytes_of(bundle)
    readers = _Readers(read_bytes, weight_bytes, threads or usable_cpus())
    contestants = [
        _open(bundle, name, threads, device, readers, batches, positions)
        for name in dict.fromkeys([backend, compare or backend])
    ]
    prompt = np.random.default_rng(0).integers(0, bundle.config.vocab_size, prompt_tokens).tolist()
    steps_per_round = -(-decode_tokens // rounds)
    for index in range(rounds):
        report("measuring", index / rounds)
        for reader in readers.used:
            reader.measure()
        for contestant in contestants:
            _measure(contestant, prompt, steps_per_round)
    report("measuring", 1.0)
    positions_of_steps = prompt_tokens + UNTIMED_TOKENS + np.arange(steps_per_round)
    state = state_bytes_per_token(bundle.config, bundle.manifest.precision, positions_of_steps)
    return _report(bundle, contestants, threads, prompt_tokens, weight_bytes, state)


def _report(
    bundle: Bundle, contestants: list[_Contestant], threads: int | None, prompt_tokens: int, weights: int, state: int
) -> BenchReport:
    """`weights` and `state`: bytes that a token reads."""
    first = contestants[0].reader
    return BenchReport(
        date=machine.today(),
        command=machine.command(),
        bundle=bundle.manifest.name,
        precision=bundle.manifest.precision,
        processor=machine.processor(),
        threads=threads,
        versions=machine.versions(contestant.session.backend for contestant in contestants),
        prompt_tokens=prompt_tokens,
        bandwidth_bytes_per_second=float(np.median(first.large)),
        reread_bytes_per_second=float(np.median(first.again)),
        weight_bytes_per_token=weights,
        state_bytes_per_token=state,
        peak_memory_bytes=peak_memory_bytes(),
        times=[_times(contestant, prompt_tokens, weights + state) for contestant in contestants],
        stock_tools=[line for contestant in contestants for line in _stock_tools(contestant.session)],
    )


class _Readers:
    """A reader for main memory and one for each GPU, made when a backend uses it."""

    def __init__(self, read_bytes: int, weight_bytes: int, threads: int) -> None:
        self._read_bytes, self._weight_bytes, self._threads = read_bytes, weight_bytes, threads
        self._readers: dict[int | None, MemoryReader] = {}

    @property
    def used(self) -> list[MemoryReader]:
        return list(self._readers.values())

    def of(self, session: Session) -> MemoryReader:
        gpu = _gpu(session)
        key = None if gpu is None else gpu.index
        if key not in self._readers:
            self._readers[key] = (
                HostReader(self._read_bytes, self._weight_bytes, self._threads)
                if gpu is None
                else GpuReader(gpu, self._read_bytes, self._weight_bytes)
            )
        return self._readers[key]


def _gpu(session: Session) -> Gpu | None:
    """The GPU that a session runs on."""
    gpu: Gpu | None = getattr(session.executor, "gpu", None)
    device = getattr(session.executor, "device", None)  # PyTorch's
    if gpu is None and device is not None and device.type == "cuda":
        from megalodon_deploy.runtime.cuda.driver import CudaGpu

        return CudaGpu(device.index or 0)
    return gpu


def _open(
    bundle: Bundle,
    backend: str,
    threads: int | None,
    device: str | None,
    readers: _Readers,
    batches: Sequence[int],
    positions: Sequence[int],
) -> _Contestant:
    start = time.perf_counter()
    session = bundle.session(backend, threads=threads, device=device)
    load = time.perf_counter() - start
    session.stream().prefill([0, 0])  # what is built at the first call is no part of the measurement
    sweeps = BatchSweep(session, batches), PositionSweep(session, positions)
    return _Contestant(session, load, readers.of(session), *sweeps)


def _measure(contestant: _Contestant, prompt: list[int], steps: int) -> None:
    stream = contestant.session.stream()
    start = time.perf_counter()
    stream.batch.consume({stream: prompt})
    next_tokens(stream.batch, [stream])
    contestant.prompts.append(time.perf_counter() - start)
    contestant.steps += timed_tokens(stream.batch, [stream], steps)
    contestant.by_batch.measure(steps)
    contestant.by_position.measure(steps)


def _times(contestant: _Contestant, prompt_tokens: int, read_bytes: int) -> BackendTimes:
    median, p95, p99 = np.percentile(contestant.steps, [50, 95, 99]).tolist()
    prompt_seconds = float(np.median(contestant.prompts))
    bandwidth = float(np.median(contestant.reader.large))
    gpu = _gpu(contestant.session)
    return BackendTimes(
        backend=contestant.session.backend,
        device=machine.processor() if gpu is None else gpu.name,
        clocks=machine.cpu_clocks() if gpu is None else machine.gpu_clocks(gpu.index),
        load_seconds=contestant.load,
        first_token_seconds=prompt_seconds,
        prefill_tokens_per_second=prompt_tokens / prompt_seconds,
        decode_tokens=len(contestant.steps),
        decode_median_ms=median * 1e3,
        decode_p95_ms=p95 * 1e3,
        decode_p99_ms=p99 * 1e3,
        bandwidth_bytes_per_second=bandwidth,
        share_of_bandwidth=read_bytes / bandwidth / median,
        state_bytes_per_stream=contestant.session.state_bytes,
        by_batch=contestant.by_batch.times(),
        by_position=contestant.by_position.times(),
    )


def _stock_tools(session: Session) -> list[str]:
    from megalodon_deploy.runtime.executors.tensorrt import TensorRTExecutor

    executor = session.executor
    if not isinstance(executor, TensorRTExecutor):
        return []
    return command_lines(executor.engine_path, executor.info, executor.library)
