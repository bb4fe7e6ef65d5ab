"""The caller's side of the contract: key/value memory and recurrent tensors carried from call to call.

Whatever a call must not look at is poisoned here: masked key/value rows hold large finite numbers of a stream long
gone, and a row at position 0 has NaN in its past CEMA and norms. A graph that multiplies where it should select, or
masks by adding, shows it in the first call.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from megalodon_deploy.config import MegalodonConfig
from megalodon_deploy.state import StateSpec, concrete_shape, state_specs

STALE_MAGNITUDE = 100.0  # of keys and values around 1; their products stay finite in fp16


class PoisonedMemory:
    """State of some rows, with `num_rows` key/value rows each: `past` feeds a call, `advance` takes its outputs.

    `start` holds past tensors by input name for rows that begin at a position other than 0; of keys and values the
    first position mod C rows are taken.
    """

    def __init__(
        self,
        config: MegalodonConfig,
        positions: Sequence[int],
        start: Mapping[str, np.ndarray],
        *,
        num_rows: int,
        activation: np.dtype,
    ) -> None:
        self._chunk_size = config.chunk_size
        self._specs = list(state_specs(config))
        self._random = np.random.default_rng(0)
        self._tensors = {spec.past: self._poisoned(spec, len(positions), num_rows, activation) for spec in self._specs}
        for row, position in enumerate(positions):
            if position:
                self._load(row, position % self._chunk_size, start)

    def _poisoned(self, spec: StateSpec, batch: int, num_rows: int, activation: np.dtype) -> np.ndarray:
        shape = concrete_shape(spec.past_shape, batch=batch, capacity=num_rows)
        if not spec.is_rows:
            return np.full(shape, np.nan, np.float32)
        signs = self._random.integers(0, 2, shape, dtype=np.int8) * 2 - 1
        return (STALE_MAGNITUDE * signs).astype(spec.numpy_dtype(activation))

    def _load(self, row: int, num_used: int, start: Mapping[str, np.ndarray]) -> None:
        for spec in self._specs:
            source, target = start[spec.past], self._tensors[spec.past]
            if spec.is_rows:
                target[row, :, :num_used] = source[row, :, :num_used]
            else:
                target[row] = source[row]

    def past(self, positions: Sequence[int], capacity: int) -> dict[str, np.ndarray]:
        """Inputs of a call by name, poison included; not to be written to."""
        fresh = [row for row, position in enumerate(positions) if position == 0]
        feed = {}
        for spec in self._specs:
            tensor = self._tensors[spec.past]
            if spec.is_rows:
                feed[spec.past] = np.ascontiguousarray(tensor[:, :, :capacity])
            else:
                tensor[fresh] = np.nan
                feed[spec.past] = tensor
        return feed

    def advance(self, positions: Sequence[int], num_tokens: int, outputs: Mapping[str, np.ndarray]) -> str | None:
        """Append a call's new key/value rows and take over its recurrent tensors; says what makes that impossible."""
        for spec in self._specs:
            present = outputs.get(spec.present)
            shape = concrete_shape(spec.present_shape, batch=len(positions), tokens=num_tokens)
            if present is None or present.shape != shape:
                return f"output {spec.present} is {'missing' if present is None else 'misshapen'}"
            if not spec.is_rows:
                self._tensors[spec.past] = np.array(present)
                continue
            for row, position in enumerate(positions):
                first = position % self._chunk_size
                self._tensors[spec.past][row, :, first : first + num_tokens] = present[row]
        return None
