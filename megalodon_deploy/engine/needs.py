"""What a build will need of a machine, what the machine has, and a refusal in time."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from megalodon_deploy.bundle import WEIGHTS_FILE, Bundle
from megalodon_deploy.console import format_bytes
from megalodon_deploy.engine.targets import EngineWeights
from megalodon_deploy.errors import EngineError

# Measured with TensorRT-RTX 1.7 on models of 2 and 12 layers in fp16, with weights inside and outside.
_BASE_BYTES = 250 << 20  # TensorRT itself
_LAYER_BYTES = 22 << 20
_WEIGHT_COPIES = 3  # of what the engine holds
# Without plugins TensorRT computes tables of every channel of ComplexEMA beforehand.
_TABLE_BYTES = 12 << 10  # of a channel in a layer
_TABLE_COPIES = 7
_ENGINE_OVERHEAD_BYTES = 64 << 20  # what an engine holds besides weights, generously

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class BuildNeeds:
    """Estimates for a build, and what there is of each, in bytes."""

    memory: int
    memory_available: int | None  # None where the system does not say
    disk: int
    disk_free: int

    def describe(self) -> str:
        available = "unknown" if self.memory_available is None else format_bytes(self.memory_available)
        return (
            f"the build takes about {format_bytes(self.memory)} of memory (available: {available}) "
            f"and {format_bytes(self.disk)} of disk (free: {format_bytes(self.disk_free)})"
        )

    def check(self, bundle_path: Path) -> None:
        """Raise `EngineError` when the machine cannot do it: better now than when memory runs out."""
        if self.disk_free < self.disk:
            raise EngineError(f"{bundle_path}: {self.describe()}; make room")
        if self.memory_available is not None and self.memory_available < self.memory:
            raise EngineError(
                f"{bundle_path}: {self.describe()}; leave the weights in the bundle (--weights bundle), stop other "
                "programs, build on a larger machine, or export smaller weights (--quantize int8 or int4)"
            )


def estimate_needs(
    bundle: Bundle, *, plugins: bool, weights: EngineWeights = "engine", num_engines: int = 1
) -> BuildNeeds:
    """Of `num_engines`, built one after the other."""
    config = bundle.config
    held = 0 if weights == "bundle" else bundle.manifest.files[WEIGHTS_FILE].size_bytes
    tables = 0 if plugins else config.num_layers * config.model_dim * _TABLE_BYTES
    return BuildNeeds(
        memory=_BASE_BYTES + config.num_layers * _LAYER_BYTES + _WEIGHT_COPIES * held + _TABLE_COPIES * tables,
        memory_available=available_memory(),
        disk=num_engines * (held + tables + _ENGINE_OVERHEAD_BYTES),
        disk_free=shutil.disk_usage(bundle.path).free,
    )


def available_memory(meminfo: Path = _MEMINFO, cgroup: Path = _CGROUP) -> int | None:
    """Bytes that a new process can have, swap included, within the limit of a container; None where unknown."""
    if not meminfo.is_file():
        return None
    entries = dict(line.split(":", 1) for line in meminfo.read_text(encoding="ascii").splitlines() if ":" in line)
    available = sum(int(entries[name].split()[0]) * 1024 for name in ("MemAvailable", "SwapFree") if name in entries)
    try:
        limit = (cgroup / "memory.max").read_text(encoding="ascii").strip()
        used = int((cgroup / "memory.current").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return available
    return available if limit == "max" else min(available, max(0, int(limit) - used))
