"""A bundle that is ready to stream: one backend with the model's weights, and any number of streams over it."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from megalodon_deploy.errors import EngineError, UserError
from megalodon_deploy.runtime.batch import StreamBatch
from megalodon_deploy.runtime.executors.base import Executor
from megalodon_deploy.runtime.saved_stream import SavedStream
from megalodon_deploy.runtime.scheduler import Scheduler
from megalodon_deploy.runtime.stream import Stream
from megalodon_deploy.state import state_bytes
from megalodon_deploy.tokenizers import Tokenizer, open_tokenizer

if TYPE_CHECKING:
    from megalodon_deploy.bundle import Bundle

BACKENDS = ("onnxruntime", "torch", "tensorrt", "tensorrt-rtx")


def open_session(
    bundle: Bundle,
    backend: str = "onnxruntime",
    *,
    threads: int | None = None,
    device: str = "cpu",
    dtype: str | None = None,
    native: bool | None = None,
) -> Session:
    """Load a bundle's model.

    `threads`: CPU threads of one call; None: as many as the machine has cores. `device` and `dtype` ("float32",
    "float16", "bfloat16"; None: the bundle's precision) are for the torch backend; ONNX Runtime runs on the CPU in
    the bundle's precision. `native` is for onnxruntime: ComplexEMA and TimestepNorm as compiled operators (True), as
    the function bodies in the graph (False), or compiled where the library was built and MEGALODON_KERNELS is not
    "reference" (None). Raises `UserError` for an unknown value, `EngineError` for a backend that cannot run this
    bundle on this machine, `MissingDependencyError` for a package that is not installed.
    """
    if threads is not None and threads < 1:
        raise UserError(f"threads = {threads} is not a positive integer")
    if backend == "onnxruntime":
        if device != "cpu" or dtype is not None:
            option = f"device = {device!r}" if device != "cpu" else f"dtype = {dtype!r}"
            raise UserError(f"onnxruntime runs on the CPU in the bundle's precision: leave out {option}, or use torch")
        from megalodon_deploy.runtime.executors.onnxruntime import OnnxRuntimeExecutor

        return Session(bundle, OnnxRuntimeExecutor(bundle, threads=threads, native=native))
    if backend == "torch":
        from megalodon_deploy.runtime.executors.torch import TorchExecutor

        return Session(bundle, TorchExecutor(bundle, threads=threads, device=device, dtype=dtype))
    if backend in BACKENDS:
        raise EngineError(
            f"backend {backend!r} needs an NVIDIA GPU, which this release does not drive; use onnxruntime"
        )
    raise UserError(f"unknown backend {backend!r}; there are: {', '.join(BACKENDS)}")


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
