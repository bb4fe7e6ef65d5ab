"""The GPU through NVIDIA's `cuda.bindings`: the only module that imports it. Nothing here decides anything."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from megalodon_deploy.errors import EngineError, MissingDependencyError

try:
    from cuda.bindings import driver as cu
    from cuda.bindings import runtime as rt
except ImportError as error:
    raise MissingDependencyError(
        "running on a GPU needs cuda-bindings: pip install 'megalodon-deploy[cuda]'"
    ) from error


class CudaGpu:
    """Raises `EngineError` without a driver or such a GPU.

    `index` None: the context that is current in this thread (one made by PyCUDA, for example), else the first GPU's.
    `stream` None: a stream of its own; else one of the caller's in that context, which the caller keeps alive.
    """

    def __init__(self, index: int | None = None, stream: int | None = None) -> None:
        try:
            _check(cu.cuInit(0))
            count = int(_check(cu.cuDeviceGetCount()))
        except (RuntimeError, EngineError) as error:  # cuda.bindings raises RuntimeError where there is no driver
            text = " ".join(str(error).split())
            raise EngineError(f"no NVIDIA GPU can be used here ({text}); run it on a machine that has one") from error
        self._context = _choose_context(index, count)
        with self.current():
            device = _check(cu.cuCtxGetDevice())
            self.index = int(device)
            self.name = _check(cu.cuDeviceGetName(128, device)).split(b"\0")[0].decode(errors="replace")
            self.capability = _capability(device)
            own = rt.cudaStreamNonBlocking
            self.stream = int(_check(rt.cudaStreamCreateWithFlags(own))) if stream is None else stream

    @contextmanager
    def current(self) -> Iterator[None]:
        _check(cu.cuCtxPushCurrent(self._context))
        try:
            yield
        finally:
            _check(cu.cuCtxPopCurrent())

    def allocate(self, size_bytes: int) -> int:
        result = rt.cudaMalloc(max(size_bytes, 1))
        if result[0] == rt.cudaError_t.cudaErrorMemoryAllocation:
            free_bytes = _check(rt.cudaMemGetInfo())[0]
            wanted, free = f"{size_bytes / 1e9:.2f} GB", f"{free_bytes / 1e9:.2f} GB"
            raise EngineError(f"{self.name}: no room for {wanted}, {free} are free; open fewer slots")
        address = int(_check(result))
        self.clear(address, size_bytes)
        return address

    def allocate_pinned(self, size_bytes: int) -> int:
        address = int(_check(rt.cudaMallocHost(max(size_bytes, 1))))
        ctypes.memset(address, 0, size_bytes)
        return address

    def free(self, address: int) -> None:
        _check(rt.cudaFree(address))

    def free_pinned(self, address: int) -> None:
        _check(rt.cudaFreeHost(address))

    def copy(self, target: int, source: int, size_bytes: int) -> None:
        _check(rt.cudaMemcpyAsync(target, source, size_bytes, rt.cudaMemcpyKind.cudaMemcpyDefault, self.stream))

    def copy_rows(
        self, target: int, target_pitch: int, source: int, source_pitch: int, width_bytes: int, num_rows: int
    ) -> None:
        kind = rt.cudaMemcpyKind.cudaMemcpyDefault
        _check(
            rt.cudaMemcpy2DAsync(target, target_pitch, source, source_pitch, width_bytes, num_rows, kind, self.stream)
        )

    def clear(self, address: int, size_bytes: int) -> None:
        _check(rt.cudaMemsetAsync(address, 0, size_bytes, self.stream))

    def synchronize(self) -> None:
        _check(rt.cudaStreamSynchronize(self.stream))

    def create_event(self) -> int:
        return int(_check(rt.cudaEventCreateWithFlags(rt.cudaEventDisableTiming)))

    def destroy_event(self, event: int) -> None:
        _check(rt.cudaEventDestroy(event))

    def record(self, event: int) -> None:
        _check(rt.cudaEventRecord(event, self.stream))

    def wait(self, event: int) -> None:
        _check(rt.cudaEventSynchronize(event))

    def begin_capture(self) -> None:
        mode = rt.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal  # other threads may go on using CUDA
        _check(rt.cudaStreamBeginCapture(self.stream, mode))

    def end_capture(self) -> int | None:
        error, graph = rt.cudaStreamEndCapture(self.stream)
        if error != rt.cudaError_t.cudaSuccess:
            rt.cudaGetLastError()  # an invalidated capture is no failure of what follows
            return None
        error, executable = rt.cudaGraphInstantiate(graph, 0)
        _check(rt.cudaGraphDestroy(graph))
        if error != rt.cudaError_t.cudaSuccess:
            rt.cudaGetLastError()
            return None
        return int(executable)

    def launch(self, graph: int) -> None:
        _check(rt.cudaGraphLaunch(graph, self.stream))

    def destroy_graph(self, graph: int) -> None:
        _check(rt.cudaGraphExecDestroy(graph))


def copy_to_host(target: int, source: int, size_bytes: int, stream: int | None) -> None:
    """Copy device memory of the current context, after what its stream holds; returns when it is done."""
    if stream is not None:
        _check(rt.cudaStreamSynchronize(stream))
    _check(rt.cudaMemcpy(target, source, size_bytes, rt.cudaMemcpyKind.cudaMemcpyDefault))


def _check(result: tuple[Any, ...]) -> Any:
    """What a call returned besides its status. Raises `EngineError` naming the status unless it is success."""
    status, *values = result
    if int(status):
        raise EngineError(f"CUDA: {status.name}; the GPU's memory or driver failed, open the session again")
    return values[0] if len(values) == 1 else tuple(values)


def _choose_context(index: int | None, count: int) -> Any:
    current = _check(cu.cuCtxGetCurrent())
    if index is None and int(current):
        return current
    if not 0 <= (index or 0) < count:
        raise EngineError(f"device cuda:{index or 0}: this machine has {count} GPUs, counted from 0")
    return _check(cu.cuDevicePrimaryCtxRetain(_check(cu.cuDeviceGet(index or 0))))


def _capability(device: Any) -> int:
    attribute = cu.CUdevice_attribute
    major, minor = (
        int(_check(cu.cuDeviceGetAttribute(which, device)))
        for which in (
            attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
            attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
        )
    )
    return 10 * major + minor
