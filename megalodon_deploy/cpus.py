"""How many processors this process may keep busy."""

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
