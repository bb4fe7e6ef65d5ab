"""The kernel benchmark's plan and results as tables and as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kernel_cases import Case

from megalodon_deploy.files import atomic_file


@dataclass(frozen=True)
class Result:
    """One case. Times are of one call in microseconds; None where something was not measured."""

    case: str
    sizes: dict[str, int]
    traffic_bytes: int
    flops: int
    worst_error: float  # in tolerances; above 1 nothing was timed
    median_us: float | None = None
    p95_us: float | None = None
    floor_us: float | None = None
    bound: str | None = None  # what sets the floor
    eager_us: float | None = None
    compiled_us: float | None = None
    cold: bool | None = None  # whether every call found its tensors outside the cache

    @property
    def is_right(self) -> bool:
        return self.worst_error <= 1  # false for NaN

    @property
    def share(self) -> float | None:
        """Of the ceiling, 1 at best."""
        return self.floor_us / self.median_us if self.floor_us and self.median_us else None

    @property
    def gigabytes_per_second(self) -> float | None:
        return self.traffic_bytes / self.median_us / 1e3 if self.median_us else None

    @property
    def teraflops(self) -> float | None:
        return self.flops / self.median_us / 1e6 if self.median_us and self.flops else None


def plan_table(cases: Iterable[Case]) -> str:
    rows = [["case", "sizes", "MB at least", "GFLOP"]]
    for case in cases:
        sizes = " ".join(f"{letter}={size}" for letter, size in case.sizes.items())
        rows.append([case.name, sizes, f"{case.traffic_bytes / 1e6:.3f}", f"{case.flops / 1e9:.3f}"])
    return _aligned(rows)


def result_table(results: Sequence[Result]) -> str:
    rows = [["case", "median us", "p95", "GB/s", "TFLOP/s", "of ceiling", "eager", "compiled", "error"]]
    for result in results:
        bound = f" {result.bound}" if result.bound else ""
        share = "-" if result.share is None else f"{result.share:.0%}{bound}"
        numbers = [result.median_us, result.p95_us, result.gigabytes_per_second, result.teraflops]
        speedups = [_number(result.eager_us), _number(result.compiled_us)]
        verdict = f"{result.worst_error:.2f}" if result.is_right else f"{result.worst_error:.2f} WRONG"
        rows.append([result.case, *map(_number, numbers), share, *speedups, verdict])
    return _aligned(rows)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _aligned(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def write_json(path: Path, description: dict[str, Any], results: Sequence[Result]) -> None:
    """Everything that was measured, with what is derived from it. NaN becomes null."""
    derived = ("share", "gigabytes_per_second", "teraflops", "is_right")
    entries = [asdict(result) | {name: getattr(result, name) for name in derived} for result in results]
    for entry in entries:
        if not abs(entry["worst_error"]) < float("inf"):
            entry["worst_error"] = None
    text = json.dumps(description | {"results": entries}, indent=2, allow_nan=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
