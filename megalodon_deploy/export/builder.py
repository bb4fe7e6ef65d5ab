"""Emit ONNX nodes into an onnx-ir graph: scopes give names, equal constants are stored once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnx_ir as ir

OPSET = 24
IR_VERSION = 11


class GraphBuilder:
    """Collects the nodes of one graph, function or subgraph.

    A value made in scope `layers.3.mega` under the name `wv` is called `layers.3.mega.wv`, its node
    `/layers.3/mega/wv`; without a name the operator's is used. Names are unique: a second one gets a number.
    """

    def __init__(self, parent: GraphBuilder | None = None) -> None:
        self.nodes: list[ir.Node] = []
        self._root: GraphBuilder = parent._root if parent else self
        self._outer_scopes: list[str] = list(parent._scopes) if parent else []
        self._scopes: list[str] = list(self._outer_scopes)
        self._name_counts: dict[str, int] = {}
        self._constant_of: dict[tuple[str, tuple[int, ...], bytes], ir.Value] = {}

    @staticmethod
    def typed(value: ir.Value, dtype: ir.DataType, shape: Sequence[int | str]) -> ir.Value:
        """State what shape inference cannot find out."""
        value.dtype, value.shape = dtype, ir.Shape(shape)
        return value

    @contextmanager
    def scope(self, name: str) -> Iterator[None]:
        self._scopes.append(name)
        try:
            yield
        finally:
            self._scopes.pop()

    def op(
        self,
        op_type: str,
        *inputs: ir.Value | None,
        name: str | None = None,
        domain: str = "",
        **attributes: Any,
    ) -> ir.Value:
        """A node with one output."""
        return self.multi(op_type, *inputs, names=[name or op_type.lower()], domain=domain, **attributes)[0]

    def multi(
        self, op_type: str, *inputs: ir.Value | None, names: Sequence[str], domain: str = "", **attributes: Any
    ) -> list[ir.Value]:
        """A node with an output per name; the node is named after the first."""
        values = [ir.Value(name=self.unique(name)) for name in names]
        leaf = str(values[0].name).rsplit(".", 1)[-1]
        path = "/" + "/".join([*self._scopes, leaf])
        self.nodes.append(ir.node(op_type, inputs, attributes, domain=domain, outputs=values, name=path))
        return values

    def constant(self, value: np.ndarray | Sequence[int], name: str) -> ir.Value:
        """A constant of this graph; sequences of Python integers are int64.

        A subgraph has its own: whatever it reads from outside is handed in anew at every run.
        """
        array = np.asarray(value, None if isinstance(value, np.ndarray) else np.int64)
        key = (str(array.dtype), array.shape, array.tobytes())
        if key not in self._constant_of:
            full = self.unique(".".join([*self._outer_scopes, "constants", name]), scoped=False)
            constant = ir.Value(name=full, const_value=ir.tensor(array, name=full))
            constant.dtype, constant.shape = ir.DataType.from_numpy(array.dtype), ir.Shape(array.shape)
            self._constant_of[key] = constant
        return self._constant_of[key]

    @property
    def constants(self) -> list[ir.Value]:
        return list(self._constant_of.values())

    def scalar(self, value: float, dtype: type[np.generic], name: str) -> ir.Value:
        return self.constant(np.array(value, dtype), name)

    def inner(self, name: str) -> GraphBuilder:
        """A builder for a subgraph; its nodes may read values of the graphs around it."""
        with self.scope(name):
            return GraphBuilder(self)

    def subgraph(self, name: str, inputs: Sequence[ir.Value], outputs: Sequence[ir.Value]) -> ir.Graph:
        """What was emitted into this inner builder, as the graph of an attribute."""
        return ir.Graph(list(inputs), list(outputs), nodes=self.all_nodes(), name=name)

    def all_nodes(self) -> list[ir.Node]:
        """The nodes behind the constants, which become `Constant` nodes: functions have no initializers."""
        nodes = []
        for value in self.constants:
            node = ir.node("Constant", [], {"value": value.const_value}, outputs=[ir.Value(name=value.name)])
            value.replace_all_uses_with(node.outputs[0])
            nodes.append(node)
        return nodes + self.nodes

    def unique(self, name: str, *, scoped: bool = True) -> str:
        """The name in this scope, with a number if it is taken."""
        full = ".".join([*self._scopes, name]) if scoped else name
        counts = self._root._name_counts
        counts[full] = counts.get(full, -1) + 1
        return f"{full}_{counts[full]}" if counts[full] else full
