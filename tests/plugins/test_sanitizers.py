"""The emulated kernels and the plugins under AddressSanitizer and UndefinedBehaviorSanitizer.

The checks are those of the other test files, in a process that has the sanitizers and gives the kernels tensors without
margins, so that the first byte outside a tensor is an error.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from sanitizers import sanitizer_environment

from megalodon_deploy.engine.toolchain import build_emulated
from megalodon_deploy.errors import MissingDependencyError

CHECKS = sorted(Path(__file__).parent.glob("test_emulated_*.py"))


@pytest.fixture(scope="session")
def sanitized_path(repository: Path) -> Path:
    return build_emulated(repository / "build" / "sanitized", cmake_arguments=["-DMEGALODON_SANITIZE=ON"])


@pytest.fixture(scope="session")
def environment(sanitized_path: Path) -> dict[str, str]:
    try:
        return sanitizer_environment(sanitized_path)
    except MissingDependencyError as error:
        pytest.skip(str(error))


def test_programs(sanitized_path: Path) -> None:
    """With leaks, which Python has of its own."""
    folder = sanitized_path.parent
    if not (folder / "plugin_test").is_file():
        pytest.skip("GoogleTest or the headers of TensorRT are missing: apt-get install libgtest-dev; make plugins")
    for command in ([folder / "emulation_check"], [folder / "plugin_test", sanitized_path]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]


@pytest.mark.parametrize("checks", CHECKS, ids=lambda path: path.stem)
def test_kernels(environment: dict[str, str], checks: Path) -> None:
    """All but bfloat16: float16 has its size and goes through the same instructions."""
    processes = str(len(os.sched_getaffinity(0)))
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-n", processes]
    command += ["-k", "not bfloat16", checks]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]


CALL = """
import ctypes, os
import numpy as np
library = ctypes.CDLL(os.environ["MEGALODON_EMULATED_LIBRARY"])
D = 1000
sizes = {"x": D, "past": 2 * D, "position": 2, "p": D, "q": 2 * D, "gamma": 2 * D, "omega": D, "y": D, "present": 2 * D}
memory = {name: np.zeros(size, np.float32) for name, size in sizes.items()}
pointers = {name: array.ctypes.data for name, array in memory.items()}
CHANGE
arguments = [ctypes.c_void_p(pointers[name]) for name in sizes]
lengths, no_workspace, stream = None, (None, ctypes.c_size_t(0)), None
tail = [lengths, *arguments[-2:], *no_workspace, stream]
status = library.mgd_complex_ema(0, *map(ctypes.c_int64, (1, 1, D, 1)), *arguments[:-2], *tail)
print("status", status)
"""


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ("", None),
        ("short = np.zeros(D - 1, np.float32); pointers['x'] = short.ctypes.data", "heap-buffer-overflow"),
        ("short = np.zeros(D - 1, np.float32); pointers['y'] = short.ctypes.data", "heap-buffer-overflow"),
        ("pointers['omega'] += 2; memory['omega'] = np.zeros(D + 1, np.float32)", "misaligned address"),
    ],
    ids=["right", "short input", "short output", "misaligned"],
)
def test_the_sanitizers_are_awake(environment: dict[str, str], change: str, complaint: str | None) -> None:
    command = [sys.executable, "-c", CALL.replace("CHANGE", change)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if complaint is None:
        assert done.stdout == "status 0\n", done.stderr
    else:
        assert done.returncode != 0
        assert complaint in done.stderr
