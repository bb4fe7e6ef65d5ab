"""Which machine and which versions a report is about."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from megalodon_deploy.cpus import usable_cpus
from megalodon_deploy.doctor import visible_gpus

_PACKAGES = ("megalodon-deploy", "numpy", "onnx", "onnxruntime", "onnxruntime-gpu", "polygraphy", "torch")
_CPU_INFO = Path("/proc/cpuinfo")


def describe_machine() -> dict[str, str]:
    """Processor, memory, GPU and system, in words."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    return {
        "processor": f"{_processor()}, {usable_cpus()} cores",
        "memory": f"{memory / 2**30:.0f} GiB" if memory else "unknown",
        "GPU": visible_gpus() or "none",
        "system": f"{platform.system()} {platform.release()}, {platform.machine()}",
        "Python": platform.python_version(),
    }


def describe_versions() -> dict[str, str]:
    """Versions of the packages that had a part in the comparison."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:  # one of two packages brings ONNX Runtime
            continue
    return versions


def _processor() -> str:
    if _CPU_INFO.exists():
        for line in _CPU_INFO.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
