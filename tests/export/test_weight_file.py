"""Large arrays on their way into the bundle: transposed, written and hashed by several threads."""

from __future__ import annotations

import errno
import hashlib
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
import torch

from megalodon_deploy.export.arrays import as_numpy, as_torch, on_all_processors, transpose_into
from megalodon_deploy.export.weight_file import HashedFile, write_weights


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (127, 513), (128, 512), (300, 1025)])
def test_transposed_into_columns_of_a_larger_matrix(shape: tuple[int, int], dtype: type) -> None:
    num_out, num_in = shape
    weight_NK = np.random.default_rng(0).standard_normal(shape).astype(dtype)
    matrix = np.full((num_in, num_out + 5), np.nan, dtype)
    transpose_into(matrix[:, 2 : num_out + 2], weight_NK)
    np.testing.assert_array_equal(matrix[:, 2 : num_out + 2].astype(np.float32), weight_NK.T.astype(np.float32))
    assert np.isnan(np.delete(matrix, np.s_[2 : num_out + 2], axis=1).astype(np.float32)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_tensors_and_arrays_share_memory(dtype: torch.dtype) -> None:
    tensor = torch.tensor([1.5, -2.0, 0.25]).to(dtype)
    array = as_numpy(tensor)
    assert array.astype(np.float32).tolist() == [1.5, -2.0, 0.25]
    back = as_torch(array)
    assert (back.dtype, back.data_ptr()) == (dtype, tensor.data_ptr())


def test_threads_leave_the_settings_of_pytorch_alone() -> None:
    before, seen, inference = torch.get_num_threads(), [], []

    def note(_: int) -> None:
        seen.append(torch.get_num_threads())
        inference.append(torch.is_inference_mode_enabled())

    with torch.inference_mode():
        on_all_processors(note, range(3))
    assert (seen, inference, torch.get_num_threads()) == ([1] * 3, [True] * 3, before)
    with pytest.raises(ZeroDivisionError):
        on_all_processors(lambda n: print(1 // n), range(2))


def test_file_holds_all_arrays_in_order(tmp_path: Path) -> None:
    arrays = [np.arange(size, dtype=np.int16) for size in (3, 1 << 21, 5, 70000)]  # several blocks, odd ends
    expected = b""
    with HashedFile(tmp_path / "file") as file:
        for array in arrays:
            file.align(64)
            expected += bytes(-len(expected) % 64)
            assert file.size_bytes == len(expected)
            file.write(array[::2])
            expected += array[::2].tobytes()
    assert (tmp_path / "file").read_bytes() == expected
    assert file.entry().size_bytes == len(expected)
    assert file.entry().sha256 == hashlib.sha256(expected).hexdigest()


@pytest.mark.parametrize("num_arrays", [1, 50])
def test_errors_of_the_writing_thread_are_raised(num_arrays: int) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("no /dev/full here")

    def write() -> None:
        with HashedFile(full) as file:
            for _ in range(num_arrays):
                file.write(np.zeros(1 << 16, np.uint8))

    with pytest.raises(OSError, match="No space") as raised:
        write()
    assert raised.value.errno == errno.ENOSPC


def test_small_initializers_stay_and_large_ones_begin_on_pages(tmp_path: Path) -> None:
    arrays = {"small": np.ones(64, np.float32), "odd": np.ones(65, np.float32), "large": np.ones(4097, np.uint8)}
    made: list[str] = []

    def lazy(name: str, array: np.ndarray) -> ir.LazyTensor:
        tensor = ir.Tensor(array, name=name)
        return ir.LazyTensor(lambda: made.append(name) or tensor, tensor.dtype, tensor.shape, name=name)

    values = [ir.Value(name=name, const_value=lazy(name, array)) for name, array in arrays.items()]
    graph = ir.Graph([], [], nodes=[], initializers=values)
    shown: list[tuple[str, float]] = []
    write_weights(graph, tmp_path / "weights", lambda name, fraction: shown.append((name, fraction)))
    assert made == ["small", "odd", "large"]
    assert shown == [("odd", 0.0), ("large", 0.5)]
    small, odd, large = (value.const_value for value in values)
    assert isinstance(small, ir.Tensor)
    assert isinstance(odd, ir.ExternalTensor)
    assert isinstance(large, ir.ExternalTensor)
    assert (odd.offset, large.offset) == (0, 4096)
    for tensor, array in zip((small, odd, large), arrays.values(), strict=True):
        np.testing.assert_array_equal(tensor.numpy(), array)
