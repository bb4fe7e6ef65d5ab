"""Emit ONNX nodes by name: the little that a function body for TensorRT needs.

A complex value is a pair of names, of its real and its imaginary part.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import onnx

Complex = tuple[str, str]


class Emitter:
    """Nodes of a function body; methods return the names of what they make."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []

    def op(self, kind: str, *inputs: str, **attributes: Any) -> str:
        return self.multi(kind, 1, *inputs, **attributes)[0]

    def multi(self, kind: str, count: int, *inputs: str, **attributes: Any) -> list[str]:
        """A node with `count` outputs."""
        from onnx import helper

        outputs = [f"{kind.lower()}_{len(self.nodes)}_{index}" for index in range(count)]
        self.nodes.append(helper.make_node(kind, inputs, outputs, name=outputs[0], **attributes))
        return outputs

    def constant(self, values: Any, dtype: type[np.generic] = np.int64) -> str:
        from onnx import numpy_helper

        return self.op("Constant", value=numpy_helper.from_array(np.array(values, dtype)))

    def length(self, value: str, axis: int) -> str:
        """Length of one axis, [1]."""
        return self.op("Shape", value, start=axis, end=axis + 1)

    def reshape(self, value: str, *dims: int | str) -> str:
        """Each of `dims` is a number (0 keeps, -1 infers) or a length."""
        parts = [dim if isinstance(dim, str) else self.constant([dim]) for dim in dims]
        return self.op("Reshape", value, self.op("Concat", *parts, axis=0))

    def slice(self, value: str, start: str, end: str, axis: int) -> str:
        return self.op("Slice", value, start, end, self.constant([axis]))

    def pad(self, value: str, rank: int, axis: int, *, before: str | None = None, after: str | None = None) -> str:
        """Zeros at one end of an axis; `before` and `after` are lengths."""
        zero = self.constant([0])
        pads = [zero] * (2 * rank)
        pads[axis], pads[rank + axis] = before or zero, after or zero
        return self.op("Pad", value, self.op("Concat", *pads, axis=0))

    def unsqueeze(self, value: str, *axes: int) -> str:
        return self.op("Unsqueeze", value, self.constant(axes))

    def split(self, pairs: str) -> Complex:
        """[..., 2] -> parts [...]."""
        parts = self.multi("Split", 2, pairs, axis=-1, num_outputs=2)
        real, imaginary = (self.op("Squeeze", part, self.constant([-1])) for part in parts)
        return real, imaginary

    def join(self, value: Complex) -> str:
        """Parts [...] -> [..., 2]."""
        return self.op("Concat", *self.each("Unsqueeze", value, self.constant([-1])), axis=-1)

    def each(self, kind: str, value: Complex, *others: str, **attributes: Any) -> Complex:
        """The same operator on both parts."""
        return self.op(kind, value[0], *others, **attributes), self.op(kind, value[1], *others, **attributes)

    def multiply(self, a: Complex, b: Complex) -> Complex:
        imaginary = self.op("Add", self.op("Mul", a[0], b[1]), self.op("Mul", a[1], b[0]))
        return self.real_product(a, b), imaginary

    def real_product(self, a: Complex, b: Complex) -> str:
        """Real part of a b."""
        return self.op("Sub", self.op("Mul", a[0], b[0]), self.op("Mul", a[1], b[1]))

    def add(self, a: Complex, b: Complex) -> Complex:
        return self.op("Add", a[0], b[0]), self.op("Add", a[1], b[1])

    def concat(self, a: Complex, b: Complex, axis: int) -> Complex:
        return self.op("Concat", a[0], b[0], axis=axis), self.op("Concat", a[1], b[1], axis=axis)
