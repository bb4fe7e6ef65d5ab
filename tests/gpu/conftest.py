"""The real library on a GPU; tests are skipped where there is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kernel_helpers import Array, KernelLibrary

from megalodon_deploy.engine.library import find_plugin_library
from megalodon_deploy.errors import UserError


class GpuMemory:
    """Buffers are byte tensors of PyTorch; work goes to a stream that is not the default one."""

    def __init__(self, torch: Any) -> None:
        self.torch = torch
        self.side_stream = torch.cuda.Stream()

    def upload(self, padded: Array) -> tuple[Any, np.dtype]:
        with self.torch.cuda.stream(self.side_stream):
            return self.torch.from_numpy(padded.view(np.uint8).copy()).cuda(), padded.dtype

    def address(self, buffer: tuple[Any, np.dtype]) -> int:
        return int(buffer[0].data_ptr())

    def download(self, buffer: tuple[Any, np.dtype]) -> Array:
        self.side_stream.synchronize()
        array: Array = buffer[0].cpu().numpy()
        return array.view(buffer[1])

    def stream(self) -> int:
        return int(self.side_stream.cuda_stream)


@pytest.fixture(scope="module")
def kernels() -> KernelLibrary:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU: torch.cuda.is_available() is False")
    try:
        path: Path = find_plugin_library()
    except UserError as error:
        pytest.skip(str(error))
    return KernelLibrary(path, GpuMemory(torch))
