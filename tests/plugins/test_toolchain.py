"""Finding compilers and headers, and building with each kind of nvcc."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from megalodon_deploy.engine import library, toolchain
from megalodon_deploy.errors import EngineError, MissingDependencyError


def fake_nvcc(folder: Path, version: str) -> Path:
    """A program in folder/bin that answers as nvcc of that version does."""
    path = folder / "bin" / "nvcc"
    path.parent.mkdir(parents=True)
    path.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {version}, V{version}.1'\n")
    path.chmod(0o755)
    return path


def fake_headers(folder: Path, major: int) -> Path:
    folder.mkdir(parents=True)
    (folder / "NvInferRuntime.h").touch()
    (folder / "NvInferVersion.h").write_text(f"#define TRT_MAJOR_ENTERPRISE {major}\n")
    return folder


@pytest.fixture
def bare_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No variable names a tool, PATH and the user's cache are empty."""
    for name in ("CUDA_HOME", "CUDA_PATH", "TENSORRT_ROOT", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "path" / "bin"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def candidates(*paths: Path) -> Iterator[tuple[Path, bool]]:
    return ((path, False) for path in paths)


def test_cuda_home_comes_before_path(bare_machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home, on_path = fake_nvcc(bare_machine / "home", "13.2"), fake_nvcc(bare_machine / "path", "13.1")
    assert toolchain.find_nvcc() == on_path
    monkeypatch.setenv("CUDA_HOME", str(bare_machine / "home"))
    assert toolchain.find_nvcc() == home
    assert toolchain.find_cuda().root == bare_machine / "home"


def test_an_old_nvcc_is_passed_over(bare_machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = fake_nvcc(bare_machine / "old", "12.4"), fake_nvcc(bare_machine / "new", "13.0")
    monkeypatch.setattr(toolchain, "_nvcc_candidates", lambda: candidates(old, new))
    assert toolchain.find_nvcc() == new
    monkeypatch.setattr(toolchain, "_nvcc_candidates", lambda: candidates(old))
    with pytest.raises(MissingDependencyError, match=r"13\.0 or later .*12\.4.*cuda-compiler"):
        toolchain.find_nvcc()
    monkeypatch.setattr(toolchain, "_nvcc_candidates", lambda: candidates(bare_machine / "absent"))
    with pytest.raises(MissingDependencyError, match="cuda-compiler"):
        toolchain.find_nvcc()


def test_tensorrt_root_must_have_headers_of_version_10(bare_machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good, old = fake_headers(bare_machine / "good" / "include", 10), fake_headers(bare_machine / "old", 8)
    monkeypatch.setenv("TENSORRT_ROOT", str(good.parent))
    assert toolchain.find_tensorrt_headers() == good
    for folder in (old, bare_machine / "absent"):
        monkeypatch.setenv("TENSORRT_ROOT", str(folder))
        with pytest.raises(EngineError, match="TENSORRT_ROOT = "):
            toolchain.find_tensorrt_headers()


def test_downloaded_headers_are_found_again(bare_machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if any(Path("/usr/include").rglob("NvInferRuntime.h")):
        pytest.skip("this system has TensorRT headers of its own, which come first")
    with pytest.raises(MissingDependencyError, match="build-plugins"):
        toolchain.find_tensorrt_headers()
    cached = fake_headers(bare_machine / "cache" / "megalodon-deploy" / "kernel-lens-2.0.1" / "include", 10)
    assert toolchain.find_tensorrt_headers() == cached


def test_a_failed_or_foreign_download_leaves_nothing(bare_machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(EngineError, match="cannot download kernel-lens"):
        toolchain.download_tensorrt_headers()
    pip = bare_machine / "pip"
    pip.write_text('#!/bin/sh\nwhile [ "$1" != --dest ]; do shift; done; echo other > "$2/kernel_lens.whl"\n')
    pip.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(pip))
    with pytest.raises(EngineError, match=r"kernel_lens\.whl is not the known file"):
        toolchain.download_tensorrt_headers()
    assert not any((bare_machine / "cache").rglob("*.h"))


def test_missing_tools_are_named(bare_machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", str(bare_machine / "python"))
    with pytest.raises(MissingDependencyError, match=r"ninja was not found.*cuda-compiler"):
        toolchain.find_program("ninja")
    with pytest.raises(MissingDependencyError, match=r"no C\+\+ compiler"):
        toolchain.check_host_compiler()


def test_a_failed_build_is_one_line_with_the_log(tmp_path: Path, emulated_path: Path) -> None:
    source = tmp_path / "plugins"
    source.mkdir()
    (source / "CMakeLists.txt").write_text("cmake_minimum_required(VERSION 3.24)\nproject(broken LANGUAGES CXX)\n")
    with open(source / "CMakeLists.txt", "a") as file:
        file.write("add_library(broken SHARED broken.cpp)\n")
    (source / "broken.cpp").write_text("int broken = no_such_name;\n")
    with pytest.raises(EngineError, match=r"no_such_name.*build\.log") as caught:
        toolchain.build_emulated(tmp_path / "build", source_dir=source)
    assert "\n" not in str(caught.value)
    (source / "CMakeLists.txt").write_text("no_such_command()\n")
    with pytest.raises(EngineError, match=r"CMake failed: .*configure\.log"):
        toolchain.build_emulated(tmp_path / "other", source_dir=source)
    with pytest.raises(EngineError, match="no plugin sources in"):
        toolchain.build_emulated(tmp_path / "third", source_dir=tmp_path / "absent")


def test_an_up_to_date_build_does_nothing(emulated_path: Path) -> None:
    before = emulated_path.stat().st_mtime_ns
    stages: list[str] = []
    toolchain.build_emulated(emulated_path.parent, progress=lambda stage, fraction: stages.append(stage))
    assert emulated_path.stat().st_mtime_ns == before
    assert stages == []


def wheel_compiler() -> Path | None:
    return next((path for path, from_wheels in toolchain._nvcc_candidates() if from_wheels), None)


def test_the_compiler_from_pypi_builds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plugin_path: Path) -> None:
    """For one architecture, with the system's CUDA out of sight and warnings as errors."""
    compiler = wheel_compiler()
    if compiler is None:
        pytest.skip("no nvcc from PyPI: pip install 'megalodon-deploy[cuda-compiler]'")
    if toolchain.find_cuda().from_wheels:
        pytest.skip("this machine has no other nvcc: the library under test was built with it")
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("c++", "g++", "gcc", "cc", "as", "ld", "sh", "rm", "cat", "nm", "ar", "ranlib", "strip", "objdump"):
        if found := shutil.which(name):
            (tools / name).symlink_to(found)
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tools))
    monkeypatch.setattr(toolchain, "_nvcc_candidates", lambda: iter([(compiler, True)]))
    built = toolchain.build_plugins(tmp_path / "build", architectures="90-real", warnings_as_errors=True)
    library.check_abi(built)
    library.check_plugins(built)


def test_kernels_alone_need_no_header_of_tensorrt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plugin_path: Path
) -> None:
    """All but the compilation, which takes nvcc as long as that of the whole library."""
    monkeypatch.setenv("TENSORRT_ROOT", str(tmp_path / "absent"))
    with pytest.raises(EngineError, match="TENSORRT_ROOT"):
        toolchain.build_plugins(tmp_path, architectures="90-real")
    monkeypatch.setattr(toolchain, "_compile", lambda *_: None)
    toolchain.build_plugins(tmp_path, architectures="90-real", tensorrt=False)
    sources = (tmp_path / "build.ninja").read_text()
    assert "complex_ema/launch.cu" in sources
    assert "complex_ema/c_api.cpp" in sources
    assert "plugin.cpp" not in sources
    assert "megalodon_register" not in sources


def test_a_library_without_plugins_builds_no_engine(plugin_path: Path) -> None:
    library.check_plugins(plugin_path)
    with pytest.raises(EngineError, match=r"libc\.so\.6 has no TensorRT plugins; build it again without"):
        library.check_plugins(Path("libc.so.6"))


def test_the_command_prints_the_library(plugin_path: Path) -> None:
    command = [sys.executable, "-m", "megalodon_deploy.engine.toolchain", "build-plugins"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ)
    assert done.stdout.strip() == str(plugin_path)
    done = subprocess.run([*command, "--source", "/nonexistent"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("error: no plugin sources in /nonexistent")
