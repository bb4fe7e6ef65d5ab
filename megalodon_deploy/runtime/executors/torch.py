"""PyTorch, eager: the same weights without ONNX, on any device that PyTorch has. The only module of the runtime that
imports PyTorch. Letters as in `megalodon_deploy.state`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np

from megalodon_deploy.errors import EngineError, MissingDependencyError, UserError
from megalodon_deploy.runtime.executors.base import HostLogits
from megalodon_deploy.state import ROW_AXIS, state_specs

try:
    import torch
except ImportError as error:
    raise MissingDependencyError(
        "the backend torch needs PyTorch: pip install 'megalodon-deploy[export]', or use onnxruntime"
    ) from error

if TYPE_CHECKING:
    from megalodon_deploy.bundle import Bundle
    from megalodon_deploy.model.megalodon import ModelState

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_OF_PRECISION = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


class TorchExecutor:
    """Raises `UserError` for an unknown dtype, `EngineError` for a device that PyTorch does not have here."""

    backend = "torch"

    def __init__(
        self, bundle: Bundle, *, threads: int | None = None, device: str = "cpu", dtype: str | None = None
    ) -> None:
        name = dtype or _OF_PRECISION[bundle.manifest.precision]
        if name not in _DTYPES:
            raise UserError(f"dtype = {dtype!r} is none of {', '.join(_DTYPES)}")
        self.config = bundle.config
        self.activation = np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)
        self.device = _device(device)
        if threads is not None:
            torch.set_num_threads(threads)
        from megalodon_deploy.export import load_bundle_model

        self.model = load_bundle_model(bundle).eval().to(self.device, _DTYPES[name])

    def open_slots(self, num_slots: int) -> TorchMemory:
        return TorchMemory(self, num_slots)


class TorchMemory(HostLogits):
    """A model state for every slot; rows that run together are joined for the call."""

    def __init__(self, executor: TorchExecutor, num_slots: int) -> None:
        super().__init__(num_slots, executor.config.vocab_size)
        self._executor = executor
        self._states: list[ModelState | None] = [None] * num_slots

    @torch.inference_mode()
    def run(self, rows: slice, tokens_BT: np.ndarray, position_B: np.ndarray) -> None:
        slots = range(self.num_slots)[rows]
        for slot, position in zip(slots, position_B, strict=True):
            if position == 0:
                self._states[slot] = self._executor.model.initial_state(1)
        states = [self._state(slot) for slot in slots]
        tokens = torch.from_numpy(tokens_BT).to(self._executor.device)
        logits_BTV, state = self._executor.model(tokens, _join(states))
        self._states[rows] = [state] if len(slots) == 1 else _split(state, len(slots))
        self.last_logits[rows] = logits_BTV[:, -1].float().cpu().numpy()

    def read(self, slot: int, position: int) -> dict[str, np.ndarray]:
        num_rows = position % self._executor.config.chunk_size
        tensors = {}
        for spec in state_specs(self._executor.config):
            tensor = self._state(slot).tensors[spec.past]
            tensor = tensor[:, :, :num_rows] if spec.is_rows else tensor
            dtype = spec.numpy_dtype(self._executor.activation)
            tensors[spec.past] = tensor.float().cpu().numpy().astype(dtype)  # numpy itself has no bfloat16, no fp8
        return tensors

    @torch.inference_mode()
    def write(self, slot: int, position: int, tensors: Mapping[str, np.ndarray]) -> None:
        state = self._executor.model.initial_state(1)
        for name, tensor in state.tensors.items():
            values = torch.from_numpy(tensors[name].astype(np.float32))
            state.tensors[name] = values.to(tensor.device, tensor.dtype)
        state.position.fill_(position)
        self._states[slot] = state

    def retire(self, slot: int) -> None:
        self._states[slot] = None

    def _state(self, slot: int) -> ModelState:
        state = self._states[slot]
        assert state is not None, f"Bug: slot {slot} holds no stream"
        return state


def _join(states: Sequence[ModelState]) -> ModelState:
    """One state of all rows, key/value memory filled up with zeros to the longest."""
    if len(states) == 1:
        return states[0]
    from megalodon_deploy.model.megalodon import ModelState
    from megalodon_deploy.model.model_state import is_rows, pad_rows

    tensors = {}
    for name in states[0].tensors:
        parts = [state.tensors[name] for state in states]
        if is_rows(name):
            longest = max(part.shape[ROW_AXIS] for part in parts)
            parts = [pad_rows(part, longest) for part in parts]
        tensors[name] = torch.cat(parts)
    return ModelState(torch.cat([state.position for state in states]), tensors)


def _split(state: ModelState, batch: int) -> list[ModelState]:
    from megalodon_deploy.model.megalodon import ModelState

    return [
        ModelState(state.position[row : row + 1], {name: t[row : row + 1] for name, t in state.tensors.items()})
        for row in range(batch)
    ]


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise EngineError(f"device = {name!r}: PyTorch cannot use it here ({str(error).splitlines()[0]})") from error
    return device
