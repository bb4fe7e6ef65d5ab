"""Programs that check themselves: the plugins without TensorRT, and the emulation with broken kernels."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest


def run_check(program: Path, *arguments: str | Path) -> str:
    """Returns what the program wrote to stdout; fails with all its output when a check in it failed."""
    done = subprocess.run([program, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="session")
def plugin_test(emulated_path: Path) -> Path:
    program = emulated_path.parent / "plugin_test"
    if not program.is_file():
        pytest.skip("GoogleTest or the headers of TensorRT are missing: apt-get install libgtest-dev; make plugins")
    return program


def check_plugins(program: Path, library: Path) -> dict[str, int]:
    """Numbers of passed and skipped tests of every plugin of `library`."""
    output = run_check(program, library)
    counts = {name: int(number) for name, number in re.findall(r"^\[  (PASSED|SKIPPED) *\] (\d+) test", output, re.M)}
    assert counts["PASSED"] > 0
    return counts


def test_the_emulation_notices_broken_kernels(emulated_path: Path) -> None:
    run_check(emulated_path.parent / "emulation_check")


def test_plugins_on_host_memory(plugin_test: Path, emulated_path: Path) -> None:
    assert "SKIPPED" not in check_plugins(plugin_test, emulated_path)


def test_plugins_of_the_real_library(plugin_test: Path, plugin_path: Path) -> None:
    """All but what would run a kernel."""
    on_host = check_plugins(plugin_test, plugin_path)
    assert on_host["PASSED"] > 2 * on_host["SKIPPED"]
