"""Find the tools that compile the libraries, and run them.

    python -m megalodon_deploy.engine.toolchain build-plugins
    python -m megalodon_deploy.engine.toolchain build-cpu

nvcc comes from a CUDA toolkit or from PyPI wheels, the TensorRT headers from an installation or from a PyPI wheel that
carries them; nothing of TensorRT is linked. Imports neither PyTorch nor ONNX nor TensorRT.
"""

from __future__ import annotations

import argparse
import fcntl
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from megalodon_deploy.engine.library import (
    LIBRARY_FILE,
    OPERATORS_FILE,
    cache_dir,
    default_build_dir,
    default_operators_dir,
    plugin_sources,
)
from megalodon_deploy.errors import EngineError, MissingDependencyError, UserError
from megalodon_deploy.files import atomic_directory, sha256_file

Progress = Callable[[str, float], None]

MIN_CUDA = (13, 0)  # the first release that compiles for every target
MIN_TENSORRT_MAJOR = 10  # the first with IPluginV3
EMULATED_FILE = "libmegalodon_emulated.so"

# PyPI has no TensorRT headers of NVIDIA's own; this package carries those of 10.14, under NVIDIA's Apache-2.0 header.
_HEADER_PACKAGE = "kernel-lens==2.0.1"
_HEADER_SHA256 = "07cc714e8b5e7f34b672f7c7fad93febe7c747be5837ba276b1527370134ffe0"
_HEADER_PREFIX = "kernel_lens/include/tensorrt/"
_EXTRA = "pip install 'megalodon-deploy[cuda-compiler]'"


@dataclass(frozen=True)
class CudaCompiler:
    """An nvcc that is recent enough."""

    nvcc: Path
    root: Path  # of its toolkit: holds include/
    from_wheels: bool


def find_nvcc() -> Path:
    """Path of nvcc: $CUDA_HOME, $CUDA_PATH, PATH, /usr/local/cuda, then the PyPI wheels. Raises as `find_cuda`."""
    return find_cuda().nvcc


def find_cuda() -> CudaCompiler:
    """The first CUDA compiler of at least `MIN_CUDA`. Raises `MissingDependencyError` when there is none."""
    wanted = ".".join(map(str, MIN_CUDA))
    too_old = ""
    for nvcc, from_wheels in _nvcc_candidates():
        version = _nvcc_version(nvcc)
        if version >= MIN_CUDA:
            return CudaCompiler(nvcc, _toolkit_root(nvcc), from_wheels)
        too_old = too_old or f" ({nvcc} is {'.'.join(map(str, version))})"
    raise MissingDependencyError(f"no nvcc of CUDA {wanted} or later was found{too_old}; {_EXTRA}, or set CUDA_HOME")


def _nvcc_candidates() -> Iterator[tuple[Path, bool]]:
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    paths = [Path(home) / "bin" / "nvcc" for home in homes]
    if on_path := shutil.which("nvcc"):
        paths.append(Path(on_path))
    paths.append(Path("/usr/local/cuda/bin/nvcc"))
    yield from ((path, False) for path in paths if os.access(path, os.X_OK))
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        yield from ((path, True) for path in sorted(Path(folder).glob("cu*/bin/nvcc"), reverse=True))


def _nvcc_version(nvcc: Path) -> tuple[int, ...]:
    """(13, 0); (0,) when it cannot tell."""
    found = re.search(r"release (\d+)\.(\d+)", _output_of([nvcc, "--version"]))
    return tuple(map(int, found.groups())) if found else (0,)


def _toolkit_root(nvcc: Path) -> Path:
    """Asked from nvcc itself, which may be a script that calls another."""
    found = re.search(r"^#\$ TOP=(.+)$", _output_of([nvcc, "--dryrun", "-x", "cu", "-c", os.devnull]), re.MULTILINE)
    return Path(found.group(1)).resolve() if found else nvcc.resolve().parent.parent


def _output_of(command: Sequence[str | Path]) -> str:
    """Both output streams; empty when the program cannot be run."""
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    except OSError:
        return ""
    return done.stdout


def find_tensorrt_headers() -> Path:
    """Directory of NvInferRuntime.h: $TENSORRT_ROOT, the system, or what `download_tensorrt_headers` left.

    Raises `EngineError` when TENSORRT_ROOT has no usable headers, `MissingDependencyError` when there are none at all.
    """
    if root := os.environ.get("TENSORRT_ROOT"):
        for folder in (Path(root) / "include", Path(root)):
            if _has_headers(folder):
                return folder
        raise EngineError(
            f"TENSORRT_ROOT = {root}: no NvInferRuntime.h of TensorRT {MIN_TENSORRT_MAJOR} or later in it; correct it"
        )
    system = [Path("/usr/include"), *sorted(Path("/usr/include").glob("*-linux-gnu")), Path("/usr/local/include")]
    for folder in (*system, _header_cache()):
        if _has_headers(folder):
            return folder
    raise MissingDependencyError(
        "no TensorRT headers were found; set TENSORRT_ROOT, or run "
        "`python -m megalodon_deploy.engine.toolchain build-plugins`, which downloads them"
    )


def _has_headers(folder: Path) -> bool:
    version = folder / "NvInferVersion.h"
    if not (folder / "NvInferRuntime.h").is_file() or not version.is_file():
        return False
    found = re.search(r"#define (?:NV_TENSORRT_MAJOR|TRT_MAJOR_ENTERPRISE) (\d+)", version.read_text(errors="replace"))
    return found is not None and int(found.group(1)) >= MIN_TENSORRT_MAJOR


def _header_cache() -> Path:
    return cache_dir() / _HEADER_PACKAGE.replace("==", "-") / "include"


def download_tensorrt_headers() -> Path:
    """Fetch the header package from PyPI into the user's cache; only `build-plugins` calls this.

    Raises `EngineError` when pip fails or the file is not the known one.
    """
    folder = _header_cache()
    with tempfile.TemporaryDirectory() as download:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", download, _HEADER_PACKAGE]
        done = subprocess.run(pip, capture_output=True, text=True, check=False)
        wheels = list(Path(download).glob("*.whl"))
        if done.returncode or len(wheels) != 1:
            reason = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
            raise EngineError(
                f"TensorRT headers: cannot download {_HEADER_PACKAGE} ({reason}); set TENSORRT_ROOT, or pass "
                "--without-tensorrt: PyTorch needs the kernels alone"
            )
        if sha256_file(wheels[0]) != _HEADER_SHA256:
            raise EngineError(f"TensorRT headers: {wheels[0].name} is not the known file; set TENSORRT_ROOT")
        with atomic_directory(folder, overwrite=True) as target, zipfile.ZipFile(wheels[0]) as archive:
            for name in archive.namelist():
                if name.startswith(_HEADER_PREFIX) and name.endswith(".h"):
                    (target / Path(name).name).write_bytes(archive.read(name))
    return folder


def find_program(name: str) -> Path:
    """`cmake` or `ninja`, from this Python's environment or PATH. Raises `MissingDependencyError`."""
    for folder in (str(Path(sys.executable).parent), None):
        if found := shutil.which(name, path=folder):
            return Path(found)
    raise MissingDependencyError(f"{name} was not found; {_EXTRA}, or install {name} with your system's packages")


def check_host_compiler() -> None:
    """Raises `MissingDependencyError` when there is no C++ compiler; CMake finds the same one by itself."""
    names = [os.environ["CXX"].split()[0]] if os.environ.get("CXX", "").strip() else ["c++", "g++", "clang++"]
    if not any(shutil.which(name) for name in names):
        raise MissingDependencyError(f"no C++ compiler ({', '.join(names)}) was found; apt-get install g++")


def build_plugins(
    build_dir: Path | None = None,
    *,
    source_dir: Path | None = None,
    architectures: str | None = None,
    warnings_as_errors: bool = False,
    tensorrt: bool = True,
    download: bool = False,
    cmake_arguments: Sequence[str] = (),
    progress: Progress | None = None,
) -> Path:
    """Compile libmegalodon.so and libmegalodon_register.so; returns the former. Nothing is done twice.

    `architectures` is CMake's list (default: every target). Without `tensorrt` the library has no plugins and no header
    of TensorRT is needed; `download` allows fetching these. `cmake_arguments` come last and win. Raises
    `MissingDependencyError` naming a missing tool, `EngineError` when the compilation fails.
    """
    report = progress or (lambda stage, fraction: None)
    cuda = find_cuda()
    report(f"nvcc: {cuda.nvcc}", 0.0)
    library_flag = f'"-L{cuda.root}/lib"' if cuda.from_wheels else ""  # nvcc looks in lib64, the wheels have lib
    arguments = [
        f"-DCMAKE_CUDA_COMPILER={cuda.nvcc}",
        f"-DCMAKE_CUDA_FLAGS={library_flag}",
        f"-DCMAKE_CUDA_ARCHITECTURES={architectures or ''}",
        *([f"-DMEGALODON_TENSORRT_INCLUDE={_headers(download)}"] if tensorrt else ["-DMEGALODON_TENSORRT=OFF"]),
        f"-DCMAKE_COMPILE_WARNING_AS_ERROR={'ON' if warnings_as_errors else 'OFF'}",
    ]
    folder = build_dir or default_build_dir()
    _build(folder, source_dir, [*arguments, *cmake_arguments], report)
    return folder / LIBRARY_FILE


def build_emulated(
    build_dir: Path,
    *,
    source_dir: Path | None = None,
    cmake_arguments: Sequence[str] = (),
    progress: Progress | None = None,
) -> Path:
    """Compile the kernels for the CPU, for tests; needs no CUDA. Returns the path of the library.

    The TensorRT plugins are in it only where TensorRT's and CUDA's headers are found. Warnings are errors.
    `cmake_arguments` come last: -DMEGALODON_SANITIZE=ON, or the toolchain file of another machine.
    """
    arguments = ["-DMEGALODON_EMULATE=ON", "-DCMAKE_COMPILE_WARNING_AS_ERROR=ON"]
    try:
        arguments += [f"-DMEGALODON_TENSORRT_INCLUDE={find_tensorrt_headers()}"]
        arguments += [f"-DMEGALODON_CUDA_INCLUDE={find_cuda().root / 'include'}"]
    except MissingDependencyError:
        pass  # CMakeLists.txt leaves the plugins out
    _build(build_dir, source_dir, [*arguments, *cmake_arguments], progress or (lambda stage, fraction: None))
    return build_dir / EMULATED_FILE


def build_onnxruntime_operators(build_dir: Path | None = None, *, progress: Progress | None = None) -> Path:
    """Compile libmegalodon_onnxruntime.so, the operators for ONNX Runtime's CPU provider; returns its path.

    Raises as `build_plugins`; needs a C++ compiler, CMake and ninja only.
    """
    folder = build_dir or default_operators_dir()
    arguments = ["-DCMAKE_COMPILE_WARNING_AS_ERROR=ON"]
    _build(folder, plugin_sources() / "onnxruntime", arguments, progress or (lambda stage, fraction: None))
    return folder / OPERATORS_FILE


def _headers(download: bool) -> Path:
    try:
        return find_tensorrt_headers()
    except MissingDependencyError:
        if not download:
            raise
        return download_tensorrt_headers()


def _build(build_dir: Path, source_dir: Path | None, arguments: list[str], report: Progress) -> None:
    source = source_dir or plugin_sources()
    if not (source / "CMakeLists.txt").is_file():
        raise EngineError(f"no plugin sources in {source}; pass --source, the folder plugins of a checkout")
    check_host_compiler()
    build_dir.mkdir(parents=True, exist_ok=True)
    ninja = find_program("ninja")
    with _locked(build_dir):
        _configure(build_dir, source.resolve(), [*arguments, f"-DCMAKE_MAKE_PROGRAM={ninja}"], report)
        _compile(build_dir, ninja, report)


def _configure(build_dir: Path, source: Path, arguments: list[str], report: Progress) -> None:
    """Run CMake, unless the last run had the same arguments; changed CMake files are noticed by ninja."""
    cmake = find_program("cmake")
    command = [str(cmake), "--fresh", "-G", "Ninja", "-S", str(source), "-B", str(build_dir), *arguments]
    stamp = build_dir / "configured.json"
    described = json.dumps(command)
    if stamp.is_file() and stamp.read_text() == described and (build_dir / "build.ninja").is_file():
        return
    report("configure", 0.02)
    stamp.unlink(missing_ok=True)
    log = build_dir / "configure.log"
    with open(log, "w") as file:
        done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        raise _failure("CMake", log)
    stamp.write_text(described)


def _compile(build_dir: Path, ninja: Path, report: Progress) -> None:
    log = build_dir / "build.log"
    environment = os.environ | {"NINJA_STATUS": "[%f/%t] "}
    command = [str(ninja), "-C", str(build_dir)]
    with (
        open(log, "w") as file,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
        ) as process,
    ):
        assert process.stdout is not None, "Bug: the pipe was asked for"
        for line in process.stdout:
            file.write(line)
            if found := re.match(r"\[(\d+)/(\d+)\] \S+ \S+ \S+ (?:.*\.dir/)?(.+)", line):
                report(found.group(3).removesuffix(".o"), int(found.group(1)) / int(found.group(2)))
    if process.returncode:
        raise _failure("compilation", log)


def _failure(what: str, log: Path) -> EngineError:
    """One line: the first error in the log, and where the rest is."""
    lines = log.read_text(errors="replace").splitlines()
    first = next(
        (line.strip() for line in lines if re.search(r"\berror\b|cannot find", line, re.IGNORECASE)), "no error line"
    )
    return EngineError(f"plugins: {what} failed: {first}; see {log}")


@contextmanager
def _locked(build_dir: Path) -> Iterator[None]:
    """One build at a time in one directory: parallel test processes ask for the same one."""
    with open(build_dir / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m megalodon_deploy.engine.toolchain", description=__doc__)
    commands = parser.add_subparsers(required=True, dest="command")
    cpu = commands.add_parser("build-cpu", help=f"compile {OPERATORS_FILE}")
    cpu.add_argument("--build-dir", type=Path, help=f"default: {default_operators_dir()}")
    build = commands.add_parser("build-plugins", help=f"compile {LIBRARY_FILE}")
    build.add_argument("--build-dir", type=Path, help=f"default: {default_build_dir()}")
    build.add_argument("--source", type=Path, help="the plugins/ directory of a checkout; default: our own")
    build.add_argument("--architectures", help="CMake's list, such as '90-real;120-real'; default: every target")
    build.add_argument("--warnings-as-errors", action="store_true")
    headers = build.add_mutually_exclusive_group()
    headers.add_argument("--no-download", action="store_true", help="do not fetch TensorRT headers from PyPI")
    headers.add_argument("--without-tensorrt", action="store_true", help="the kernels alone, which PyTorch calls")
    return parser


def main() -> int:
    """Build, with progress on stderr and the library's path on stdout; 2 on a user's mistake."""
    from megalodon_deploy.console import progress_bar

    options = _parser().parse_args()
    try:
        if options.command == "build-cpu":
            with progress_bar("operators") as progress:
                library = build_onnxruntime_operators(options.build_dir, progress=progress)
        else:
            with progress_bar("plugins") as progress:
                library = build_plugins(
                    options.build_dir,
                    source_dir=options.source,
                    architectures=options.architectures,
                    warnings_as_errors=options.warnings_as_errors,
                    tensorrt=not options.without_tensorrt,
                    download=not options.no_download,
                    progress=progress,
                )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(library)
    return 0


if __name__ == "__main__":
    sys.exit(main())
