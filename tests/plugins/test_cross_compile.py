"""The library for 64-bit ARM, compiled here: Jetson and Grace machines build the same sources."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from megalodon_deploy.engine.toolchain import build_emulated, build_plugins, find_cuda
from megalodon_deploy.errors import MissingDependencyError

COMPILER, MACHINE = "aarch64-linux-gnu-g++", "qemu-aarch64-static"
SYSTEM = Path("/usr/aarch64-linux-gnu")
WHOLE = "MEGALODON_WHOLE_AARCH64"


@pytest.fixture(scope="session")
def toolchain_file(repository: Path) -> Path:
    if shutil.which(COMPILER) is None:
        pytest.skip(f"{COMPILER} is missing: apt-get install g++-aarch64-linux-gnu")
    return repository / "plugins" / "cmake" / "aarch64.cmake"


@pytest.fixture(scope="session")
def emulated_for_arm(repository: Path, toolchain_file: Path) -> Path:
    arguments = [f"-DCMAKE_TOOLCHAIN_FILE={toolchain_file}", "-DCMAKE_CXX_FLAGS_RELEASE=-O0"]  # compiles soonest
    return build_emulated(repository / "build" / "aarch64", cmake_arguments=arguments)


@pytest.fixture(scope="session")
def cuda_runtime_for_arm(repository: Path) -> Path:
    """Folder of libcudart_static.a for aarch64, from the same release as the compiler's."""
    if not os.environ.get(WHOLE):
        pytest.skip(f"{WHOLE} is not set; `make aarch64` sets it")
    folder = repository / "build" / "aarch64-cuda"
    library = folder / "nvidia" / "cu13" / "lib" / "libcudart_static.a"
    if not library.is_file():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder]
        command += ["--platform", "manylinux2014_aarch64", "--only-binary", ":all:", "nvidia-cuda-runtime==13.0.*"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"CUDA's runtime for aarch64 cannot be downloaded: {done.stderr.strip().splitlines()[-1]}")
        with zipfile.ZipFile(next(folder.glob("nvidia_cuda_runtime*.whl"))) as archive:
            archive.extractall(folder)
    return library.parent


def test_host_code_is_for_arm(emulated_for_arm: Path) -> None:
    assert machine_of(emulated_for_arm) == "AArch64"


def test_plugins_pass_on_arm(emulated_for_arm: Path) -> None:
    """On an emulated processor: signedness of char, alignment and exceptions are ARM's."""
    program = emulated_for_arm.parent / "plugin_test"
    if shutil.which(MACHINE) is None or not program.is_file():
        pytest.skip("qemu or GoogleTest is missing: apt-get install qemu-user-static googletest")
    prefix = [MACHINE, "-L", SYSTEM]
    slow = "--gtest_filter=-*RunsOutInEnqueue*:*EnqueueOfARestored*"
    for command in ([emulated_for_arm.parent / "emulation_check"], [program, emulated_for_arm, slow]):
        done = subprocess.run([*prefix, *command], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


def test_whole_library_links_for_arm(repository: Path, toolchain_file: Path, cuda_runtime_for_arm: Path) -> None:
    """With the kernels of Jetson Orin. Minutes of nvcc, so on request."""
    try:
        own = find_cuda().root / "targets" / "x86_64-linux"
        flags = [f"-L{cuda_runtime_for_arm}"]
        if own.is_dir():  # a whole toolkit looks for headers in a folder for ARM that it may not have
            flags += ["-target-dir", own.name]
        arguments = [f"-DCMAKE_TOOLCHAIN_FILE={toolchain_file}", f"-DCMAKE_CUDA_FLAGS={' '.join(flags)}"]
        folder = repository / "build" / "aarch64-plugins"
        built = build_plugins(folder, architectures="87-real", cmake_arguments=arguments)
    except MissingDependencyError as error:
        pytest.skip(f"libmegalodon.so cannot be built here: {error}")
    assert machine_of(built) == "AArch64"


def machine_of(path: Path) -> str:
    header = subprocess.run(["readelf", "-h", path], capture_output=True, text=True, check=True).stdout
    return next(line.split(":")[1].strip() for line in header.splitlines() if "Machine:" in line)
