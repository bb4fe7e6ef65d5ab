"""What this machine has for the path from checkpoint to stream, and what each missing part would enable."""

from __future__ import annotations

import ctypes
import ctypes.util
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata

from megalodon_deploy.console import format_bytes
from megalodon_deploy.cpus import usable_cpus
from megalodon_deploy.errors import UserError

_CUDA_DRIVER_NAMES = ("libcuda.so.1", "nvcuda.dll")
_TOOLCHAIN = "python -m megalodon_deploy.engine.toolchain"
_COMPUTE_MAJOR, _COMPUTE_MINOR = 75, 76  # CUdevice_attribute values of the CUDA driver API


@dataclass(frozen=True)
class Finding:
    """One part: what was found (None: missing), and what it is for."""

    part: str
    found: str | None
    enables: str
    remedy: str  # what to do when it is missing

    def to_dict(self) -> dict[str, str | None]:
        return asdict(self)


def diagnose() -> list[Finding]:
    """Look at every part, in the order of the path. Never raises for a missing part."""
    return [
        Finding("Python", platform.python_version(), "everything", ""),
        Finding("CPU", f"{platform.machine()}, {usable_cpus()} cores", "everything", ""),
        _package("torch", "export, verify, train", "export"),
        _package("onnx-ir", "export", "export"),
        _package(("onnxruntime", "onnxruntime-gpu"), "generate, verify, bench", "cpu"),
        _package("polygraphy", "build, verify", "build"),
        _package("tensorrt-rtx-cu13", "build --target tensorrt-rtx", "build"),
        _package(("tensorrt-cu13", "tensorrt"), "build --target tensorrt", "tensorrt"),
        _package("cuda-bindings", "running engines, onnxruntime on CUDA", "cuda"),
        _package("sentencepiece", "SentencePiece tokenizers", "sentencepiece"),
        Finding("CUDA driver", _cuda_driver(), "running engines", "install NVIDIA's driver"),
        Finding("GPU", visible_gpus(), "running engines", "none is visible to the CUDA driver"),
        Finding("nvcc", _nvcc(), "compiling the plugin library", _extra("cuda-compiler")),
        Finding("TensorRT headers", _tensorrt_headers(), "compiling the plugin library", "set TENSORRT_ROOT"),
        Finding("plugin library", _plugin_library(), "build with our plugins", f"{_TOOLCHAIN} build-plugins"),
        Finding("packed weights", _packed_weights(), "onnxruntime with share_weights", "set its limit to a number"),
        Finding("CPU operators", _cpu_operators(), "faster onnxruntime sessions", f"{_TOOLCHAIN} build-cpu"),
    ]


def _extra(extra: str) -> str:
    return f"pip install 'megalodon-deploy[{extra}]'"


def _package(names: str | tuple[str, ...], enables: str, extra: str) -> Finding:
    names = (names,) if isinstance(names, str) else names
    for name in names:
        try:
            return Finding(name, metadata.version(name), enables, "")
        except metadata.PackageNotFoundError:
            continue
    return Finding(names[0], None, enables, _extra(extra))


def _load_cuda_driver() -> ctypes.CDLL | None:
    for name in _CUDA_DRIVER_NAMES:
        try:
            driver = ctypes.CDLL(name)
        except OSError:
            continue
        return driver if driver.cuInit(0) == 0 else None
    return None


def _cuda_driver() -> str | None:
    driver = _load_cuda_driver()
    version = ctypes.c_int()
    if driver is None or driver.cuDriverGetVersion(ctypes.byref(version)):
        return None
    return f"CUDA {version.value // 1000}.{version.value % 1000 // 10}"


def visible_gpus() -> str | None:
    """Names of the GPUs that the CUDA driver shows; None where there is no driver or no GPU."""
    return ", ".join(f"{name} (sm_{capability})" for name, capability in _gpus()) or None


def first_gpu_capability() -> int | None:
    """Compute capability, 89 for 8.9, of the GPU that programs take by default."""
    return next((capability for _, capability in _gpus()), None)


def _gpus() -> list[tuple[str, int]]:
    """Name and compute capability of each."""
    driver = _load_cuda_driver()
    count = ctypes.c_int()
    if driver is None or driver.cuDeviceGetCount(ctypes.byref(count)):
        return []
    return [_gpu(driver, index) for index in range(count.value)]


def _gpu(driver: ctypes.CDLL, index: int) -> tuple[str, int]:
    device, name = ctypes.c_int(), ctypes.create_string_buffer(128)
    major, minor = ctypes.c_int(), ctypes.c_int()
    driver.cuDeviceGet(ctypes.byref(device), index)
    driver.cuDeviceGetName(name, len(name), device)
    driver.cuDeviceGetAttribute(ctypes.byref(major), _COMPUTE_MAJOR, device)
    driver.cuDeviceGetAttribute(ctypes.byref(minor), _COMPUTE_MINOR, device)
    return name.value.decode(), 10 * major.value + minor.value


def _or_missing(find: Callable[[], object]) -> str | None:
    try:
        found = find()
    except UserError:
        return None
    return None if found is None else str(found)


def _nvcc() -> str | None:
    from megalodon_deploy.engine.toolchain import find_nvcc

    return _or_missing(find_nvcc)


def _tensorrt_headers() -> str | None:
    from megalodon_deploy.engine.toolchain import find_tensorrt_headers

    return _or_missing(find_tensorrt_headers)


def _plugin_library() -> str | None:
    from megalodon_deploy.engine.library import find_plugin_library

    return _or_missing(find_plugin_library)


def _packed_weights() -> str | None:
    """How much of the cache they take."""
    from megalodon_deploy.runtime.executors.packed_cache import limit_bytes, list_entries, packed_root

    limit = _or_missing(lambda: format_bytes(limit_bytes()))
    total = format_bytes(sum(entry.size_bytes for entry in list_entries()))
    return limit and f"{total} of at most {limit}, in {packed_root()}"


def _cpu_operators() -> str | None:
    from megalodon_deploy.engine.library import find_onnxruntime_operators

    return _or_missing(find_onnxruntime_operators)
