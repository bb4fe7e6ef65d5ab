"""The memory of a batch of streams between calls of a PyTorch model.

Shapes: B rows, T tokens of a call, H heads, S key/value rows. A stream's key/value memory holds the tokens of its open
chunk: (position mod C) rows, and S is the most that any row of the batch has; what lies beyond a row's own is masked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from megalodon_deploy.config import MegalodonConfig
from megalodon_deploy.state import ROW_AXIS, concrete_shape, state_specs

_MIN_CAPACITY = 16


@dataclass
class _Reserve:
    """Key/value buffers with room to grow, of which a state's tensors are views.

    Appending writes into the unused rows only, so older states that share the buffers keep their rows. Only the
    state that stands where the buffers end may append: one that was advanced already, or whose rows were reset,
    no longer matches `positions` and copies.
    """

    positions: Sequence[int]  # of the rows, where the buffers end
    buffers: dict[str, Tensor]  # [B, H, capacity, ...] by name, zero beyond what was written


@dataclass
class ModelState:
    """What B streams remember. A row whose `position` is 0 starts afresh, whatever its tensors hold."""

    position: Tensor  # [B] int64, tokens consumed
    tensors: dict[str, Tensor]  # by the input names of `megalodon_deploy.state.state_specs`
    _reserve: _Reserve | None = field(default=None, repr=False, compare=False)

    @classmethod
    def zeros(
        cls, config: MegalodonConfig, batch: int, *, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> ModelState:
        """Streams that have consumed nothing; `dtype` is that of the activations."""
        dtypes = {
            "activation": dtype,
            "float32": torch.promote_types(dtype, torch.float32),
            "fp8": torch.float8_e4m3fn,
            "int8": torch.int8,
        }
        tensors = {
            spec.past: torch.zeros(
                concrete_shape(spec.past_shape, batch=batch), dtype=dtypes[spec.dtype], device=device
            )
            for spec in state_specs(config)
        }
        return cls(torch.zeros(batch, dtype=torch.int64, device=device), tensors)

    def detach(self) -> ModelState:
        """The same state without the graph that computed it."""
        return ModelState(self.position, {name: tensor.detach() for name, tensor in self.tensors.items()})

    def advance(
        self, added: Mapping[str, Tensor], positions: Sequence[int], num_tokens: int, chunk_size: int
    ) -> ModelState:
        """The state after a call: `added` holds present tensors and the call's own T key/value rows, by past name."""
        offsets = [position % chunk_size for position in positions]
        reserve = self._reserve
        rows = {name: tensor for name, tensor in added.items() if is_rows(name)}
        tensors = {name: tensor for name, tensor in added.items() if not is_rows(name)}
        if torch.is_grad_enabled():
            reserve = None
            tensors |= {name: _open_rows(self.tensors[name], new, offsets, chunk_size) for name, new in rows.items()}
        else:
            if reserve is None or not _has_room(reserve, positions, offsets, num_tokens, chunk_size):
                used = {name: _open_rows(self.tensors[name], new, offsets, chunk_size) for name, new in rows.items()}
                reserve = _Reserve([], {name: _with_room(tensor, chunk_size) for name, tensor in used.items()})
            else:
                _append(reserve.buffers, rows, offsets, num_tokens)
            held = max((offset + num_tokens) % chunk_size for offset in offsets)
            reserve.positions = [position + num_tokens for position in positions]
            tensors |= {name: buffer[:, :, :held] for name, buffer in reserve.buffers.items()}
        return ModelState(self.position + num_tokens, tensors, reserve)


def is_rows(name: str) -> bool:
    """Whether the tensor of this input name has a row for every token of the open chunk."""
    return name.startswith(("past_key", "past_value"))


def pad_rows(tensor: Tensor, num_rows: int) -> Tensor:
    """[B, H, rows, ...] with zeros behind, up to `num_rows` rows."""
    missing = num_rows - tensor.shape[ROW_AXIS]
    return functional.pad(tensor, (*[0] * (2 * (tensor.ndim - 1 - ROW_AXIS)), 0, missing)) if missing else tensor


def _open_rows(past: Tensor, new: Tensor, offsets: Sequence[int], chunk_size: int) -> Tensor:
    """The open chunk's rows after a call: held rows and new ones, or the new ones since the last chunk edge.

    Rows of different counts are filled up with zeros. The result shares no memory with `past` or `new`.
    """
    if len(set(offsets)) == 1:
        return _open_rows_of_one(past, new, offsets[0], chunk_size)
    rows = [_open_rows_of_one(past[i : i + 1], new[i : i + 1], offset, chunk_size) for i, offset in enumerate(offsets)]
    most = max(row.shape[2] for row in rows)
    return torch.cat([pad_rows(row, most) for row in rows])


def _open_rows_of_one(past: Tensor, new: Tensor, offset: int, chunk_size: int) -> Tensor:
    num_tokens = new.shape[2]
    end = offset + num_tokens
    if end < chunk_size:
        return torch.cat([past[:, :, :offset], new], 2)
    return new[:, :, num_tokens - end % chunk_size :].clone(memory_format=torch.contiguous_format)


def _with_room(used: Tensor, chunk_size: int) -> Tensor:
    """A buffer that begins with `used` and has room for as many rows again, a chunk at most."""
    capacity = min(chunk_size, max(_MIN_CAPACITY, 2 * used.shape[2]))
    return pad_rows(used, capacity)


def _has_room(
    reserve: _Reserve, positions: Sequence[int], offsets: Sequence[int], num_tokens: int, chunk_size: int
) -> bool:
    """Whether the call's rows can be written behind the held ones; a chunk that ends starts a new buffer."""
    buffer = next(iter(reserve.buffers.values()))
    fits = max(offsets) + num_tokens <= min(buffer.shape[2], chunk_size - 1)
    writable = torch.is_inference_mode_enabled() or not buffer.is_inference()
    return fits and writable and list(reserve.positions) == list(positions)


def _append(buffers: Mapping[str, Tensor], rows: Mapping[str, Tensor], offsets: Sequence[int], num_tokens: int) -> None:
    for name, new in rows.items():
        if len(set(offsets)) == 1:
            buffers[name][:, :, offsets[0] : offsets[0] + num_tokens] = new
            continue
        for i, offset in enumerate(offsets):
            buffers[name][i, :, offset : offset + num_tokens] = new[i]
