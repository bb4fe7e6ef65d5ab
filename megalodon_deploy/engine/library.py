"""Where the compiled libraries are, and whether they are the ones that this package was written for.

`libmegalodon.so` holds the TensorRT plugins and CUDA kernels, `libmegalodon_onnxruntime.so` the operators for ONNX
Runtime's CPU provider.

Imports neither PyTorch nor ONNX nor TensorRT.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

from megalodon_deploy.errors import EngineError, MissingDependencyError

LIBRARY_VARIABLE = "MEGALODON_PLUGIN_LIBRARY"
LIBRARY_FILE = "libmegalodon.so"
REGISTER_FILE = "libmegalodon_register.so"  # for tools that only dlopen a library, such as `polygraphy --plugins`
KERNELS_VARIABLE = "MEGALODON_KERNELS"  # "reference": standard operators in place of ours; "cuda": ours or an error
OPERATORS_VARIABLE = "MEGALODON_ONNXRUNTIME_LIBRARY"
OPERATORS_FILE = "libmegalodon_onnxruntime.so"
ABI_VERSION = 2  # MGD_ABI_VERSION of plugins/include/megalodon/megalodon.h

_PACKAGE_DIR = Path(__file__).resolve().parent.parent


def repository_root() -> Path | None:
    """The checkout that this package runs from, None when it was installed without one."""
    root = _PACKAGE_DIR.parent
    return root if (root / "plugins" / "CMakeLists.txt").is_file() else None


def plugin_sources() -> Path:
    """The folder `plugins`: the checkout's, or the copy in an installed package."""
    return (repository_root() or _PACKAGE_DIR) / "plugins"


def cache_dir() -> Path:
    """This package's directory in the user's cache: downloaded headers, and libraries built without a checkout."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "megalodon-deploy"


def default_build_dir() -> Path:
    """Where `build-plugins` builds, and so where `find_plugin_library` looks."""
    root = repository_root()
    return (root / "build" if root else cache_dir()) / "plugins"


def find_plugin_library() -> Path:
    """Path of libmegalodon.so: $MEGALODON_PLUGIN_LIBRARY, else what `build-plugins` built.

    Raises `EngineError` when the variable names no file, `MissingDependencyError` when nothing was built.
    """
    if chosen := os.environ.get(LIBRARY_VARIABLE):
        if not Path(chosen).is_file():
            raise EngineError(f"{LIBRARY_VARIABLE} = {chosen}: no such file; unset it or name a {LIBRARY_FILE}")
        return Path(chosen).resolve()
    path = default_build_dir() / LIBRARY_FILE
    if path.is_file():
        return path
    raise MissingDependencyError(
        f"{path} is missing; build it: python -m megalodon_deploy.engine.toolchain build-plugins, "
        f"or set {LIBRARY_VARIABLE}"
    )


def default_operators_dir() -> Path:
    """Where `build-cpu` builds, and so where `find_onnxruntime_operators` looks."""
    return default_build_dir().parent / "onnxruntime"


def find_onnxruntime_operators() -> Path | None:
    """Path of libmegalodon_onnxruntime.so: $MEGALODON_ONNXRUNTIME_LIBRARY, else what `build-cpu` built, else None.

    Raises `EngineError` when the variable names no file.
    """
    if chosen := os.environ.get(OPERATORS_VARIABLE):
        if not Path(chosen).is_file():
            raise EngineError(f"{OPERATORS_VARIABLE} = {chosen}: no such file; unset it or name a {OPERATORS_FILE}")
        return Path(chosen).resolve()
    path = default_operators_dir() / OPERATORS_FILE
    return path if path.is_file() else None


def abi_version(path: Path) -> int:
    """The ABI version of the library at `path`. Raises `EngineError` when it is no libmegalodon or cannot be loaded."""
    try:
        version = ctypes.CDLL(str(path)).mgd_abi_version
    except OSError as error:
        raise EngineError(f"{path} cannot be loaded ({error}); build it again with build-plugins") from error
    except AttributeError as error:
        raise EngineError(f"{path} is no libmegalodon: it has no mgd_abi_version; check {LIBRARY_VARIABLE}") from error
    version.restype = ctypes.c_int32
    return int(version())


def check_plugins(path: Path) -> None:
    """Raises `EngineError` when the library at `path` holds kernels alone; `check_abi` has found it to be ours."""
    if not hasattr(ctypes.CDLL(str(path)), "getCreators"):
        raise EngineError(f"{path} has no TensorRT plugins; build it again without --without-tensorrt")


def check_abi(path: Path) -> None:
    """Raises `EngineError` when the library at `path` has another ABI version than this package."""
    found = abi_version(path)
    if found != ABI_VERSION:
        raise EngineError(f"{path} has ABI version {found}, expected {ABI_VERSION}; build it again with build-plugins")
