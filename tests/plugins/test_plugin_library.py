"""The real libmegalodon.so: what it exports, links and carries, and that TensorRT-RTX loads it."""

from __future__ import annotations

import importlib.util
import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from megalodon_deploy.engine import library
from megalodon_deploy.engine.toolchain import find_program
from megalodon_deploy.errors import EngineError, MissingDependencyError
from megalodon_deploy.state import CHUNK_ATTENTION, COMPLEX_EMA, TIMESTEP_NORM, TIMESTEP_NORM_COMPLEX_EMA

TARGETS = {75, 80, 86, 87, 89, 90, 100, 103, 110, 120, 121}
FATBIN_MAGIC = 0xBA55ED50
PTX, CUBIN = 1, 2


def exports(path: Path) -> set[str]:
    """Names of the functions and data that a shared library shows."""
    lines = subprocess.run(["nm", "-D", "--defined-only", path], capture_output=True, text=True, check=True).stdout
    return {line.split()[-1] for line in lines.splitlines()}


def linked_libraries(path: Path) -> set[str]:
    lines = subprocess.run(["readelf", "-d", path], capture_output=True, text=True, check=True).stdout
    return set(re.findall(r"\(NEEDED\).*\[(.+?)\.so", lines))


def device_images(path: Path) -> set[tuple[int, int]]:
    """(kind, compute capability) of every GPU program in the library, from the headers of its fat binaries."""
    data, found, start = path.read_bytes(), set(), 0
    while (start := data.find(struct.pack("<I", FATBIN_MAGIC), start)) >= 0:
        _, _, header_bytes, body_bytes = struct.unpack_from("<IHHQ", data, start)
        entry, end = start + header_bytes, start + header_bytes + body_bytes
        while entry < end:
            kind, _, entry_header_bytes, payload_bytes = struct.unpack_from("<HHIQ", data, entry)
            found.add((kind, struct.unpack_from("<I", data, entry + 28)[0]))
            entry += entry_header_bytes + payload_bytes
        start = end
    return found


def test_only_the_intended_names_are_exported(plugin_path: Path) -> None:
    operators = {"complex_ema", "complex_ema_backward", "timestep_norm", "timestep_norm_backward"}
    functions = {"abi_version", "status_string", *operators, *(f"{name}_workspace_bytes" for name in operators)}
    functions |= {"chunk_attention", "chunk_attention_workspace_bytes", "append_rows"}
    functions |= {"choose_tokens", "choose_tokens_workspace_bytes"}
    functions |= {"timestep_norm_complex_ema", "timestep_norm_complex_ema_workspace_bytes"}
    assert exports(plugin_path) == {"getCreators", "setLoggerFinder"} | {f"mgd_{name}" for name in functions}
    assert exports(plugin_path.parent / library.REGISTER_FILE) == set()


def test_neither_tensorrt_nor_cuda_is_linked(plugin_path: Path) -> None:
    allowed = {"libstdc++", "libgcc_s", "libc", "libm", "ld-linux-x86-64", "ld-linux-aarch64", "libdl", "librt"}
    allowed |= {"libpthread"}
    assert linked_libraries(plugin_path) <= allowed
    assert linked_libraries(plugin_path.parent / library.REGISTER_FILE) <= allowed | {"libmegalodon"}


def test_every_target_has_its_kernels(plugin_path: Path) -> None:
    images = device_images(plugin_path)
    assert {capability for kind, capability in images if kind == CUBIN} == TARGETS
    assert {capability for kind, capability in images if kind == PTX} == {120}


def test_abi_version_is_that_of_the_header(plugin_path: Path, repository: Path) -> None:
    header = (repository / "plugins" / "include" / "megalodon" / "megalodon.h").read_text()
    found = re.search(r"#define MGD_ABI_VERSION (\d+)", header)
    assert found is not None
    assert int(found.group(1)) == library.ABI_VERSION == library.abi_version(plugin_path)
    library.check_abi(plugin_path)


def test_other_libraries_are_refused(tmp_path: Path, plugin_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = tmp_path / "text.so"
    text.write_text("not a library")
    with pytest.raises(EngineError, match="cannot be loaded"):
        library.abi_version(text)
    with pytest.raises(EngineError, match="is no libmegalodon"):
        library.abi_version(Path("libm.so.6"))
    monkeypatch.setattr(library, "ABI_VERSION", library.ABI_VERSION + 1)
    with pytest.raises(EngineError, match=f"has ABI version {library.ABI_VERSION - 1}, expected {library.ABI_VERSION}"):
        library.check_abi(plugin_path)


def test_library_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "default_build_dir", lambda: tmp_path)
    monkeypatch.delenv(library.LIBRARY_VARIABLE, raising=False)
    with pytest.raises(MissingDependencyError, match="build-plugins"):
        library.find_plugin_library()
    built, chosen = tmp_path / library.LIBRARY_FILE, tmp_path / "mine.so"
    built.touch()
    assert library.find_plugin_library() == built
    monkeypatch.setenv(library.LIBRARY_VARIABLE, str(chosen))
    with pytest.raises(EngineError, match=r"mine\.so: no such file"):
        library.find_plugin_library()
    chosen.touch()
    assert library.find_plugin_library() == chosen


def test_without_a_checkout_the_cache_holds_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_PACKAGE_DIR", tmp_path / "site-packages" / "megalodon_deploy")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert library.repository_root() is None
    assert library.default_build_dir() == tmp_path / "megalodon-deploy" / "plugins"
    monkeypatch.delenv(library.LIBRARY_VARIABLE, raising=False)
    with pytest.raises(MissingDependencyError, match="build it: python -m"):
        library.find_plugin_library()


C_CALLER = """
#include <megalodon/megalodon.h>
#include <stdio.h>
int main(void) { printf("%d %s", mgd_abi_version() == MGD_ABI_VERSION, mgd_status_string(MGD_OK)); return 0; }
"""
C_PROJECT = """
cmake_minimum_required(VERSION 3.24)
project(caller LANGUAGES C)
set(CMAKE_C_STANDARD 99)
find_package(megalodon REQUIRED CONFIG)
add_executable(caller caller.c)
target_compile_options(caller PRIVATE -Wall -Wextra -Wpedantic -Werror)
target_link_libraries(caller PRIVATE megalodon::megalodon)
"""


def test_installed_library_serves_a_c_program(tmp_path: Path, plugin_path: Path) -> None:
    cmake = find_program("cmake")
    prefix, source = tmp_path / "prefix", tmp_path / "source"
    source.mkdir()
    (source / "CMakeLists.txt").write_text(C_PROJECT)
    (source / "caller.c").write_text(C_CALLER)
    configure = [cmake, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={find_program('ninja')}", f"-DCMAKE_PREFIX_PATH={prefix}"]
    for command in (
        [cmake, "--install", plugin_path.parent, "--prefix", prefix],
        [*configure, "-S", source, "-B", tmp_path / "build"],
        [cmake, "--build", tmp_path / "build"],
    ):
        subprocess.run(command, check=True, capture_output=True)
    done = subprocess.run([tmp_path / "build" / "caller"], check=True, capture_output=True, text=True)
    assert done.stdout == "1 success"


LIST_CREATORS = """
import tensorrt_rtx as trt
logger = trt.Logger(trt.Logger.ERROR)
registry = trt.get_plugin_registry()
{load}
print(*(f"{{creator.name}}/{{creator.plugin_version}}" for creator in registry.all_creators))
"""
OPERATORS = (COMPLEX_EMA, TIMESTEP_NORM, CHUNK_ATTENTION, TIMESTEP_NORM_COMPLEX_EMA)
OURS = [f"{name}/1" for name in OPERATORS]


def creators_after(load: str) -> list[str]:
    """Plugins known to TensorRT-RTX in a process of its own after running the line `load`."""
    if importlib.util.find_spec("tensorrt_rtx") is None:
        pytest.skip("tensorrt_rtx is not installed: pip install 'megalodon-deploy[build]'")
    program = LIST_CREATORS.format(load=load)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=os.environ)
    return done.stdout.split()


def test_tensorrt_rtx_loads_the_plugins(plugin_path: Path) -> None:
    assert not set(OURS) & set(creators_after(""))
    loaded = creators_after(f"registry.load_library({str(plugin_path)!r})")
    assert [name for name in loaded if name in OURS] == OURS


def test_register_library_needs_only_to_be_loaded(plugin_path: Path) -> None:
    register = str(plugin_path.parent / library.REGISTER_FILE)
    loaded = creators_after(f"import ctypes; ctypes.CDLL({register!r})")
    assert [name for name in loaded if name in OURS] == OURS
