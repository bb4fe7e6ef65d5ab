"""A bundle that is ready to stream: one backend with the model's weights, and any number of streams over it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from megalodon_deploy.errors import UserError
from megalodon_deploy.runtime.batch import StreamBatch
from megalodon_deploy.runtime.executors.base import Executor
from megalodon_deploy.runtime.saved_stream import SavedStream
from megalodon_deploy.runtime.scheduler import Scheduler
from megalodon_deploy.runtime.stream import Stream
from megalodon_deploy.state import state_bytes
from megalodon_deploy.tokenizers import Tokenizer, open_tokenizer

if TYPE_CHECKING:
    from megalodon_deploy.bundle import Bundle
    from megalodon_deploy.runtime.cuda.gpu import Gpu

BACKENDS = ("onnxruntime", "torch", "tensorrt", "tensorrt-rtx")


def open_session(
    bundle: Bundle,
    backend: str = "onnxruntime",
    *,
    threads: int | None = None,
    device: str | None = None,
    dtype: str | None = None,
    native: bool | None = None,
    share_weights: bool = False,
    stream: object | None = None,
) -> Session:
    """Load a bundle's model.

    `threads`: CPU threads of one call; None: as many as the machine has cores. `device`: "cpu", "cuda" or "cuda:1";
    None: "cpu" for onnxruntime and torch, for TensorRT the current CUDA context, or else the first GPU. `dtype`
    ("float32", "float16", "bfloat16"; None: the bundle's precision) is for the torch backend. `native` is for
    onnxruntime on the CPU: our operators as compiled code (True), as the function bodies in the graph (False), or
    compiled where the library was built and MEGALODON_KERNELS is not "reference" (None).
    `share_weights` is for onnxruntime on the CPU: matrices are mapped from a file in the user's cache, as they are
    multiplied, so that all processes share them and opening takes less time. The first opening writes the file, which
    takes up to twice the disk of the bundle's weights; a bundle opened with `verify_hashes` compares its hash, too.
    `stream`: a CUDA stream of PyCUDA, CuPy, PyTorch or cuda.core, or its handle, on which TensorRT and ONNX Runtime on
    CUDA then work; its context is the current one, and its owner keeps it alive.
    Raises `UserError` for an unknown value, `EngineError` for a backend that cannot run this bundle on this machine,
    `MissingDependencyError` for a package that is not installed.
    """
    if threads is not None and threads < 1:
        raise UserError(f"threads = {threads} is not a positive integer")
    if backend not in BACKENDS:
        raise UserError(f"unknown backend {backend!r}; there are: {', '.join(BACKENDS)}")
    if dtype is not None and backend != "torch":
        raise UserError(f"{backend} runs in the bundle's precision: leave out dtype = {dtype!r}, or use torch")
    options = _Options(backend, threads, device, dtype, native, share_weights, stream)
    if stream is not None and not options.is_shared_gpu:
        raise UserError("stream: only TensorRT and onnxruntime with device = 'cuda' work on a given CUDA stream")
    if native is not None and (backend != "onnxruntime" or options.is_shared_gpu):
        raise UserError(f"native = {native}: only onnxruntime on the CPU has compiled operators")
    if share_weights and (backend != "onnxruntime" or options.is_shared_gpu):
        raise UserError("share_weights: only onnxruntime on the CPU computes from the mapped file")
    return Session(bundle, _open_executor(bundle, options))


@dataclass(frozen=True)
class _Options:
    """The arguments of `open_session`."""

    backend: str
    threads: int | None
    device: str | None
    dtype: str | None
    native: bool | None
    share_weights: bool
    stream: object | None

    @property
    def is_shared_gpu(self) -> bool:
        """Whether our own GPU memory is used, which PyTorch does not."""
        if self.backend == "onnxruntime":
            return self.device not in (None, "cpu")
        return self.backend.startswith("tensorrt")


def _open_executor(bundle: Bundle, options: _Options) -> Executor:
    backend, threads, device = options.backend, options.threads, options.device
    if backend == "torch":
        from megalodon_deploy.runtime.executors.torch import TorchExecutor

        return TorchExecutor(bundle, threads=threads, device=device or "cpu", dtype=options.dtype)
    if not options.is_shared_gpu:
        from megalodon_deploy.runtime.executors.onnxruntime import OnnxRuntimeExecutor

        return OnnxRuntimeExecutor(bundle, threads=threads, native=options.native, share_weights=options.share_weights)
    if backend == "onnxruntime":
        from megalodon_deploy.runtime.executors.onnxruntime_cuda import OnnxRuntimeCudaExecutor, import_for_cuda

        index = _gpu_index(options)
        import_for_cuda()  # what is missing is said before the GPU is looked for
        return OnnxRuntimeCudaExecutor(bundle, _open_gpu(index, options.stream), threads=threads)
    from megalodon_deploy.engine.targets import check_flavour
    from megalodon_deploy.runtime.executors.tensorrt import TensorRTExecutor, import_tensorrt

    index, flavour = _gpu_index(options), check_flavour(backend)
    import_tensorrt(flavour)
    return TensorRTExecutor(bundle, flavour, _open_gpu(index, options.stream))


def _gpu_index(options: _Options) -> int | None:
    found = re.fullmatch(r"cuda(?::(\d+))?", options.device or "cuda")
    if found is None:
        cpu = "'cpu', " if options.backend == "onnxruntime" else ""
        raise UserError(
            f"device = {options.device!r}: {options.backend} runs on {cpu}'cuda', or 'cuda:1' for the second GPU"
        )
    return None if found[1] is None else int(found[1])


def _open_gpu(index: int | None, stream: object | None) -> Gpu:
    from megalodon_deploy.runtime.cuda.driver import CudaGpu
    from megalodon_deploy.runtime.device_array import stream_handle

    return CudaGpu(index, None if stream is None else stream_handle(stream))


class Session:
    """A loaded model and its tokenizer. Not safe to use from several threads at once."""

    def __init__(self, bundle: Bundle, executor: Executor) -> None:
        self.bundle = bundle
        self.config = bundle.config
        self.executor = executor

    @property
    def backend(self) -> str:
        return self.executor.backend

    @property
    def activation(self) -> np.dtype:
        """dtype of key and value rows."""
        return self.executor.activation

    @property
    def state_bytes(self) -> int:
        """Bytes of one stream's state with a full chunk."""
        return state_bytes(self.config, activation_bytes=self.activation.itemsize)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return open_tokenizer(self.bundle)

    def stream(self, *, resume: str | Path | SavedStream | None = None) -> Stream:
        """A stream in a memory of its own: fresh, or resumed from a file or a snapshot.

        Raises `StateError` when the file is damaged or belongs to another bundle.
        """
        return self.batch(1).admit(resume=resume)

    def batch(self, num_slots: int) -> StreamBatch:
        """Slots for streams that advance together, in one call of the model."""
        if num_slots < 1:
            raise UserError(f"num_slots = {num_slots} is not a positive integer")
        return StreamBatch(self, num_slots)

    def serve(self, *, max_streams: int = 8, prefill_tokens: int = 256) -> Scheduler:
        """A scheduler for many generations: `max_streams` generate together, prompts are consumed in pieces between.

        Raises `UserError` when a number is not positive, and what `batch` raises.
        """
        return Scheduler(self, max_streams=max_streams, prefill_tokens=prefill_tokens)
