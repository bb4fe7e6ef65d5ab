"""Compile the C++ runtime, its examples and its tests.

    python cpp/build.py                        into build/cpp
    python cpp/build.py --sanitize thread      into build/cpp-thread

CMake does it; this finds CMake, and the headers of TensorRT and CUDA, without which the library has no TensorRT
backend. Users who only want the library can call CMake themselves: see README.md.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from megalodon_deploy.engine.toolchain import check_host_compiler, find_cuda, find_program, find_tensorrt_headers
from megalodon_deploy.errors import EngineError, MissingDependencyError, UserError

SOURCE = Path(__file__).resolve().parent
SANITIZERS = ("address", "thread")
LIBRARY_FILE = "libmegalodon_runtime.so"

_PACKAGES = {"nlohmann_json": "nlohmann-json3-dev", "OpenSSL": "libssl-dev", "GTest": "libgtest-dev"}


def build(sanitize: str = "", *, cmake_arguments: Sequence[str] = ()) -> Path:
    """Build everything, or with sanitizers the tests alone; returns the directory. Nothing is done twice.

    Raises `MissingDependencyError` naming what to install, `EngineError` when the compilation fails.
    """
    check_host_compiler()
    folder = SOURCE.parent / "build" / ("cpp" + (f"-{sanitize}" if sanitize else ""))
    folder.mkdir(parents=True, exist_ok=True)
    ninja = find_program("ninja")
    configure = [str(find_program("cmake")), "-G", "Ninja", "-S", str(SOURCE), "-B", str(folder)]
    configure += [f"-DCMAKE_MAKE_PROGRAM={ninja}", f"-DMEGALODON_SANITIZE={sanitize}", "-DMEGALODON_BUILD_TESTS=ON"]
    configure += ["-DCMAKE_COMPILE_WARNING_AS_ERROR=ON", *cmake_arguments]
    configure += [f"-DMEGALODON_BUILD_EXAMPLES={'OFF' if sanitize else 'ON'}", *_tensorrt_arguments()]
    targets = ["runtime_tests"] if sanitize else []
    with open(folder / ".lock", "w") as lock:  # parallel test processes ask for the same one
        fcntl.flock(lock, fcntl.LOCK_EX)
        _run(configure, folder / "configure.log")
        _run([str(ninja), "-C", str(folder), *targets], folder / "build.log")
    return folder


def _tensorrt_arguments() -> list[str]:
    """Nothing where the headers are missing: CMakeLists.txt leaves the backend out."""
    try:
        headers, cuda = find_tensorrt_headers(), find_cuda().root / "include"
    except MissingDependencyError:
        return []
    rtx_root = os.environ.get("TENSORRT_RTX_ROOT")
    folders = [headers, *([Path(rtx_root) / "include"] if rtx_root else [])]
    return [f"-DMEGALODON_TENSORRT_INCLUDE={';'.join(map(str, folders))}", f"-DMEGALODON_CUDA_INCLUDE={cuda}"]


def _run(command: Sequence[str], log: Path) -> None:
    with open(log, "w") as file:
        done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False)
    if not done.returncode:
        return
    text = log.read_text(errors="replace")
    for package, debian in _PACKAGES.items():
        if f"find_package({package}" in text.replace('"', "") or f"Could NOT find {package}" in text:
            raise MissingDependencyError(f"{package} was not found; apt-get install {debian}")
    first = next((line.strip() for line in text.splitlines() if "error" in line.lower()), "no error line")
    raise EngineError(f"the C++ runtime does not build: {first}; see {log}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sanitize", choices=SANITIZERS, default="", help="build with sanitizers, for tests")
    try:
        folder = build(parser.parse_args().sanitize)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(folder / LIBRARY_FILE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
