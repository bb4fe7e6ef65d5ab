"""The PyTorch model as the reference: the whole sequence in one parallel call, and call by call.

Both return float32 arrays under the graph's output names, with the logits of every position.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from megalodon_deploy.config import MegalodonConfig
from megalodon_deploy.model.block import LayerState
from megalodon_deploy.model.megalodon import Megalodon, ModelState
from megalodon_deploy.state import LOGITS, QUANTIZED_ROW_MAX, ROW_AXIS, state_specs
from megalodon_deploy.verify.runners import StreamRunner
from megalodon_deploy.verify.schedule import Schedule, rows_in_use

_WARM_UP_TOKENS = 32
_POOL_SIZE = 65521  # a prime: repeated over a whole chunk, no two rows are alike, and it is drawn in no time

Start = Mapping[str, np.ndarray]
_Outputs = dict[str, Tensor]


class ReferenceRunner(StreamRunner):
    """A model and the state that rows past position 0 start from, by input name."""

    def __init__(self, model: Megalodon, schedule: Schedule, start: Start, *, name: str) -> None:
        super().__init__(name=name)
        self._model = model
        self._schedule = schedule
        self._start = start

    def _forward(self, tokens_BT: Tensor, state: ModelState, num_tokens: int) -> tuple[_Outputs, ModelState]:
        """One call of the model; outputs of its last `num_tokens` tokens, by the graph's names."""
        with torch.inference_mode(), _new_rows(self._model) as rows:
            logits_BTV, state = self._model(tokens_BT, state)
        outputs = {LOGITS: logits_BTV[:, -num_tokens:]}
        for spec in state_specs(self._model.config):
            new = rows[spec.present][:, :, -num_tokens:] if spec.is_rows else state.tensors[spec.past]
            outputs[spec.present] = new
        return outputs, state


class WholeSequenceRunner(ReferenceRunner):
    """Carries nothing: every call computes each row's stream anew from its start, in one parallel call of its own."""

    def activate_impl(self) -> None:
        self._history: list[np.ndarray] = [np.zeros(0, np.int64)] * self._schedule.batch

    def deactivate_impl(self) -> None:
        del self._history

    def call(self, tokens_BT: np.ndarray, position_B: np.ndarray, capacity: int) -> Mapping[str, np.ndarray]:
        rows = []
        for row, position in enumerate(position_B.tolist()):
            before = self._history[row] if position else np.zeros(0, np.int64)
            self._history[row] = np.concatenate([before, tokens_BT[row]])
            state = self._start_of(row, position - len(before))
            outputs, _ = self._forward(torch.from_numpy(self._history[row])[None], state, tokens_BT.shape[1])
            rows.append(outputs)
        return {name: _to_numpy(torch.cat([outputs[name] for outputs in rows])) for name in rows[0]}

    def _start_of(self, row: int, position: int) -> ModelState:
        if position == 0:
            return self._model.initial_state(1)
        assert position == self._schedule.start_positions[row], f"Bug: row {row} has no state at {position}"
        return _to_state(self._model.config, self._start, slice(row, row + 1), [position])


class CallByCallRunner(ReferenceRunner):
    """Feeds the model's own state back, a call of the schedule at a time: steps where a call has one token."""

    def activate_impl(self) -> None:
        starts = self._schedule.start_positions
        self._state = (
            _to_state(self._model.config, self._start, slice(None), starts)
            if any(starts)
            else self._model.initial_state(len(starts))
        )

    def deactivate_impl(self) -> None:
        del self._state

    def call(self, tokens_BT: np.ndarray, position_B: np.ndarray, capacity: int) -> Mapping[str, np.ndarray]:
        state = ModelState(torch.from_numpy(position_B), self._state.tensors)  # a reset row says so by its position
        outputs, self._state = self._forward(torch.from_numpy(tokens_BT), state, tokens_BT.shape[1])
        return {name: _to_numpy(tensor) for name, tensor in outputs.items()}


def make_start(model: Megalodon, schedule: Schedule, activation: np.dtype, seed: int) -> dict[str, np.ndarray]:
    """Past tensors for the rows of a schedule that start past position 0; empty when none does.

    Norms and CEMA come from a short stream, so that they fit the model's own signals; key/value rows are drawn with
    that stream's magnitude, in the precision of `activation`, so that both sides begin alike. Quantised rows are codes
    of all sizes, with scales like that stream's.
    """
    starts, config = schedule.start_positions, model.config
    if not any(starts):
        return {}
    random = np.random.default_rng(seed)
    num_tokens = min(_WARM_UP_TOKENS, config.chunk_size)
    tokens_BT = torch.from_numpy(random.integers(0, config.vocab_size, (len(starts), num_tokens)))
    with torch.inference_mode(), _new_rows(model) as rows:
        _, state = model(tokens_BT)
    used = rows_in_use(starts, config.chunk_size)
    start = {}
    for spec in state_specs(config):
        if not spec.is_rows:
            start[spec.past] = _to_numpy(state.tensors[spec.past])
            continue
        computed = _to_numpy(rows[spec.present])
        shape = (*computed.shape[:ROW_AXIS], used, *computed.shape[ROW_AXIS + 1 :])
        pool = random.standard_normal(_POOL_SIZE, np.float32) * np.sqrt(np.mean(computed**2))
        if largest := QUANTIZED_ROW_MAX.get(spec.dtype):
            pool = np.clip(pool, -largest, largest)
        elif spec.dtype == "float32":  # a scale
            pool = np.abs(pool)
        start[spec.past] = np.resize(pool.astype(spec.numpy_dtype(activation)).astype(np.float32), shape)
    return start


@contextmanager
def _new_rows(model: Megalodon) -> Iterator[_Outputs]:
    """Collect the key and value rows of every token of the next call, by the graph's output names.

    The model's state keeps the open chunk's only: none after a call that ends at a chunk edge.
    """
    rows: _Outputs = {}

    def collect(index: int) -> Callable[[nn.Module, Any, tuple[Tensor, LayerState]], None]:
        def hook(module: nn.Module, inputs: Any, output: tuple[Tensor, LayerState]) -> None:
            present = output[1]._asdict().items()
            rows.update({f"new_{kind}.{index}": tensor for kind, tensor in present if tensor is not None})

        return hook

    handles = [layer.register_forward_hook(collect(index)) for index, layer in enumerate(model.layers)]
    try:
        yield rows
    finally:
        for handle in handles:
            handle.remove()


def _to_state(config: MegalodonConfig, start: Start, rows: slice, positions: Sequence[int]) -> ModelState:
    """The start tensors of some rows as a state at `positions`."""
    used = rows_in_use(positions, config.chunk_size)
    tensors = ModelState.zeros(config, len(positions), dtype=torch.float32).tensors
    for spec in state_specs(config):
        given = start[spec.past][rows][:, :, :used] if spec.is_rows else start[spec.past][rows]
        tensors[spec.past] = torch.from_numpy(given).to(tensors[spec.past].dtype)
    return ModelState(torch.tensor(positions), tensors)


def _to_numpy(tensor: Tensor) -> np.ndarray:
    """As float32, codes of quantised rows included: NumPy has no fp8."""
    array: np.ndarray = tensor.float().numpy(force=True)
    return array
