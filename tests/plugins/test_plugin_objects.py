"""Programs that check themselves: the plugins without TensorRT, and the emulation with broken kernels."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from megalodon_deploy.engine.toolchain import build_emulated

RTX_VARIABLE = "TENSORRT_RTX_ROOT"  # as the C++ runtime's build calls it


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


@pytest.fixture(scope="session")
def rtx_path(repository: Path) -> Path:
    """The emulated library and `plugin_test`, compiled with the headers of TensorRT 11 or TensorRT-RTX."""
    if not (root := os.environ.get(RTX_VARIABLE)):
        pytest.skip(f"{RTX_VARIABLE} is not set: no headers of TensorRT 11 or TensorRT-RTX beside those of 10")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TENSORRT_ROOT", root)
        return build_emulated(repository / "build" / "emulated-rtx")


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


@pytest.mark.parametrize("library_of", ["10", "rtx"])
@pytest.mark.parametrize("tests_of", ["10", "rtx"])
def test_both_kinds_of_headers_fit_each_other(
    plugin_test: Path, emulated_path: Path, rtx_path: Path, tests_of: str, library_of: str
) -> None:
    """TensorRT 11 took functions out of the classes of TensorRT 10; ours lie where both look for them."""
    program = plugin_test if tests_of == "10" else rtx_path.parent / "plugin_test"
    assert "SKIPPED" not in check_plugins(program, emulated_path if library_of == "10" else rtx_path)
