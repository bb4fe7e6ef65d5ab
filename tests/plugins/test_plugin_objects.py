"""Programs that check themselves: plugin objects without TensorRT, and the emulation with broken kernels."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest


def run_check(program: Path, *arguments: str | Path) -> str:
    """Returns what the program wrote to stderr; fails with all its output when a check in it failed."""
    done = subprocess.run([program, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stderr


@pytest.fixture(scope="session")
def plugin_check(emulated_path: Path) -> Path:
    program = emulated_path.parent / "plugin_check"
    if not program.is_file():
        pytest.skip("the headers of TensorRT or CUDA are missing: `make plugins` fetches them")
    return program


def test_the_emulation_notices_broken_kernels(emulated_path: Path) -> None:
    run_check(emulated_path.parent / "emulation_check")


def test_plugin_objects_on_host_memory(plugin_check: Path, emulated_path: Path) -> None:
    log = run_check(plugin_check, emulated_path, "--enqueue")
    assert "[megalodon] TimestepNorm: field epsilon is nan, expected a positive number" in log
    assert "[megalodon] ComplexEMA: unknown field no_such_field" in log


def test_plugin_objects_of_the_real_library(plugin_check: Path, plugin_path: Path) -> None:
    run_check(plugin_check, plugin_path)
