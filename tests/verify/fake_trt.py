"""TensorRT-RTX without a GPU, under the real Polygraphy: its real module, but for what runs an engine; and CUDA's
copies between host and device, both of which are this machine's memory."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Mapping
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import polygraphy.cuda.cuda
import pytest

Arrays = dict[str, np.ndarray]
Compute = Callable[[Arrays], Arrays]
_NAMES = {
    "float32": "FLOAT",
    "float16": "HALF",
    "bfloat16": "BF16",
    "float8_e4m3fn": "FP8",
    "int8": "INT8",
    "int64": "INT64",
}
STREAM = 4242


class HostCuda:
    """Polygraphy's view of CUDA's runtime library. What is allocated begins as 0xFF: NaN in every float type."""

    def __init__(self) -> None:
        self.blocks: dict[int, Any] = {}

    def malloc(self, nbytes: int) -> int:
        assert nbytes > 0
        block = ctypes.create_string_buffer(b"\xff" * nbytes, nbytes)
        self.blocks[ctypes.addressof(block)] = block
        return ctypes.addressof(block)

    def free(self, ptr: int) -> None:
        if ptr:
            del self.blocks[ptr]

    def memcpy(self, dst: int, src: int, nbytes: int, kind: Any, stream_ptr: int | None = None) -> None:
        assert stream_ptr in (None, STREAM)
        ctypes.memmove(dst, src, nbytes)

    def create_stream(self) -> int:
        return STREAM

    def destroy_stream(self, ptr: int) -> None:
        assert ptr == STREAM

    def stream_synchronize(self, ptr: int) -> None:
        assert ptr == STREAM


class FakeRuntime:
    def __init__(self, logger: Any) -> None:
        self.logger = logger

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> Any:
        return sys.modules["tensorrt_rtx"].make_engine(self.logger, serialized_engine)  # type: ignore[attr-defined]


class FakeEngine:
    """Names, types and dimensions of inputs and outputs; `compute` maps one to the other."""

    def __init__(self, trt: Any, inputs: Mapping[str, str], outputs: Mapping[str, str], compute: Compute) -> None:
        self.trt, self.inputs, self.outputs, self.compute = trt, inputs, outputs, compute
        self.num_io_tensors = len(inputs) + len(outputs)

    def get_tensor_name(self, index: int) -> str:
        return [*self.inputs, *self.outputs][index]

    def get_tensor_mode(self, name: str) -> Any:
        return self.trt.TensorIOMode.INPUT if name in self.inputs else self.trt.TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> Any:
        return getattr(self.trt.DataType, _NAMES[{**self.inputs, **self.outputs}[name]])

    def get_tensor_shape(self, name: str) -> Any:
        return self.trt.Dims([-1])

    def get_tensor_format(self, name: str, profile_index: int) -> Any:
        return self.trt.TensorFormat.LINEAR

    def is_shape_inference_io(self, name: str) -> bool:
        return name == "position"  # stays on the host

    def get_aliased_input_tensor(self, name: str) -> str | None:
        return None

    def create_execution_context(self) -> FakeContext:
        return FakeContext(self)


class FakeContext:
    active_optimization_profile = 0

    def __init__(self, engine: FakeEngine) -> None:
        self.engine = engine
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.allocators: dict[str, Any] = {}

    def set_all_tensors_debug_state(self, flag: bool) -> bool:
        return True

    def set_debug_listener(self, listener: Any) -> bool:
        return True

    def get_tensor_shape(self, name: str) -> Any:
        return self.engine.trt.Dims(self.shapes.get(name, (-1,)))

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = tuple(shape)
        return True

    def get_tensor_address(self, name: str) -> int:
        return self.addresses.get(name, 0)

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self.addresses[name] = memory
        return True

    def set_output_allocator(self, name: str, output_allocator: Any) -> bool:
        self.allocators[name] = output_allocator
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        assert stream_handle == STREAM
        feeds = {name: self._read(name, np.dtype(kind)) for name, kind in self.engine.inputs.items()}
        try:
            outputs = self.engine.compute(feeds)
        except Exception as error:
            self.engine.trt.logger.log(self.engine.trt.ILogger.Severity.ERROR, str(error))
            return False
        for name, kind in self.engine.outputs.items():
            array = np.ascontiguousarray(outputs[name])
            assert array.dtype == kind, name
            allocator = self.allocators[name]
            address = allocator.reallocate_output_async(name, 0, max(array.nbytes, 1), 256, stream_handle)
            ctypes.memmove(address, array.ctypes.data, array.nbytes)
            allocator.notify_shape(name, self.engine.trt.Dims(array.shape))
        return True

    def _read(self, name: str, dtype: np.dtype) -> np.ndarray:
        shape, address = self.shapes[name], self.addresses[name]
        assert address, f"{name} has no address"
        nbytes = int(np.prod(shape)) * dtype.itemsize
        return np.frombuffer(ctypes.string_at(address, nbytes), dtype).reshape(shape)


def install(
    monkeypatch: pytest.MonkeyPatch, inputs: Mapping[str, str], outputs: Mapping[str, str], compute: Compute
) -> ModuleType:
    """TensorRT-RTX's module and CUDA, as if a GPU were here. `inputs` and `outputs`: types by name."""
    import tensorrt_rtx

    fake = ModuleType("tensorrt_rtx")
    fake.__dict__.update(vars(tensorrt_rtx))
    fake.ICudaEngine, fake.IExecutionContext, fake.Runtime = FakeEngine, FakeContext, FakeRuntime  # type: ignore[attr-defined]
    fake.get_plugin_registry = lambda: SimpleNamespace(all_creators=[], load_library=lambda path: object())  # type: ignore[attr-defined]

    def make_engine(logger: Any, content: bytes) -> FakeEngine | None:
        fake.logger = logger  # type: ignore[attr-defined]
        if content != b"no engine":
            logger.log(tensorrt_rtx.ILogger.Severity.ERROR, "magic tag does not match")
            return None
        return FakeEngine(fake, inputs, outputs, compute)

    fake.make_engine = make_engine  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", fake)
    monkeypatch.setattr(polygraphy.cuda.cuda, "G_CUDA", HostCuda())
    return fake
