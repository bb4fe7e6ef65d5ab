"""What the memory on a GPU asks of whatever runs the model: TensorRT, or ONNX Runtime on CUDA."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from megalodon_deploy.runtime.cuda.layout import Tensor


class Context(Protocol):
    """One way to run the model: shapes and addresses that stay until they are bound anew."""

    def bind(self, tensors: Mapping[str, Tensor]) -> None:
        """Set shape and address of every input and output. Raises `EngineError` for a shape the engine lacks."""
        ...

    def enqueue(self) -> None:
        """Enqueue a call on the GPU's stream. Raises `EngineError` when it is refused."""
        ...

    @property
    def is_capturable(self) -> bool:
        """Whether `enqueue` may become a part of a CUDA graph, once it has run."""
        ...


class Engine(Protocol):
    max_slots: int  # of one call

    def open_context(self, *, fixed_shapes: bool) -> Context:
        """`fixed_shapes`: it will be bound once and run often, so kernels made for its shapes are worth waiting for."""
        ...
