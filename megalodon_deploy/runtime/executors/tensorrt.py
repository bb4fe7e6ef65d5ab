"""TensorRT and TensorRT-RTX: an engine of the bundle on an NVIDIA GPU. Neither PyTorch nor ONNX is imported.

Only the calls into TensorRT are here; what is bound and when is decided in `megalodon_deploy.runtime.cuda`.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megalodon_deploy.bundle import WEIGHTS_FILE
from megalodon_deploy.engine.info import REBUILD, EngineInfo, check_engine, list_engines
from megalodon_deploy.engine.library import check_abi, find_plugin_library
from megalodon_deploy.engine.targets import FLAVOURS, Flavour
from megalodon_deploy.errors import EngineError, MissingDependencyError
from megalodon_deploy.runtime.cuda.arena import Arena
from megalodon_deploy.runtime.cuda.engine import Engine
from megalodon_deploy.runtime.cuda.gpu import Gpu
from megalodon_deploy.runtime.cuda.kernels import Kernels
from megalodon_deploy.runtime.cuda.layout import Tensor
from megalodon_deploy.runtime.cuda.memory import CudaMemory
from megalodon_deploy.runtime.executors.base import activation_dtype
from megalodon_deploy.runtime.executors.compiled_kernels import CompiledKernels
from megalodon_deploy.runtime.executors.engine_choice import Place, choose_engine
from megalodon_deploy.state import LOGITS, POSITION, TOKENS, state_specs

if TYPE_CHECKING:
    from megalodon_deploy.bundle import Bundle


class TensorRTExecutor:
    """Raises `MissingDependencyError` without TensorRT or libmegalodon, `EngineError` when no engine of the bundle
    fits this GPU and TensorRT, or TensorRT refuses it."""

    def __init__(self, bundle: Bundle, flavour: Flavour, gpu: Gpu) -> None:
        trt = import_tensorrt(flavour)
        self.backend: str = flavour
        self.config = bundle.config
        self.activation = activation_dtype(bundle.manifest.precision)
        self.returns_all_logits = bundle.manifest.logits == "all"
        self.gpu = gpu
        self.info = choose_engine(bundle, list_engines(bundle), Place(flavour, trt.__version__, gpu.capability))
        self.engine_path = path = check_engine(bundle, self.info)
        self.library = library = find_plugin_library()
        check_abi(library)
        self.kernels = Kernels(library)
        with gpu.current():
            engine = _Engine(trt, path, self.info, library, gpu)
            self._check_names(engine.names)
            engine.place_weights(bundle.path / WEIGHTS_FILE)
        self.engine: Engine = engine

    def open_slots(self, num_slots: int) -> CudaMemory:
        return CudaMemory(self, num_slots)

    def _check_names(self, found: set[str]) -> None:
        names = {TOKENS, POSITION, LOGITS} | {name for s in state_specs(self.config) for name in (s.past, s.present)}
        if unlike := sorted((names | set(self.info.bundle_weights)) ^ found):
            raise EngineError(
                f"{self.engine_path}: tensor {unlike[0]} does not follow from the bundle's config; {REBUILD}"
            )


class _Engine:
    """A deserialised engine, and the scratch memory that its contexts share: they run one after the other."""

    def __init__(self, trt: Any, path: Path, info: EngineInfo, library: Path, gpu: Gpu) -> None:
        self.max_slots = info.max_batch
        self._trt, self._path, self._gpu = trt, path, gpu
        self._errors = TensorRTErrors(trt)
        if info.plugins:
            load_plugins(trt, library, info)
        self._runtime = trt.Runtime(self._errors.logger)  # has to outlive the engine
        if info.version_compatible:
            self._runtime.engine_host_code_allowed = True  # such an engine brings a runtime of its own
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as engine_bytes:
            self._engine = self._runtime.deserialize_cuda_engine(engine_bytes)
        if self._engine is None:
            raise EngineError(f"{path}: TensorRT {trt.__version__} cannot load it ({self._errors.take()})")
        if info.weights == "streamed":
            # before the first context: what of the weights stays on the GPU, as far as there is room now
            self._engine.weight_streaming_budget_v2 = self._engine.get_weight_streaming_automatic_budget()
        self.names = {self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)}
        self._scratch_bytes = int(self._engine.device_memory_size_v2)
        self._arena = Arena(gpu)
        self._scratch = self._arena.device({"scratch": self._scratch_bytes})["scratch"]
        self._kernels = CompiledKernels(info.engine.sha256, gpu.capability)
        self._places = info.bundle_weights
        self._weights: dict[str, int] = {}  # addresses by input name

    def place_weights(self, file: Path) -> None:
        """Copy the weights that the engine lacks from the bundle's file to the GPU, for all contexts."""
        if not self._places:
            return
        self._check_sizes()
        self._weights = self._arena.device({name: place.size_bytes for name, place in self._places.items()})
        content = np.memmap(file, np.uint8, "r")
        for name, place in self._places.items():
            piece = content[place.offset : place.offset + place.size_bytes]
            if place.offset < 0 or piece.nbytes != place.size_bytes:
                raise EngineError(f"{file} ends before weight {name}; export the bundle again")
            self._gpu.copy(self._weights[name], piece.ctypes.data, piece.nbytes)
        self._gpu.synchronize()  # the file stays mapped until it was read

    def _check_sizes(self) -> None:
        for name, place in self._places.items():
            count = math.prod(self._engine.get_tensor_shape(name))
            wanted = math.ceil(count * self._engine.get_tensor_dtype(name).itemsize)
            if wanted != place.size_bytes:
                raise EngineError(
                    f"{self._path}: weight {name} takes {wanted} bytes in the engine, engine.json says "
                    f"{place.size_bytes}; {REBUILD}"
                )

    def open_context(self, *, fixed_shapes: bool) -> _Context:
        context = self._engine.create_execution_context(self._context_settings(fixed_shapes))
        if context is None:
            raise EngineError(f"TensorRT cannot make an execution context ({self._errors.take()}); open fewer slots")
        context.set_device_memory(self._scratch, self._scratch_bytes)
        for name, address in self._weights.items():
            context.set_tensor_address(name, address)
        return _Context(self._trt, self._engine, context, self._gpu, self._errors)

    def _context_settings(self, fixed_shapes: bool) -> Any:
        """Memory is ours in every context. TensorRT-RTX compiles kernels for the shapes of a call: by default while
        general kernels already run, which a captured graph would keep for ever."""
        memory = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        specialisation = getattr(self._trt, "DynamicShapesKernelSpecializationStrategy", None)
        if specialisation is None:  # full TensorRT compiles nothing here
            return memory
        config = self._engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(memory)
        self._kernels.use_in(config)
        strategy = specialisation.EAGER if fixed_shapes else specialisation.LAZY
        config.dynamic_shapes_kernel_specialization_strategy = strategy
        return config


class _Context:
    def __init__(self, trt: Any, engine: Any, context: Any, gpu: Gpu, errors: TensorRTErrors) -> None:
        self._context, self._gpu, self._errors = context, gpu, errors
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        self._inputs = {name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT}

    def bind(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if name in self._inputs and not self._context.set_input_shape(name, tensor.shape):
                raise EngineError(f"engine: {name} cannot be {list(tensor.shape)} ({self._errors.take()})")
            if not self._context.set_tensor_address(name, tensor.address):
                raise EngineError(f"engine: {name} cannot be bound ({self._errors.take()})")

    def enqueue(self) -> None:
        if not self._context.execute_async_v3(self._gpu.stream):
            raise EngineError(f"engine: TensorRT refused the call ({self._errors.take()})")

    @property
    def is_capturable(self) -> bool:
        ask = getattr(self._context, "is_stream_capturable", None)  # full TensorRT has no such question
        return True if ask is None else bool(ask(self._gpu.stream))


class TensorRTErrors:
    """TensorRT's error messages, for ours."""

    def __init__(self, trt: Any) -> None:
        lines: list[str] = []

        class Logger(trt.ILogger):  # type: ignore[misc]  # the module has no type information
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, message: str) -> None:
                if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                    lines.append(" ".join(message.split()))

        self.logger = Logger()  # TensorRT keeps a bare pointer to it
        self._lines = lines

    @contextmanager
    def told(self, what: str) -> Iterator[None]:
        """Let whatever goes wrong become an `EngineError` that says `what`, and why according to TensorRT."""
        try:
            yield
        except Exception as error:
            raise EngineError(f"{what}: {' '.join(str(error).split())} ({self.take()})") from error

    def take(self) -> str:
        text = "; ".join(self._lines[-2:])
        self._lines.clear()
        return text or "it gave no reason"


def import_tensorrt(flavour: Flavour) -> Any:
    """The flavour's module. Raises `MissingDependencyError` saying what to install."""
    info = FLAVOURS[flavour]
    try:
        return import_module(info.module)
    except ImportError as error:
        raise MissingDependencyError(f"backend {flavour} needs the module {info.module}: {info.install}") from error


def load_plugins(trt: Any, library: Path, info: EngineInfo) -> None:
    """Register the library's creators, once in a process."""
    registry = trt.get_plugin_registry()
    known = {creator.name for creator in registry.all_creators}
    if not set(info.plugins) <= known and registry.load_library(str(library)) is None:
        raise EngineError(f"TensorRT {trt.__version__} cannot load the plugin library {library}; build it again")
