"""Polygraphy's runner of TensorRT engines, for all types of a bundle.

Import it when Polygraphy knows the flavour of TensorRT: its class is bound to one.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np
from polygraphy.backend.trt import TrtRunner
from polygraphy.common import FormattedArray

from megalodon_deploy.runtime.executors.tensorrt import TensorRTErrors

_DTYPES = {  # by TensorRT's names; NumPy itself has no bfloat16 and no fp8
    "FLOAT": np.dtype(np.float32),
    "HALF": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "FP8": np.dtype(ml_dtypes.float8_e4m3fn),
    "INT8": np.dtype(np.int8),
    "INT64": np.dtype(np.int64),
}


class EngineRunner(TrtRunner):  # type: ignore[misc]  # Polygraphy ships no types
    """Arrays go in and come out as bytes, which Polygraphy copies whatever they stand for.

    Raises `EngineError` with TensorRT's own words where it refuses something.
    """

    def __init__(self, errors: TensorRTErrors, load: Callable[[], Any]) -> None:
        super().__init__(load)
        self._errors = errors

    def activate_impl(self) -> None:
        with self._errors.told("TensorRT cannot make a context"):
            super().activate_impl()

    def infer_impl(self, feed_dict: Mapping[str, np.ndarray]) -> OrderedDict[str, np.ndarray]:
        feeds = {
            name: FormattedArray(np.ascontiguousarray(array).reshape(-1).view(np.uint8), array.shape)
            for name, array in feed_dict.items()
        }
        with self._errors.told("TensorRT refused the call"):
            raw = super().infer_impl(feeds, return_raw_buffers=True)
        return OrderedDict((name, self._array(name, item)) for name, item in raw.items())

    def _array(self, name: str, raw: FormattedArray) -> np.ndarray:
        """A copy: the runner's own buffer serves the next call."""
        dtype = _DTYPES[self.engine.get_tensor_dtype(name).name]
        array: np.ndarray = raw.array.copy().view(dtype).reshape(tuple(raw.shape))
        return array
