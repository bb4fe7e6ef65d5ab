"""What a figure has to be read with: device, clocks, versions, date and command."""

from __future__ import annotations

import platform
import shlex
import subprocess
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path

_GPU_CLOCKS = ("clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "power.limit", "driver_version")
_SECONDS = 10.0


def processor() -> str:
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def gpu_clocks(index: int) -> dict[str, str]:
    """Clocks, power limit and driver as nvidia-smi reports them; empty where there is none."""
    command = ["nvidia-smi", f"--id={index}", f"--query-gpu={','.join(_GPU_CLOCKS)}", "--format=csv,noheader"]
    try:
        output = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(_GPU_CLOCKS, (value.strip() for value in output.strip().split(",")), strict=False))


def cpu_clocks() -> dict[str, str]:
    """The clock of the first processor where Linux tells."""
    if sys.platform != "linux":
        return {}
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("cpu MHz"):
            return {"cpu": f"{line.partition(':')[2].strip()} MHz"}
    return {}


def versions(backends: Iterable[str]) -> dict[str, str]:
    """Of numpy, and of the module behind each backend."""
    modules = ["numpy", *(backend.replace("-", "_") for backend in backends)]
    return {name: import_module(name).__version__ for name in modules}


def command() -> str:
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def today() -> str:
    return datetime.now(UTC).date().isoformat()
