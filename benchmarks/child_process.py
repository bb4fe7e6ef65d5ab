"""Measurements in a process of their own, whose memory is that of nothing else."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any


def most_resident_bytes() -> int:
    """Of this process so far; `getrusage` would count its parent's too."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


def run_again(*options: str) -> Any:
    """What this script prints, as JSON, when it is started with the same arguments and `options`."""
    command = [sys.executable, *sys.argv, *options]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
