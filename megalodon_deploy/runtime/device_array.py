"""Other people's GPU arrays and streams: PyCUDA, CuPy, PyTorch, cuda.core, anything that speaks their protocols.

An array is taken through `__cuda_array_interface__` (version 2 or 3) or DLPack; a stream through `__cuda_stream__` or
the attribute by which its library names the handle.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from megalodon_deploy.errors import UserError

_DLPACK_CPU, _DLPACK_CUDA = 1, 2  # enum DLDeviceType
_DLPACK_KINDS = {0: "int", 1: "uint", 2: "float"}  # enum DLDataTypeCode
_STREAM_ATTRIBUTES = ("handle", "cuda_stream", "ptr")  # PyCUDA, PyTorch, CuPy

Download = Callable[[int, int, int, int | None], None]  # target, source, bytes, stream to wait for


@dataclass(frozen=True)
class DeviceArray:
    """A dense, row-major array in GPU memory, which stays its owner's."""

    address: int
    shape: tuple[int, ...]
    dtype: np.dtype
    stream: int | None  # on which its content was made: work on another one has to wait for it
    owner: object  # held so that the memory stays

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {
            "shape": self.shape,
            "typestr": self.dtype.str,
            "data": (self.address, False),
            "strides": None,
            "version": 3,
            "stream": self.stream,
        }


def is_device_array(array: object) -> bool:
    """Whether its content lies on a GPU."""
    if hasattr(array, "__cuda_array_interface__"):
        return True
    device = getattr(array, "__dlpack_device__", None)
    return device is not None and device()[0] == _DLPACK_CUDA


def device_array(array: object) -> DeviceArray:
    """The array's memory, without a copy. Raises `UserError` for an object without either protocol, for one that is
    not dense and row-major, and for a type of elements that numpy lacks."""
    interface = getattr(array, "__cuda_array_interface__", None)
    if interface is not None:
        return _from_interface(array, interface)
    if is_device_array(array):
        return _from_dlpack(array)
    name = type(array).__name__
    raise UserError(f"{name} is no GPU array: it has neither __cuda_array_interface__ nor DLPack on a GPU")


def download(array: object, copy: Download) -> np.ndarray:
    """The content of a GPU array in main memory; `copy` does the copy, and waits for the array's stream before."""
    found = device_array(array)
    target = np.empty(found.shape, found.dtype)
    copy(target.ctypes.data, found.address, found.size_bytes, found.stream)
    return target


def stream_handle(stream: object) -> int:
    """The cudaStream_t of a stream. Raises `UserError` for what is none."""
    if isinstance(stream, int) and not isinstance(stream, bool):
        return stream
    protocol = getattr(stream, "__cuda_stream__", None)
    if protocol is not None:
        version, handle = protocol() if callable(protocol) else protocol
        if version != 0:
            raise UserError(f"stream: version {version} of __cuda_stream__ is unknown, expected 0")
        return int(handle)
    for name in _STREAM_ATTRIBUTES:
        if isinstance(handle := getattr(stream, name, None), int):
            return handle
    raise UserError(f"stream = {stream!r:.60} is no CUDA stream of PyCUDA, CuPy, PyTorch or cuda.core, and no handle")


def _from_interface(array: object, interface: dict[str, Any]) -> DeviceArray:
    shape, dtype = tuple(int(size) for size in interface["shape"]), np.dtype(interface["typestr"])
    if interface.get("mask") is not None:
        raise UserError("the GPU array has a mask; give one without")
    _check_dense(shape, interface.get("strides"), dtype.itemsize)
    stream = interface.get("stream")
    return DeviceArray(int(interface["data"][0] or 0), shape, dtype, stream, array)


def _check_dense(shape: tuple[int, ...], strides: tuple[int, ...] | None, unit: int) -> None:
    if strides is None or math.prod(shape) == 0:
        return
    expected = unit
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size > 1 and stride != expected:
            raise UserError(f"the GPU array of shape {list(shape)} is not dense and row-major; copy it first")
        expected *= size


class _DLTensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


def _from_dlpack(array: Any) -> DeviceArray:
    capsule = array.__dlpack__(stream=_LEGACY_STREAM)  # the producer makes that stream wait for its work
    get = ctypes.pythonapi.PyCapsule_GetPointer
    get.restype, get.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    tensor = ctypes.cast(get(capsule, b"dltensor"), ctypes.POINTER(_DLTensor)).contents
    if tensor.code not in _DLPACK_KINDS or tensor.lanes != 1:
        raise UserError(
            f"the GPU array has elements of DLPack type {tensor.code}, {tensor.bits} bits; convert it first"
        )
    dtype = np.dtype(f"{_DLPACK_KINDS[tensor.code]}{tensor.bits}")
    shape = tuple(tensor.shape[:ndim]) if (ndim := tensor.ndim) else ()
    _check_dense(shape, tuple(tensor.strides[:ndim]) if tensor.strides else None, 1)
    return DeviceArray((tensor.data or 0) + tensor.byte_offset, shape, dtype, _LEGACY_STREAM, capsule)


_LEGACY_STREAM = 1  # cudaStreamLegacy
