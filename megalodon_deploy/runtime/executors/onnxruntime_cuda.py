"""ONNX Runtime on an NVIDIA GPU: the graph with its standard operators, over the same device memory as TensorRT."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from megalodon_deploy.engine.library import check_abi, find_plugin_library
from megalodon_deploy.errors import EngineError, MissingDependencyError
from megalodon_deploy.runtime.cuda.engine import Engine
from megalodon_deploy.runtime.cuda.gpu import Gpu
from megalodon_deploy.runtime.cuda.kernels import Kernels
from megalodon_deploy.runtime.cuda.layout import Tensor
from megalodon_deploy.runtime.cuda.memory import CudaMemory
from megalodon_deploy.runtime.executors.base import activation_dtype
from megalodon_deploy.runtime.executors.onnxruntime import import_onnxruntime, load_session

if TYPE_CHECKING:
    from megalodon_deploy.bundle import Bundle

PROVIDER = "CUDAExecutionProvider"
_DEVICE = "cuda"  # where tensors are bound
_MAX_SLOTS = 1 << 16  # the graph itself takes any batch
# TensorProto.DataType of ONNX, by numpy name: numpy has no name of its own for some of them.
_ELEMENT_TYPES = {"float32": 1, "int8": 3, "int64": 7, "float16": 10, "bfloat16": 16, "float8_e4m3fn": 17}


def import_for_cuda() -> Any:
    """ONNX Runtime with its CUDA provider. Raises `MissingDependencyError` when the installed one is for CPUs."""
    onnxruntime = import_onnxruntime()
    if PROVIDER not in onnxruntime.get_available_providers():
        raise MissingDependencyError(
            f"device = 'cuda': the installed onnxruntime {onnxruntime.__version__} is the one for CPUs; "
            "pip uninstall onnxruntime, then pip install 'megalodon-deploy[gpu]'"
        )
    return onnxruntime


class OnnxRuntimeCudaExecutor:
    """Raises `MissingDependencyError` as `import_for_cuda` does and without libmegalodon, `EngineError` when the
    provider does not start."""

    backend = "onnxruntime"

    def __init__(self, bundle: Bundle, gpu: Gpu, *, threads: int | None = None) -> None:
        onnxruntime = import_for_cuda()
        library = find_plugin_library()
        check_abi(library)
        self.kernels = Kernels(library)
        self.config = bundle.config
        self.activation = activation_dtype(bundle.manifest.precision)
        self.returns_all_logits = bundle.manifest.logits == "all"
        self.gpu = gpu
        # TF32 is on by default; a bundle in fp32 was exported to be exact.
        options = {"device_id": str(gpu.index), "user_compute_stream": str(gpu.stream), "use_tf32": "0"}
        with gpu.current():
            session = load_session(bundle, threads, [(PROVIDER, options)])
        if PROVIDER not in session.get_providers():  # ONNX Runtime then goes on with the CPU alone
            raise EngineError(
                f"ONNX Runtime {onnxruntime.__version__} cannot start its CUDA provider; install the CUDA and cuDNN "
                "libraries that it was built for"
            )
        self.engine: Engine = OnnxRuntimeEngine(onnxruntime, session, _DEVICE, gpu.index)

    def open_slots(self, num_slots: int) -> CudaMemory:
        return CudaMemory(self, num_slots)


class OnnxRuntimeEngine:
    max_slots = _MAX_SLOTS

    def __init__(self, onnxruntime: Any, session: Any, device: str, index: int) -> None:
        self._session, self._device, self._index = session, device, index
        self._inputs = {node.name for node in session.get_inputs()}
        self._run_options = onnxruntime.RunOptions()
        self._run_options.add_run_config_entry("disable_synchronize_execution_providers", "1")

    def open_context(self, *, fixed_shapes: bool) -> _Context:
        return _Context(self)

    def binding(self, tensors: Mapping[str, Tensor]) -> Any:
        binding = self._session.io_binding()
        for name, tensor in tensors.items():
            bind = binding.bind_input if name in self._inputs else binding.bind_output
            element_type = _ELEMENT_TYPES[tensor.dtype.name]
            bind(name, self._device, self._index, element_type, tensor.shape, tensor.address)
        return binding

    def run(self, binding: Any) -> None:
        try:
            self._session.run_with_iobinding(binding, self._run_options)
        except Exception as error:  # its error classes share no other base
            raise EngineError(f"ONNX Runtime on CUDA: {' '.join(str(error).split())}") from error


class _Context:
    is_capturable = False  # it allocates while it runs

    def __init__(self, engine: OnnxRuntimeEngine) -> None:
        self._engine = engine
        self._binding: Any = None

    def bind(self, tensors: Mapping[str, Tensor]) -> None:
        self._binding = self._engine.binding(tensors)

    def enqueue(self) -> None:
        self._engine.run(self._binding)
