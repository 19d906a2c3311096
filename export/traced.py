"""A traced graph, searched and rewritten by pattern. What is not as expected is an error, never left alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, helper, numpy_helper

from dycoke_edge.errors import BundleError

Array = NDArray[Any]


class Traced:
    """A graph by its values. New nodes replace the makers of the values they give; `save` drops what nothing uses."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.model = onnx.load(path, load_external_data=False)
        self.constants = {tensor.name: tensor for tensor in self.model.graph.initializer}
        self.maker: dict[str, NodeProto] = {}
        for node in self.model.graph.node:
            if node.op_type == "Gather" and all(value in self.constants for value in node.input):
                self._look_up(node)  # the exporter does so itself with small tables only
            else:
                self.maker |= dict.fromkeys(node.output, node)
        self.used_by: dict[str, list[NodeProto]] = defaultdict(list)
        for node in self.model.graph.node:
            for value in node.input:
                self.used_by[value].append(node)

    def all(self, op: str) -> list[NodeProto]:
        """The nodes of an op, in order."""
        return [node for node in self.model.graph.node if node.op_type == op]

    def up(self, value: str, op: str, **attributes: Any) -> NodeProto:
        """The node that makes a value, which must be such a node."""
        return self._expect(self.maker.get(value), value, op, attributes)

    def down(self, value: str, op: str, **attributes: Any) -> NodeProto:
        """The only node that uses a value, which must be such a node."""
        users = self.used_by[value]
        return self._expect(users[0] if len(users) == 1 else None, value, op, attributes)

    def halves(self, node: NodeProto) -> tuple[str, str]:
        """A value and a constant: the inputs of a node, in whichever order they stand."""
        first, second = node.input
        if (first in self.constants) == (second in self.constants):
            raise self.unknown(f"{node.op_type} {node.name} has no constant, or nothing else")
        return (second, first) if first in self.constants else (first, second)

    def linear(self, value: str) -> tuple[str, str]:
        """What MatMul gave and the bias, where a value is MatMul plus bias."""
        product, bias = self.halves(self.up(value, "Add"))
        self.halves(self.up(product, "MatMul"))
        return product, bias

    def _look_up(self, gather: NodeProto) -> None:
        """Positions of patches: what a Gather takes of a constant, as a constant."""
        table, index = (self.array(name) for name in gather.input)
        axis = next((helper.get_attribute_value(a) for a in gather.attribute if a.name == "axis"), 0)
        found = np.ascontiguousarray(np.take(table, index, axis=axis))
        self.constants[gather.output[0]] = numpy_helper.from_array(found, gather.output[0])

    def array(self, name: str) -> Array:
        """A constant's content."""
        return numpy_helper.to_array(self.constants[name], str(self.path.parent))

    def scalar(self, name: str) -> float:
        """A constant's only element."""
        return float(self.array(name).reshape(()))

    def constant(self, name: str, array: Array) -> str:
        """Add a constant that lies in the graph file; returns its name."""
        assert name not in self.constants and name not in self.maker
        self.constants[name] = numpy_helper.from_array(np.ascontiguousarray(array), name)
        return name

    def make(self, op: str, inputs: list[str], outputs: list[str], domain: str = "", **attributes: Any) -> str:
        """Add a node in place of the makers of its outputs; returns the first output."""
        node = helper.make_node(op, inputs, outputs, name=outputs[0], domain=domain, **attributes)
        self.maker |= {name: node for name in outputs if name}
        return outputs[0]

    def save(self, path: Path, opsets: dict[str, int]) -> None:
        """Write a graph file, with weights where those of the traced one lie."""
        graph = self.model.graph
        nodes = list(self._needed())
        used = {value for node in nodes for value in node.input}
        del graph.node[:], graph.initializer[:], graph.value_info[:], self.model.opset_import[:]
        graph.node.extend(nodes)
        graph.initializer.extend(tensor for name, tensor in self.constants.items() if name in used)
        self.model.opset_import.extend(helper.make_opsetid(domain, version) for domain, version in opsets.items())
        path.write_bytes(self.model.SerializeToString())

    def unknown(self, what: str) -> BundleError:
        """The error for a graph of another form."""
        return BundleError(f"{self.path.name} cannot be rewritten: {what}; no bundle was written, please report this")

    def _expect(self, node: NodeProto | None, value: str, op: str, attributes: dict[str, Any]) -> NodeProto:
        if node is None or node.op_type != op:
            raise self.unknown(f"{value} is next to {node.op_type if node else 'none or many'}, not {op}")
        found = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        if any(found.get(name) != wanted for name, wanted in attributes.items()):
            raise self.unknown(f"{op} {node.name} has {found}, not {attributes}")
        return node

    def _needed(self) -> Iterator[NodeProto]:
        """The nodes that outputs depend on, each after those it depends on."""
        done = set[int]()
        stack = [(self.maker[output.name], False) for output in self.model.graph.output]
        while stack:
            node, ready = stack.pop()
            if id(node) in done:
                continue
            if ready:
                done.add(id(node))
                yield node
                continue
            stack.append((node, True))
            stack.extend((self.maker[value], False) for value in reversed(node.input) if value in self.maker)
