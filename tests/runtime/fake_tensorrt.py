"""TensorRT's Python module, as much of it as the executor uses, and what `engine.json` says about an engine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
from runtime.fake_gpu import FakeContext, FakeEngine, FakeGpu

from megalodon_deploy.bundle import Bundle, FileEntry
from megalodon_deploy.engine.info import EngineInfo
from megalodon_deploy.engine.profile import optimization_profile
from megalodon_deploy.runtime.cuda.layout import Tensor

VERSION = "1.7.1.116"


def engine_info(bundle: Bundle, name: str = "engine", **changes: Any) -> EngineInfo:
    max_batch = changes.get("max_batch", 4)
    info = EngineInfo(
        id=name,
        flavour="tensorrt-rtx",
        version=VERSION,
        compute_capabilities=(80, 89),
        hardware_compatible=False,
        version_compatible=False,
        precision="fp32",
        max_batch=max_batch,
        profile=optimization_profile(bundle.config, max_batch=max_batch),
        plugins=("ComplexEMA",),
        num_plugin_layers=2,
        plugin_library=None,
        weights="engine",
        bundle_weights={},
        norm_update="float64",
        bundle_fingerprint=bundle.manifest.fingerprint,
        engine=FileEntry("", 0),
        build_seconds=1.0,
        peak_memory_bytes=1,
    )
    return replace(info, **changes)


class FakeTensorRT(ModuleType):
    """As much of the module as the executor uses, over ONNX Runtime and the stand-in for a GPU."""

    def __init__(self, gpu: FakeGpu, model_path: Path) -> None:
        super().__init__("tensorrt_rtx")
        self.__version__ = VERSION
        self.loaded: list[str] = []
        self.fails: set[str] = set()
        self.engine_bytes = b""
        self.runtime_caches: list[bytes] = []  # what was read from files
        self.runtimes: list[Any] = []
        self.budgets: list[int] = []  # of streamed weights, by context
        fake, engine = self, FakeEngine(gpu, model_path)
        nodes = [*engine.session.get_inputs(), *engine.session.get_outputs()]
        inputs = {node.name for node in engine.session.get_inputs()}
        weights = {node.name for node in engine.session.get_inputs() if all(isinstance(dim, int) for dim in node.shape)}

        class ILogger:
            Severity = SimpleNamespace(ERROR=1, INTERNAL_ERROR=0, WARNING=2)

        class RuntimeCache:
            def deserialize(self, blob: bytes) -> bool:
                fake.runtime_caches.append(blob)
                return True

            def serialize(self) -> bytearray:
                return bytearray(b"kernels")

        class RuntimeConfig:
            allocation = dynamic_shapes_kernel_specialization_strategy = ""
            runtime_cache: RuntimeCache | None = None

            def set_execution_context_allocation_strategy(self, strategy: str) -> None:
                self.allocation = strategy

            def create_runtime_cache(self) -> RuntimeCache:
                return RuntimeCache()

            def set_runtime_cache(self, cache: RuntimeCache) -> bool:
                self.runtime_cache = cache
                return True

        class ExecutionContext:
            def __init__(self, is_eager: bool) -> None:
                with gpu.current():
                    self.inner: FakeContext = engine.open_context(fixed_shapes=is_eager)
                self.shapes: dict[str, tuple[int, ...]] = {}
                self.addresses: dict[str, int] = {}
                self.scratch = (0, 0)

            def set_device_memory(self, memory: int, size: int) -> None:
                gpu.check_device(memory, size)
                self.scratch = (memory, size)

            def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
                self.shapes[name] = shape
                return name in inputs and "shape" not in fake.fails

            def set_tensor_address(self, name: str, memory: int) -> bool:
                self.addresses[name] = memory
                return True

            def execute_async_v3(self, stream_handle: int) -> bool:
                assert stream_handle == gpu.stream
                assert self.scratch[1] == 12345
                if "call" in fake.fails:
                    fake.logger.log(1, "a reason\nin two lines")
                    return False
                if set(self.shapes) == inputs - weights and (self.shapes, self.addresses) != getattr(
                    self, "bound", None
                ):
                    self.inner.bind(self._tensors())
                    self.bound = (dict(self.shapes), dict(self.addresses))
                self.inner.enqueue()
                return True

            def _tensors(self) -> dict[str, Tensor]:
                dims = {"B": self.shapes["tokens"][0], "T": self.shapes["tokens"][1], "K": 1}
                tensors = {}
                for node in nodes:
                    shape = self.shapes.get(node.name) or tuple(dims.get(dim, dim) for dim in node.shape)
                    kind = np.int64 if "int64" in node.type else np.float32
                    tensors[node.name] = Tensor(self.addresses[node.name], shape, np.dtype(kind))
                return tensors

        class Engine:
            device_memory_size_v2 = 12345
            num_io_tensors = len(nodes)
            weight_streaming_budget_v2 = -1

            def __init__(self) -> None:
                self.budgets: list[int] = fake.budgets

            def get_weight_streaming_automatic_budget(self) -> int:
                return 4242

            def get_tensor_name(self, index: int) -> str:
                return nodes[index].name

            def get_tensor_shape(self, name: str) -> list[int]:
                return next(node.shape for node in nodes if node.name == name)

            def get_tensor_dtype(self, name: str) -> Any:
                (kind,) = {node.type for node in nodes if node.name == name}
                return SimpleNamespace(itemsize={"tensor(float)": 4}[kind])

            def get_tensor_mode(self, name: str) -> str:
                return "input" if name in inputs else "output"

            def create_runtime_config(self) -> RuntimeConfig:
                return RuntimeConfig()

            def create_execution_context(self, runtime_config: RuntimeConfig) -> ExecutionContext | None:
                assert runtime_config.allocation == "user managed"
                assert runtime_config.runtime_cache is not None
                self.budgets.append(self.weight_streaming_budget_v2)
                is_eager = runtime_config.dynamic_shapes_kernel_specialization_strategy == "eager"
                return None if "context" in fake.fails else ExecutionContext(is_eager)

        class Runtime:
            engine_host_code_allowed = False

            def __init__(self, logger: Any) -> None:
                fake.logger = logger
                fake.runtimes.append(self)

            def deserialize_cuda_engine(self, serialized_engine: Any) -> Engine | None:
                fake.engine_bytes = bytes(serialized_engine)
                if "engine" in fake.fails:
                    fake.logger.log(1, "no driver")
                return None if "engine" in fake.fails else Engine()

        def load_library(path: str) -> object | None:
            self.loaded.append(path)
            return None if "library" in fake.fails else object()

        self.ILogger, self.Runtime = ILogger, Runtime
        self.TensorIOMode = SimpleNamespace(INPUT="input", OUTPUT="output")
        self.ExecutionContextAllocationStrategy = SimpleNamespace(USER_MANAGED="user managed")
        self.DynamicShapesKernelSpecializationStrategy = SimpleNamespace(EAGER="eager", LAZY="lazy")
        registry = SimpleNamespace(all_creators=[], load_library=load_library)
        self.get_plugin_registry = lambda: registry
        self.registry, self.runtime_engine = registry, engine
