"""ONNX Runtime as the comparison needs it: exact products, and tensors of fp8.

Its Python interface does not take fp8 as NumPy arrays.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
import onnxruntime
from onnx import TensorProto
from polygraphy.backend.onnxrt import OnnxrtRunner

from megalodon_deploy.runtime.executors.onnxruntime import FLOAT_PRODUCTS, MATMUL_ACCURACY

_FP8 = np.dtype(ml_dtypes.float8_e4m3fn)


def open_exact(model: str | Path | bytes, weights: Path | None = None) -> onnxruntime.InferenceSession:
    """On the CPU, with activations that are not rounded to int8 where a matrix is quantised.

    `model` is a file, or the content of one whose weights lie in the directory `weights`.
    """
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry(MATMUL_ACCURACY, FLOAT_PRODUCTS)
    if weights is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(weights))
    source = model if isinstance(model, bytes) else str(model)
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


class OrtValueRunner(OnnxrtRunner):  # type: ignore[misc]  # Polygraphy ships no types
    """Polygraphy's runner, by way of ONNX Runtime's own values: fp8 goes in and comes out as its bits."""

    def infer_impl(self, feed_dict: Mapping[str, np.ndarray]) -> OrderedDict[str, np.ndarray]:
        begin = time.perf_counter()
        feeds = {name: _to_value(array) for name, array in feed_dict.items()}
        values = self.sess.run_with_ort_values(None, feeds)
        outputs = [(node.name, _to_array(value)) for node, value in zip(self.sess.get_outputs(), values, strict=True)]
        self.inference_time = time.perf_counter() - begin
        return OrderedDict(outputs)


def _to_value(array: np.ndarray) -> onnxruntime.OrtValue:
    if array.dtype != _FP8:
        return onnxruntime.OrtValue.ortvalue_from_numpy(array)
    bits = np.ascontiguousarray(array).view(np.uint8)
    return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, TensorProto.FLOAT8E4M3FN)


def _to_array(value: onnxruntime.OrtValue) -> np.ndarray:
    array: np.ndarray = value.numpy()
    return array.view(_FP8) if value.element_type() == TensorProto.FLOAT8E4M3FN else array
