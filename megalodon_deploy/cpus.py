"""How many processors this process may keep busy, and how to share them."""

from __future__ import annotations

import math
import os
from pathlib import Path

_QUOTA_FILE = Path("/sys/fs/cgroup/cpu.max")


def usable_cpus(quota_file: Path = _QUOTA_FILE) -> int:
    """The processors of this process's affinity, or fewer where a container's quota (cgroup v2) allows less time.

    Libraries that count processors overlook the quota: on a large host they start tens of threads for the time of
    two, and each waits for the others at every step.
    """
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = quota_file.read_text(encoding="ascii").split()
        return max(1, min(count, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):  # no cgroup v2, or the quota is "max"
        return count


def limit_spinning() -> None:
    """Let OpenMP threads sleep soon at a barrier; call it before PyTorch is first imported.

    By default GNU's OpenMP spins for many milliseconds at each of a training step's thousands of barriers. While
    other programs use the cores, the spinning keeps the awaited thread from running: on two busy cores a step of the
    small model took 2 to 13 s and up to 6 s of processor time, with this count 0.4 s of each. Quiet cores lose 9% of
    their speed in such small steps, nothing in large ones; a count of 1000 would cost 30%.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
