"""Writes ONNX graphs node by node, streaming weights to one `.data` file as they come, and finishes traced ones."""

from __future__ import annotations

import mmap
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from dycoke_edge.contract import IR_VERSION, OPSET, Graph, Placed, Tensor

ALIGNMENT = 4096  # page size: lets ONNX Runtime map weights instead of reading them
ONNX_TYPE = {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16, "int32": TensorProto.INT32}


class GraphWriter:
    """Builds one graph of the contract. Weights never stay in memory: each goes to `<file>.data` at once."""

    def __init__(self, path: Path, spec: Graph) -> None:
        self.path = path
        self.spec = spec
        self._nodes: list[onnx.NodeProto] = []
        self._initializers: dict[str, TensorProto] = {}
        self.placed: dict[str, Placed] = {}  # where each weight lies
        self._data = path.with_name(path.name + ".data").open("wb")

    def __enter__(self) -> GraphWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._data.close()

    def node(self, op: str, *inputs: str, out: str = "", **attributes: Any) -> str:
        """Add a node with one output; returns the output's name (made up from the op unless given)."""
        name = out or f"{op.lower()}_{len(self._nodes)}"
        self._nodes.append(helper.make_node(op, list(inputs), [name], name=name, **attributes))
        return name

    def split(self, value: str, sizes: list[int] | int, axis: int) -> list[str]:
        """Add a Split into parts of constant sizes, or into a number of equal parts."""
        count = sizes if isinstance(sizes, int) else len(sizes)
        names = [f"split_{len(self._nodes)}_{part}" for part in range(count)]
        inputs = [value] if isinstance(sizes, int) else [value, self.ints(sizes)]
        self._nodes.append(helper.make_node("Split", inputs, names, name=names[0], axis=axis))
        return names

    def ints(self, values: list[int]) -> str:
        """A small int64 constant: shapes, axes, bounds."""
        return self.constant("ints_" + "_".join(map(str, values)), np.array(values, np.int64))

    def scalar(self, value: float, dtype: type[np.generic] = np.float32) -> str:
        """A scalar constant."""
        return self.constant(f"scalar_{value:g}_{np.dtype(dtype).name}", np.array(value, dtype))

    def constant(self, name: str, array: NDArray[Any]) -> str:
        """A constant small enough to lie in the graph itself; the same name is the same constant."""
        self._initializers.setdefault(name, onnx.numpy_helper.from_array(array, name))
        return name

    def weight(self, name: str, array: NDArray[Any]) -> str:
        """Stream a weight to the data file; returns its name."""
        assert name not in self._initializers
        tensor = TensorProto(name=name, data_location=TensorProto.EXTERNAL, dims=array.shape)
        tensor.data_type = helper.np_dtype_to_tensor_dtype(array.dtype)
        file = self.path.name + ".data"
        offset = _append(self._data, tensor, np.ascontiguousarray(array).data.cast("B"), file)
        self.placed[name] = Placed(file=file, offset=offset, shape=array.shape)
        self._initializers[name] = tensor
        return name

    def save(self) -> None:
        """Write the graph file, with shapes inferred for every value."""
        graph = helper.make_graph(
            self._nodes,
            self.spec.name,
            [_value_info(tensor) for tensor in self.spec.inputs],
            [_value_info(tensor) for tensor in self.spec.outputs],
            list(self._initializers.values()),
        )
        finish(helper.make_model(graph), self.path, self.spec)


def _append(data: BinaryIO, tensor: TensorProto, content: memoryview, location: str) -> int:
    """Write a weight at the next page of a data file and note the place in its tensor; returns its offset."""
    offset = data.seek(-(-data.tell() // ALIGNMENT) * ALIGNMENT)
    place = {"location": location, "offset": offset, "length": content.nbytes}
    del tensor.external_data[:]
    for key, value in place.items():
        tensor.external_data.add(key=key, value=str(value))
    data.write(content)
    return offset


def align(model: onnx.ModelProto, path: Path) -> None:
    """Move a traced graph's weights to page boundaries, as `GraphWriter` places them."""
    file = path.with_name(path.name + ".data")
    moved = file.with_name(file.name + ".aligned")
    with (
        file.open("rb") as old,
        moved.open("wb") as new,
        mmap.mmap(old.fileno(), 0, access=mmap.ACCESS_READ) as content,
    ):
        for tensor in model.graph.initializer:
            if tensor.data_location == TensorProto.EXTERNAL:
                _append(new, tensor, memoryview(content)[lies_at(tensor)], file.name)
    moved.replace(file)


def lies_at(tensor: TensorProto) -> slice:
    """Where a weight lies in its data file, in bytes."""
    place = {entry.key: entry.value for entry in tensor.external_data}
    start = int(place.get("offset", 0))
    return slice(start, start + int(place["length"]))


def _value_info(tensor: Tensor) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(tensor.name, ONNX_TYPE[tensor.dtype], tensor.shape)


def finish(model: onnx.ModelProto, path: Path, spec: Graph) -> None:
    """Stamp opset, IR and the contract's own dimension names, infer shapes strictly, and save."""
    del model.opset_import[:]
    model.opset_import.append(helper.make_opsetid("", OPSET))
    model.ir_version = IR_VERSION
    model.producer_name = "dycoke-edge"
    del model.graph.input[:], model.graph.output[:], model.graph.value_info[:]
    model.graph.input.extend(_value_info(tensor) for tensor in spec.inputs)
    model.graph.output.extend(_value_info(tensor) for tensor in spec.outputs)
    _unset_allowzero(model.graph)
    model = _inferred(model)
    _softmax_in_fp32(model.graph)
    path.write_bytes(_inferred(model).SerializeToString())


def _inferred(model: onnx.ModelProto) -> onnx.ModelProto:
    return onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)


def _unset_allowzero(graph: onnx.GraphProto) -> None:
    """The tracer sets it on every Reshape, though no target holds a 0."""
    for node in graph.node:
        if node.op_type == "Reshape":
            del node.attribute[:]


def _softmax_in_fp32(graph: onnx.GraphProto) -> None:
    """Cast before and after each fp16 Softmax: where torch computes in fp32, its exporter only casts the result."""
    halves = {value.name for value in graph.value_info if value.type.tensor_type.elem_type == TensorProto.FLOAT16}
    nodes = list(graph.node)
    del graph.node[:]
    for node in nodes:
        if node.op_type == "Softmax" and node.input[0] in halves:
            scores, probs = node.input[0], node.output[0]
            node.input[0], node.output[0] = f"{scores}_fp32", f"{probs}_fp32"
            before = helper.make_node("Cast", [scores], [node.input[0]], name=node.input[0], to=TensorProto.FLOAT)
            after = helper.make_node("Cast", [node.output[0]], [probs], name=node.output[0], to=TensorProto.FLOAT16)
            graph.node.extend([before, node, after])
        else:
            graph.node.append(node)
