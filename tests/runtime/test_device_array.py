"""Other libraries' GPU arrays and streams, by their protocols; the memory here is the host's."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from runtime.fake_gpu import FakeCudaExecutor
from runtime.small_models import SHORT_CHUNKS
from runtime.test_executors import MakeBundle

from megalodon_deploy.errors import UserError
from megalodon_deploy.runtime import stream as stream_module
from megalodon_deploy.runtime.device_array import device_array, download, is_device_array, stream_handle
from megalodon_deploy.runtime.session import Session


def interface_of(array: np.ndarray, **changes: Any) -> SimpleNamespace:
    values = {"shape": array.shape, "typestr": array.dtype.str, "data": (array.ctypes.data, True), "version": 3}
    return SimpleNamespace(__cuda_array_interface__=values | changes, keeps=array)


class DLPackArray:
    """A CPU array's DLPack capsule, with the device changed to CUDA's number as a GPU library would set it."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array
        self.stream: int | None = None

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, 0

    def __dlpack__(self, stream: int | None = None) -> object:
        self.stream = stream
        return self.array.__dlpack__()


def copy_on_host(target: int, source: int, size_bytes: int, stream: int | None) -> None:
    ctypes.memmove(target, source, size_bytes)


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.uint8, np.float32, np.float16])
@pytest.mark.parametrize("kind", [interface_of, DLPackArray])
def test_an_array_is_taken_with_its_place_shape_and_type(kind: Any, dtype: type) -> None:
    array = np.arange(12).reshape(3, 4).astype(dtype)
    given = kind(array)
    assert is_device_array(given)
    found = device_array(given)
    assert (found.address, found.shape, found.dtype) == (array.ctypes.data, (3, 4), array.dtype)
    assert found.size_bytes == array.nbytes
    np.testing.assert_array_equal(download(given, copy_on_host), array)


def test_an_interface_carries_its_stream_and_comes_out_as_it_went_in() -> None:
    array = np.arange(5.0)
    found = device_array(interface_of(array, stream=7))
    assert found.stream == 7
    again = device_array(found)
    assert (again.address, again.shape, again.dtype, again.stream) == (array.ctypes.data, (5,), array.dtype, 7)
    order: list[Any] = []
    download(found, lambda target, source, size_bytes, stream: order.append((source, size_bytes, stream)))
    assert order == [(array.ctypes.data, 40, 7)]
    packed = DLPackArray(array)
    assert device_array(packed).stream == packed.stream == 1, "the producer orders its work before the legacy stream"


def test_dlpack_memory_stays_while_the_array_is_held() -> None:
    array = np.arange(1000)
    found = device_array(DLPackArray(array))
    expected = array.copy()
    del array
    np.testing.assert_array_equal(download(found, copy_on_host), expected)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (interface_of(np.zeros((4, 4)), strides=(8, 32)), "not dense"),
        (DLPackArray(np.zeros((4, 4)).T), "not dense"),
        (DLPackArray(np.zeros(10)[::2]), "not dense"),
        (interface_of(np.zeros(3), mask=1), "mask"),
        (DLPackArray(np.zeros(3, np.complex64)), "DLPack type 5"),
        ([1, 2], "list is no GPU array"),
        (np.zeros(3), "ndarray is no GPU array"),
    ],
)
def test_what_cannot_be_taken_is_refused(given: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        device_array(given)
    assert "\n" not in str(caught.value)


def test_strides_of_a_dense_array_are_fine() -> None:
    for array in (np.zeros((3, 1, 4)), np.zeros((0, 4)), np.zeros((1, 5))):
        assert device_array(interface_of(array, strides=array.strides)).shape == array.shape
        assert device_array(DLPackArray(array)).shape == array.shape


@pytest.mark.parametrize(
    "given",
    [
        9,
        SimpleNamespace(handle=9),
        SimpleNamespace(cuda_stream=9),
        SimpleNamespace(ptr=9),
        SimpleNamespace(__cuda_stream__=(0, 9), handle=object()),
        SimpleNamespace(__cuda_stream__=lambda: (0, 9)),
    ],
)
def test_streams_of_every_library_have_a_handle(given: object) -> None:
    assert stream_handle(given) == 9


@pytest.mark.parametrize("given", [None, "stream", True, object(), SimpleNamespace(__cuda_stream__=(1, 9))])
def test_what_is_no_stream_is_refused(given: object) -> None:
    with pytest.raises(UserError, match="stream"):
        stream_handle(given)


def test_prompts_may_lie_on_a_gpu(make_bundle: MakeBundle, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("megalodon_deploy.runtime.cuda.driver", reason="cuda-bindings is not installed")
    monkeypatch.setattr("megalodon_deploy.runtime.cuda.driver.copy_to_host", copy_on_host)
    tokens = np.array([5, 250, 7, 7], np.int32)
    session = make_bundle(SHORT_CHUNKS).session(threads=1)
    for given in (interface_of(tokens), DLPackArray(tokens)):
        ours, theirs = session.stream(), session.stream()
        np.testing.assert_array_equal(ours.prefill(given), theirs.prefill(tokens.tolist()))  # type: ignore[arg-type]
    assert stream_module.check_tokens(interface_of(tokens), 256) == [5, 250, 7, 7]  # type: ignore[arg-type]
    for bad, message in ((np.array([256]), "token 256"), (np.array([1.5]), "integers"), (np.array([[1]]), "integers")):
        with pytest.raises(UserError, match=message):
            stream_module.check_tokens(interface_of(bad), 256)  # type: ignore[arg-type]


def test_logits_can_be_read_and_changed_where_they_are(make_bundle: MakeBundle) -> None:
    bundle = make_bundle(SHORT_CHUNKS)
    session = Session(bundle, FakeCudaExecutor(bundle))
    stream = session.batch(3).admit()
    with pytest.raises(UserError, match="step it or prefill it first"):
        _ = stream.logits_on_gpu
    expected = stream.prefill([1, 2, 3])
    found = stream.logits_on_gpu
    assert found.shape == (256,)
    assert found.stream == 77
    np.testing.assert_array_equal(download(found, copy_on_host), expected)
    forbidden = int(np.argmax(expected))
    ctypes.memmove(found.address + 4 * forbidden, np.array([-np.inf], np.float32).ctypes.data, 4)
    item = next(stream.generate(max_new_tokens=1))
    assert item.token == int(np.argsort(expected)[-2])
    on_cpu = bundle.session(threads=1).stream()
    on_cpu.prefill([1])
    with pytest.raises(UserError, match="onnxruntime are in main memory"):
        _ = on_cpu.logits_on_gpu
