"""Times on a GPU with the caches cold, and the limits to compare them with, measured in the same process."""

from __future__ import annotations

import math
import platform
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

CALLS_A_GRAPH = 20  # at least: one replay's own cost is then small
MOST_COPIES = 512
CEILING_BYTES = 1 << 30
CEILING_WIDTH = 8192


@dataclass(frozen=True)
class Ceilings:
    """What this device reached in this run: bytes a second of a large copy, operations a second of a large product."""

    bytes_per_second: float
    float32_flops: float
    matrix_flops: dict[str, float]  # by activation type

    def floor(self, traffic_bytes: int, flops: int, unit: str, dtype: str) -> tuple[float, str]:
        """Seconds that a call cannot go below, and what says so."""
        rate = self.matrix_flops[dtype] if unit == "matrix" else self.float32_flops
        by_memory, by_arithmetic = traffic_bytes / self.bytes_per_second, flops / rate
        return max((by_memory, "memory"), (by_arithmetic, "matrix" if unit == "matrix" else "float32"))


def copies_for_cold_caches(footprint_bytes: int, cache_bytes: int) -> int:
    """So many sets of tensors that each has left the cache when its turn comes again."""
    return min(MOST_COPIES, max(2, math.ceil(2 * cache_bytes / max(footprint_bytes, 1))))


def median_and_p95(seconds: Sequence[float]) -> tuple[float, float]:
    ordered = torch.tensor(sorted(seconds), dtype=torch.float64)
    return float(ordered.quantile(0.5)), float(ordered.quantile(0.95))


def time_graph(calls: Sequence[Callable[[], Any]], stream: torch.cuda.Stream, repeats: int) -> list[float]:
    """Seconds a call, for each replay of a CUDA graph that makes all `calls` in turn, several times if they are few.

    `calls` put their work on `stream`, which is captured.
    """
    rounds = math.ceil(CALLS_A_GRAPH / len(calls))
    for call in calls:
        call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(rounds):
            for call in calls:
                call()
    return [seconds / (rounds * len(calls)) for seconds in _time(graph.replay, stream, repeats)]


def time_launches(calls: Sequence[Callable[[], Any]], stream: torch.cuda.Stream, repeats: int) -> list[float]:
    """Seconds a call without a graph, launches included, for each pass over `calls`."""

    def all_calls() -> None:
        for call in calls:
            call()

    return [seconds / len(calls) for seconds in _time(all_calls, stream, repeats)]


def _time(work: Callable[[], None], stream: torch.cuda.Stream, repeats: int) -> list[float]:
    seconds = []
    with torch.cuda.stream(stream):
        for _ in range(3):
            work()
        stream.synchronize()
        for _ in range(repeats):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record(stream)
            work()
            end.record(stream)
            end.synchronize()
            seconds.append(start.elapsed_time(end) / 1e3)
    return seconds


def measure_ceilings(dtypes: Sequence[str], torch_types: dict[str, torch.dtype]) -> Ceilings:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        source, target = (torch.empty(CEILING_BYTES, dtype=torch.uint8, device="cuda") for _ in range(2))
        copied, _ = median_and_p95(time_launches([lambda: target.copy_(source)], stream, 20))
        torch.backends.cuda.matmul.allow_tf32 = False
        kinds = {name: _product_rate(torch_types[name], stream) for name in {*dtypes, "float32"}}
    return Ceilings(2 * CEILING_BYTES / copied, kinds["float32"], kinds)


def _product_rate(kind: torch.dtype, stream: torch.cuda.Stream) -> float:
    one, other = (torch.randn(CEILING_WIDTH, CEILING_WIDTH, device="cuda").to(kind) for _ in range(2))
    result = torch.empty_like(one)
    seconds, _ = median_and_p95(time_launches([lambda: torch.mm(one, other, out=result)], stream, 10))
    return 2 * CEILING_WIDTH**3 / seconds


def describe_device() -> dict[str, Any]:
    """Device, driver, clocks and versions, for the report."""
    query = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit,temperature.gpu"
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", "--id=0"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    properties = torch.cuda.get_device_properties(0)
    return {
        "device": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "cache_bytes": properties.L2_cache_size,
        "nvidia_smi": dict(zip(query.split(","), (part.strip() for part in answer.split(",")), strict=False)),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }
