"""How many bytes a rank receives from the others: by every collective that PyTorch dispatches, whoever calls it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import distributed as dist
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode


class Traffic(TorchDispatchMode):
    """Counts while it is entered, by operator; a sum over ranks is that of a ring, which receives each part twice."""

    def __init__(self) -> None:
        super().__init__()
        self.received: dict[str, float] = {}

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # its own operators are counted
        name = func._opname
        if func.namespace in ("c10d", "_c10d_functional") and name not in _LOCAL:
            size_bytes, repeats = _RECEIVED[name](args)
            others = 1 if name == "recv_" else 1 - 1 / _group(args).size()
            self.received[name] = self.received.get(name, 0) + repeats * size_bytes * others
        return func(*args, **(kwargs or {}))


def _group(args: Sequence[Any]) -> dist.ProcessGroup:
    if isinstance(args[-1], str):
        return _resolve_process_group(args[-1])
    boxed = next(arg for arg in args if isinstance(arg, torch.ScriptObject) and "ProcessGroup" in str(arg._type()))
    return dist.ProcessGroup.unbox(boxed)


def _nbytes(tensors: Sequence[torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


_LOCAL = ("wait_tensor", "_wrap_tensor_autograd", "send")  # receive nothing
_RECEIVED: dict[str, Callable[[Sequence[Any]], tuple[int, int]]] = {
    "all_reduce": lambda args: (args[0].nbytes, 2),
    "allreduce_": lambda args: (_nbytes(args[0]), 2),
    "allgather_": lambda args: (_nbytes(args[0][0]), 1),
    "_allgather_base_": lambda args: (args[0].nbytes, 1),
    "broadcast_": lambda args: (_nbytes(args[0]), 1),
    "_reduce_scatter_base_": lambda args: (args[1].nbytes, 1),
    "recv_": lambda args: (_nbytes(args[0]), 1),
}
