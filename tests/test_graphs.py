"""Rules that make one ONNX file run on ONNX Runtime and build on TensorRT 8.6 to 11, over every exported graph.

A rule takes a graph and returns its complaints. `BAD` holds graphs that break each of them.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import AttributeProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from dycoke_edge import contract
from dycoke_edge.bundle import open_bundle
from dycoke_edge.contract import Graph, Tensor
from dycoke_edge.ort import onnxruntime

Array = NDArray[Any]
MERGES = ["merge_030", "merge_050", "merge_070", "merge_090"]
DECODERS = ["decoder_shallow", "decoder_deep"]
BUNDLES = {
    "tiny_bundle": ["vision", *MERGES, *DECODERS],
    "half_bundle": ["vision", "merge_050", *DECODERS],
}
GRAPHS = [(bundle, name) for bundle, names in BUNDLES.items() for name in names]
FORMS = ["vision_cuda", "vision_trt"]  # of vision; each keeps the rules but those below
# All that the graphs need, and TensorRT 8.6 to 11 and every ONNX Runtime have. An op that is new here must be looked
# up there first.
# fmt: off
ALLOWED = {
    "Add", "Cast", "Clip", "Concat", "Conv", "Div", "Erf", "Expand", "Gather", "GatherElements", "Identity",
    "LayerNormalization", "MatMul", "Mul", "Pow", "ReduceMean", "ReduceSum", "Reshape", "Shape", "Sigmoid", "Slice",
    "Softmax", "Split", "Sqrt", "Sum", "Tanh", "Tile", "TopK", "Transpose", "Unsqueeze",
}
# fmt: on
FP32_ONLY = {"Softmax", "LayerNormalization", "ReduceMean", "Pow"}  # what an fp16 graph computes in fp32
ELEMENT = {TensorProto.FLOAT: "fp32", TensorProto.FLOAT16: "fp16", TensorProto.INT32: "int32"}
PAGE = 4096


@dataclass
class Exported:
    """A graph's file, its content without external data, and what the contract says of it."""

    path: Path
    model: ModelProto
    spec: Graph

    @property
    def nodes(self) -> list[NodeProto]:
        return list(self.model.graph.node)

    @property
    def constants(self) -> dict[str, TensorProto]:
        """Initializers, and what Constant nodes hold."""
        found = {tensor.name: tensor for tensor in self.model.graph.initializer}
        for node in self.nodes:
            if node.op_type == "Constant":
                found[node.output[0]] = helper.get_attribute_value(node.attribute[0])
        return found

    @property
    def external(self) -> dict[str, dict[str, str]]:
        """What is said of each initializer that lies in a data file."""
        tensors = [t for t in self.model.graph.initializer if t.data_location == TensorProto.EXTERNAL]
        return {tensor.name: {entry.key: entry.value for entry in tensor.external_data} for tensor in tensors}

    def element_types(self) -> dict[str, int]:
        """Every value's type, inferred."""
        graph = _inferred(self.model).graph
        values = [*graph.input, *graph.output, *graph.value_info]
        types = {value.name: value.type.tensor_type.elem_type for value in values}
        return types | {name: tensor.data_type for name, tensor in self.constants.items()}

    def array(self, name: str) -> Array:
        return numpy_helper.to_array(self.constants[name], str(self.path.parent))


def _inferred(model: ModelProto) -> ModelProto:
    return onnx.shape_inference.infer_shapes(model, strict_mode=True, check_type=True, data_prop=True)


def _attributes(node: NodeProto) -> dict[str, Any]:
    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}


def _shape(value: ValueInfoProto) -> tuple[int | str, ...]:
    return tuple(dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim)


# the rules


def opset_17_and_no_other_domain(graph: Exported) -> list[str]:
    imports = {(opset.domain, opset.version) for opset in graph.model.opset_import}
    found = [] if imports == {("", 17)} else [f"opsets {sorted(imports)}"]
    found += [] if graph.model.ir_version == 8 else [f"IR {graph.model.ir_version}"]
    return found + [f"{node.op_type} of {node.domain}" for node in graph.nodes if node.domain]


def no_functions_or_control_flow(graph: Exported) -> list[str]:
    nested = (AttributeProto.GRAPH, AttributeProto.GRAPHS)
    found = [f"function {function.name}" for function in graph.model.functions]
    found += [f"{n.op_type} holds a graph" for n in graph.nodes if any(a.type in nested for a in n.attribute)]
    return found + [f"{n.op_type} is a sequence" for n in graph.nodes if "Sequence" in n.op_type]


def only_allowed_ops(graph: Exported) -> list[str]:
    return [f"op {op}" for op in sorted({node.op_type for node in graph.nodes} - ALLOWED)]


def reductions_have_constant_axes(graph: Exported) -> list[str]:
    """TensorRT 8.6 ignores `axes` as an input, and reduces over all, but for ReduceSum."""
    found = []
    for node in graph.nodes:
        if node.op_type == "ReduceSum":
            ok = len(node.input) == 2 and node.input[1] in graph.constants
        else:
            ok = not node.op_type.startswith("Reduce") or (len(node.input) == 1 and "axes" in _attributes(node))
        found += [] if ok else [f"{node.op_type} {node.name}: inputs {list(node.input)}"]
    return found


def nothing_is_cut_and_joined_by_arithmetic_alone(graph: Exported) -> list[str]:
    """Rotated halves, say: TensorRT 8.6's builder runs without end where parts that Split or Slice made are joined
    again with only arithmetic in between (benchmarks/trt_forms.py)."""
    made = {name: node for node in graph.nodes for name in node.output}

    def cut(name: str) -> bool:
        node = made.get(name)
        if node is None or node.op_type not in ("Split", "Slice", "Add", "Sub", "Mul"):
            return False
        data = node.input[:1] if node.op_type in ("Split", "Slice") else node.input
        return node.op_type in ("Split", "Slice") or any(map(cut, data))

    joins = [node for node in graph.nodes if node.op_type == "Concat"]
    return [f"{node.name} joins what was cut" for node in joins if any(map(cut, node.input))]


def top_k_is_constant_and_last(graph: Exported) -> list[str]:
    top = [node for node in graph.nodes if node.op_type == "TopK"]
    found = [f"K of {node.name} is computed" for node in top if node.input[1] not in graph.constants]
    return found + [f"axis of {node.name}" for node in top if _attributes(node).get("axis", -1) != -1]


def layer_norms_have_scale_and_bias(graph: Exported) -> list[str]:
    norms = [node for node in graph.nodes if node.op_type == "LayerNormalization"]
    return [f"{n.name}: {n.input} {n.output}" for n in norms if len(n.input) != 3 or len(n.output) != 1]


def half_graphs_have_fp32_islands(graph: Exported) -> list[str]:
    """Norms and softmax; the cube in GELU's tanh form is no norm."""
    types, found = graph.element_types(), []
    for node in (node for node in graph.nodes if node.op_type in FP32_ONLY):
        if node.op_type == "Pow" and node.input[1] in graph.constants and graph.array(node.input[1]).item() == 3.0:
            continue
        wrong = [name for name in node.input if name and types.get(name) != TensorProto.FLOAT]
        found += [f"{node.op_type} {node.name} takes {name}, not fp32" for name in wrong]
    return found


def every_value_has_a_type(graph: Exported) -> list[str]:
    types = graph.element_types()
    return [f"{n.op_type}: {name} has no type" for n in graph.nodes for name in n.output if not types.get(name)]


def constants_are_finite(graph: Exported) -> list[str]:
    """A row of -inf in a mask is NaN after softmax."""
    arrays = {name: graph.array(name) for name in graph.constants}
    return [f"{name} is not finite" for name, array in arrays.items() if not np.isfinite(array).all()]


def inputs_and_outputs_are_the_contract(graph: Exported) -> list[str]:
    """Names, order, shapes with their letters, and types; none of them int64 or bool."""
    inferred, found = _inferred(graph.model).graph, []
    for values, tensors in ((inferred.input, graph.spec.inputs), (inferred.output, graph.spec.outputs)):
        got = [(v.name, _shape(v), ELEMENT.get(v.type.tensor_type.elem_type, "other")) for v in values]
        want = [(t.name, t.shape, str(t.dtype)) for t in tensors]
        found += [f"{a}, not {b}" for a, b in itertools.zip_longest(got, want) if a != b]
    return found


def inputs_and_outputs_are_fp16_fp32_or_int32(graph: Exported) -> list[str]:
    values = [*graph.model.graph.input, *graph.model.graph.output]
    return [
        f"{v.name} is {v.type.tensor_type.elem_type}" for v in values if v.type.tensor_type.elem_type not in ELEMENT
    ]


def reshape_targets_hold_no_zero(graph: Exported) -> list[str]:
    found = []
    for node in (node for node in graph.nodes if node.op_type == "Reshape"):
        found += [f"{node.name} sets allowzero"] if "allowzero" in _attributes(node) else []
        if node.input[1] not in graph.constants:
            found.append(f"{node.name} has a computed target")
        elif 0 in graph.array(node.input[1]):
            found.append(f"{node.name} has a 0 in its target")
    return found


def weights_lie_in_one_file_beside_it(graph: Exported) -> list[str]:
    data = f"{graph.path.name}.data"
    beside = sorted(file.name for file in graph.path.parent.glob(f"{graph.path.name}*"))
    found = [] if beside in ([graph.path.name], [graph.path.name, data]) else [f"files {beside}"]
    found += [f"{name} lies in {said['location']}" for name, said in graph.external.items() if said["location"] != data]
    return found + ([f"{data} is used by nothing"] if data in beside and not graph.external else [])


def weights_are_page_aligned(graph: Exported) -> list[str]:
    return [f"{name} at {said['offset']}" for name, said in graph.external.items() if int(said["offset"]) % PAGE]


def decoder_layers_share_no_weight(graph: Exported) -> list[str]:
    """Each is read once, and no two lie on the same bytes."""
    if graph.spec.name not in DECODERS:
        return []
    uses = Counter(name for node in graph.nodes for name in node.input)
    found = [f"{name} is used {uses[name]} times" for name in graph.external if uses[name] != 1]
    spans = sorted((int(e["offset"]), int(e["offset"]) + int(e["length"]), n) for n, e in graph.external.items())
    found += [f"{b[2]} overlaps {a[2]}" for a, b in itertools.pairwise(spans) if b[0] < a[1]]
    names = Counter(tensor.name for tensor in graph.model.graph.initializer)
    return found + [f"{name} is there {count} times" for name, count in names.items() if count > 1]


def the_checker_passes(graph: Exported) -> list[str]:
    try:
        onnx.checker.check_model(str(graph.path), full_check=True)
        _inferred(graph.model)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        return [str(error)]
    return []


# the forms of the vision graph for engines of their own


def weights_lie_with_those_of_vision(graph: Exported) -> list[str]:
    """A form is small: big weights are those of vision.onnx, in its file."""
    places = {said["location"] for said in graph.external.values()}
    found = [] if places == {"vision.onnx.data"} else [f"weights lie in {sorted(places)}"]
    others = {name for name in graph.constants if name not in graph.external}
    biggest = max((graph.array(name).nbytes for name in others), default=0)
    return found + ([f"{biggest} bytes in the graph file"] if biggest > 2**21 else [])


def contrib_ops_are_those_of_vision_cuda(graph: Exported) -> list[str]:
    """com.microsoft's fused operators, and around them no cast, softmax or convolution is left."""
    imports = {(opset.domain, opset.version) for opset in graph.model.opset_import}
    found = [] if imports == {("", 17), ("com.microsoft", 1)} else [f"opsets {sorted(imports)}"]
    fused = {node.op_type for node in graph.nodes if node.domain}
    found += [
        f"{op} of com.microsoft" for op in sorted(fused ^ {"MultiHeadAttention", "SkipLayerNormalization", "FastGelu"})
    ]
    plain = {node.op_type for node in graph.nodes if not node.domain}
    return found + [f"op {op}" for op in sorted(plain - (ALLOWED - {"Cast", "Conv", "Softmax", "Tanh", "Pow"}))]


def attention_is_what_tensorrt_fuses(graph: Exported) -> list[str]:
    """MatMul, Softmax, MatMul, with nothing in between, and in one precision."""
    maker = {name: node for node in graph.nodes for name in node.output}
    users = {name: node for node in graph.nodes for name in node.input}
    types, found = graph.element_types(), []
    for node in (node for node in graph.nodes if node.op_type == "Softmax"):
        around = maker[node.input[0]].op_type, users[node.output[0]].op_type
        found += [] if around == ("MatMul", "MatMul") else [f"{node.name} is between {around}"]
        if types[node.input[0]] != types[graph.spec.inputs[0].name]:
            found.append(f"{node.name} takes {types[node.input[0]]}")
    return found


Rule = Callable[[Exported], list[str]]
RULES: list[Rule] = [
    opset_17_and_no_other_domain,
    no_functions_or_control_flow,
    only_allowed_ops,
    reductions_have_constant_axes,
    nothing_is_cut_and_joined_by_arithmetic_alone,
    top_k_is_constant_and_last,
    layer_norms_have_scale_and_bias,
    half_graphs_have_fp32_islands,
    every_value_has_a_type,
    constants_are_finite,
    inputs_and_outputs_are_the_contract,
    inputs_and_outputs_are_fp16_fp32_or_int32,
    reshape_targets_hold_no_zero,
    weights_lie_in_one_file_beside_it,
    weights_are_page_aligned,
    decoder_layers_share_no_weight,
    the_checker_passes,
]


OF_ONE_FILE = {weights_lie_in_one_file_beside_it}
FORM_RULES = {
    "vision_cuda": [
        *(
            rule
            for rule in RULES
            if rule
            not in OF_ONE_FILE
            | {opset_17_and_no_other_domain, only_allowed_ops, half_graphs_have_fp32_islands, every_value_has_a_type}
        ),
        weights_lie_with_those_of_vision,
        contrib_ops_are_those_of_vision_cuda,
    ],
    "vision_trt": [
        *(rule for rule in RULES if rule not in OF_ONE_FILE | {half_graphs_have_fp32_islands}),
        weights_lie_with_those_of_vision,
        attention_is_what_tensorrt_fuses,
    ],
}


def rule_name(rule: Rule) -> str:
    return rule.__name__


# every exported graph


@pytest.fixture(scope="module", params=GRAPHS, ids=lambda pair: f"{pair[0]}-{pair[1]}")
def exported(request: pytest.FixtureRequest) -> Exported:
    folder, name = request.getfixturevalue(request.param[0]), request.param[1]
    bundle = open_bundle(folder)
    spec = {graph.name: graph for graph in contract.graphs(bundle.model, bundle.manifest.merge_ratios)}[name]
    path = bundle.graph_path(name)
    return Exported(path, onnx.load(path, load_external_data=False), spec)


@pytest.mark.parametrize("rule", RULES, ids=rule_name)
def test_graphs_keep_the_rule(exported: Exported, rule: Rule) -> None:
    assert rule(exported) == []


def form(folder: Path, name: str) -> Exported:
    path = folder / "onnx" / f"{name}.onnx"
    return Exported(path, onnx.load(path, load_external_data=False), contract.vision(open_bundle(folder).model))


FORM_CASES = [(bundle, name, rule) for bundle in BUNDLES for name in FORMS for rule in FORM_RULES[name]]


@pytest.mark.parametrize(("bundle", "name", "rule"), FORM_CASES)
def test_forms_of_vision_keep_the_rule(request: pytest.FixtureRequest, bundle: str, name: str, rule: Rule) -> None:
    assert rule(form(request.getfixturevalue(bundle), name)) == []


def test_a_form_may_not_be_the_traced_graph_or_the_other(tiny_bundle: Path) -> None:
    """The rules of their own can fail."""
    traced, cuda, trt = (form(tiny_bundle, name) for name in ("vision", *FORMS))
    assert attention_is_what_tensorrt_fuses(traced) and contrib_ops_are_those_of_vision_cuda(traced)
    assert contrib_ops_are_those_of_vision_cuda(trt) and opset_17_and_no_other_domain(cuda)
    for tensor in trt.model.graph.initializer:
        for entry in tensor.external_data:
            entry.value = "vision_trt.onnx.data" if entry.key == "location" else entry.value
    assert weights_lie_with_those_of_vision(trt)


@pytest.mark.parametrize("name", BUNDLES)
def test_these_are_all_graphs_of_a_bundle(request: pytest.FixtureRequest, name: str) -> None:
    files = request.getfixturevalue(name).joinpath("onnx").glob("*.onnx")
    assert {file.stem for file in files} == {*BUNDLES[name], *FORMS}
    assert set(contract.FORMS.values()) == set(FORMS)


def test_no_op_is_allowed_that_no_graph_needs(request: pytest.FixtureRequest) -> None:
    used = set()
    for bundle, name in GRAPHS:
        path = request.getfixturevalue(bundle) / "onnx" / f"{name}.onnx"
        used |= {node.op_type for node in onnx.load(path, load_external_data=False).graph.node}
    assert used == ALLOWED


def test_a_decoder_names_weights_of_each_of_its_layers(exported: Exported) -> None:
    """What `decoder_layers_share_no_weight` looks at is really there."""
    if exported.spec.name in DECODERS:
        layers = Counter(match[1] for name in exported.external if (match := re.match(r"layers\.(\d+)\.", name)))
        assert set(layers) == {tensor.name[2:] for tensor in exported.spec.inputs if tensor.name.startswith("k_")}
        assert set(layers.values()) == {7}  # two norms, qkv with its bias, o, gate_up, down


def test_ratios_0_and_1_have_no_merge_graph(tiny_bundle: Path) -> None:
    bundle = open_bundle(tiny_bundle)
    names = [graph.name for graph in contract.graphs(bundle.model, (0.0, 0.5, 1.0))]
    assert names == ["vision", "merge_050", *DECODERS]
    for ratio in (0.0, 1.0):
        assert not contract.needs_merge_graph(bundle.model, ratio)
        assert bundle.merge_graph(ratio) is None


# they run


SIZES = {"S": [1, 5, 130], "T": [1, 2, 33], "F": [1, 3], "B": [1, 2]}


def letters(spec: Graph) -> list[str]:
    found = {dim for tensor in spec.inputs for dim in tensor.shape if isinstance(dim, str)}
    return [letter for letter in SIZES if letter in found]


def sized(tensor: Tensor, sizes: dict[str, int]) -> tuple[int, ...]:
    return tuple(d if isinstance(d, int) else sum(sizes[letter] for letter in d.split("+")) for d in tensor.shape)


def random_input(tensor: Tensor, sizes: dict[str, int]) -> Array:
    shape = sized(tensor, sizes)
    if tensor.name == "mask":
        return np.triu(np.full(shape, contract.MASKED, np.float32), 1 + sizes["S"])
    return np.random.default_rng(0).standard_normal(shape).astype(contract.NUMPY[tensor.dtype])


def test_graphs_run_at_every_size_and_give_finite_values(exported: Exported) -> None:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(exported.path), options, providers=["CPUExecutionProvider"])
    names = letters(exported.spec)
    for numbers in itertools.product(*(SIZES[name] for name in names)):
        sizes = dict(zip(names, numbers, strict=True))
        outputs = session.run(None, {t.name: random_input(t, sizes) for t in exported.spec.inputs})
        for tensor, array in zip(exported.spec.outputs, outputs, strict=True):
            assert (tensor.name, array.shape) == (tensor.name, sized(tensor, sizes))
            assert array.dtype == contract.NUMPY[tensor.dtype] and np.isfinite(array).all(), (tensor.name, sizes)
            if tensor.name == "attention":
                np.testing.assert_allclose(array.sum(-1), 1, rtol=1e-5)


# the rules can fail


def base(tmp_path: Path) -> Exported:
    """A graph that keeps all rules, named like a decoder: x [T, 4] fp32 -> y [T, 4] fp32."""
    path = tmp_path / "decoder_deep.onnx"
    spec = Graph("decoder_deep", (Tensor("x", ("T", 4), "fp32"),), (Tensor("y", ("T", 4), "fp32"),))
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ("T", 4))
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ("T", 4))
    weights = [external(f"layers.{i}.weight", offset=i * PAGE, location="decoder_deep.onnx.data") for i in range(2)]
    nodes = [
        helper.make_node("Add", ["x", "layers.0.weight"], ["a"], name="a"),
        helper.make_node("Add", ["a", "layers.1.weight"], ["y"], name="y"),
    ]
    model = helper.make_model(helper.make_graph(nodes, "bad", [x], [y], weights), ir_version=8)
    model.opset_import[0].version = 17
    (tmp_path / "decoder_deep.onnx.data").write_bytes(bytes(2 * PAGE))
    return Exported(path, model, spec)


def external(name: str, offset: int, location: str) -> TensorProto:
    tensor = TensorProto(name=name, data_location=TensorProto.EXTERNAL, dims=(4,), data_type=TensorProto.FLOAT)
    for key, value in {"location": location, "offset": str(offset), "length": "16"}.items():
        tensor.external_data.add(key=key, value=value)
    return tensor


def add(graph: Exported, op: str, *inputs: str, out: str = "z", **attributes: Any) -> None:
    """A node beside the good ones."""
    graph.model.graph.node.append(helper.make_node(op, list(inputs), [out], name=out, **attributes))


def constant(graph: Exported, name: str, values: Any, dtype: type[np.generic]) -> str:
    graph.model.graph.initializer.append(numpy_helper.from_array(np.array(values, dtype), name))
    return name


def output(graph: Exported, name: str, element: int) -> None:
    graph.model.graph.output.append(helper.make_tensor_value_info(name, element, None))


def other_opset(graph: Exported) -> None:
    graph.model.opset_import[0].version = 18


def other_ir(graph: Exported) -> None:
    graph.model.ir_version = 9


def other_domain(graph: Exported) -> None:
    add(graph, "Gelu", "x", domain="com.microsoft")


def function(graph: Exported) -> None:
    body = [helper.make_node("Identity", ["p"], ["q"])]
    graph.model.functions.append(helper.make_function("own", "F", ["p"], ["q"], body, [helper.make_opsetid("", 17)]))


def branch(graph: Exported) -> None:
    value = helper.make_tensor_value_info("b", TensorProto.FLOAT, None)
    body = helper.make_graph([helper.make_node("Identity", ["x"], ["b"])], "body", [], [value])
    add(graph, "If", constant(graph, "yes", True, np.bool_), then_branch=body, else_branch=body)


def sequence(graph: Exported) -> None:
    add(graph, "SequenceConstruct", "x")


def banned(op: str, **attributes: Any) -> Callable[[Exported], None]:
    def change(graph: Exported) -> None:
        add(graph, op, "x", **attributes)

    return change


def mean_with_two_inputs(graph: Exported) -> None:
    add(graph, "ReduceMean", "x", constant(graph, "axes", [-1], np.int64))


def max_with_two_inputs(graph: Exported) -> None:
    add(graph, "ReduceMax", "x", constant(graph, "axes", [-1], np.int64), axes=[-1])


def mean_over_all(graph: Exported) -> None:
    add(graph, "ReduceMean", "x")


def sum_over_computed_axes(graph: Exported) -> None:
    add(graph, "Shape", "x", out="axes")
    add(graph, "ReduceSum", "x", "axes")


def computed_k(graph: Exported) -> None:
    add(graph, "Shape", "x", start=0, end=1, out="k")
    graph.model.graph.node.append(helper.make_node("TopK", ["x", "k"], ["values", "indices"]))


def k_of_the_first_axis(graph: Exported) -> None:
    k = constant(graph, "k", [1], np.int64)
    graph.model.graph.node.append(helper.make_node("TopK", ["x", k], ["values", "indices"], axis=0))


def norm_without_bias(graph: Exported) -> None:
    add(graph, "LayerNormalization", "x", constant(graph, "scale", np.ones(4), np.float32))


def in_half(op: str, *more: tuple[str, Any], **attributes: Any) -> Callable[[Exported], None]:
    def change(graph: Exported) -> None:
        add(graph, "Cast", "x", out="half", to=TensorProto.FLOAT16)
        inputs = [constant(graph, name, values, np.float16) for name, values in more]
        add(graph, op, "half", *inputs, **attributes)

    return change


def infinite_constant(graph: Exported) -> None:
    constant(graph, "mask", [0.0, -np.inf], np.float32)


def infinite_constant_node(graph: Exported) -> None:
    value = numpy_helper.from_array(np.array([-np.inf], np.float32))
    graph.model.graph.node.append(helper.make_node("Constant", [], ["mask"], value=value))


def infinite_weight(graph: Exported) -> None:
    data = graph.path.with_name("decoder_deep.onnx.data")
    data.write_bytes(np.full(2 * PAGE // 4, np.inf, np.float32).tobytes())


def renamed_input(graph: Exported) -> None:
    graph.model.graph.input[0].name = graph.model.graph.node[0].input[0] = "embeds"


def other_letter(graph: Exported) -> None:
    graph.model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "N"


def another_output(graph: Exported) -> None:
    add(graph, "Identity", "x")
    output(graph, "z", TensorProto.FLOAT)


def rotated_halves(graph: Exported) -> None:
    add(graph, "Slice", "x", *(constant(graph, f"at_{i}", [i], np.int64) for i in (0, 2, 1)), out="half")
    add(graph, "Mul", "half", "half", out="scaled")
    add(graph, "Concat", "scaled", "half", axis=1)


def int64_output(graph: Exported) -> None:
    add(graph, "Shape", "x")
    output(graph, "z", TensorProto.INT64)


def bool_output(graph: Exported) -> None:
    add(graph, "Greater", "x", "layers.0.weight")
    output(graph, "z", TensorProto.BOOL)


def untyped_value(graph: Exported) -> None:
    add(graph, "NoSuchOp", "x", domain="unknown")
    graph.model.opset_import.append(helper.make_opsetid("unknown", 1))


def reshape_with(values: list[int], **attributes: Any) -> Callable[[Exported], None]:
    def change(graph: Exported) -> None:
        add(graph, "Reshape", "x", constant(graph, "target", values, np.int64), **attributes)

    return change


def computed_reshape(graph: Exported) -> None:
    add(graph, "Shape", "x", out="target")
    add(graph, "Reshape", "x", "target")


def two_data_files(graph: Exported) -> None:
    graph.path.with_name("decoder_deep.onnx.data2").write_bytes(b"")


def relocated(location: str) -> Callable[[Exported], None]:
    def change(graph: Exported) -> None:
        graph.model.graph.initializer[0].CopyFrom(external("layers.0.weight", 0, location))

    return change


def unused_data(graph: Exported) -> None:
    del graph.model.graph.initializer[:]


def moved_weight(offset: int) -> Callable[[Exported], None]:
    def change(graph: Exported) -> None:
        moved = external("layers.1.weight", offset, "decoder_deep.onnx.data")
        graph.model.graph.initializer[1].CopyFrom(moved)

    return change


def weight_used_twice(graph: Exported) -> None:
    graph.model.graph.node[1].input[1] = "layers.0.weight"


def wrong_type(graph: Exported) -> None:
    add(graph, "MatMul", "x", constant(graph, "int", np.ones((4, 4)), np.int32))


def wrong_shape(graph: Exported) -> None:
    add(graph, "MatMul", "x", constant(graph, "wide", np.ones((5, 5)), np.float32))


def missing_input(graph: Exported) -> None:
    graph.model.graph.input.pop()


Change = Callable[[Exported], None]
BAD: dict[Rule, list[Change]] = {
    opset_17_and_no_other_domain: [other_opset, other_ir, other_domain],
    no_functions_or_control_flow: [function, branch, sequence],
    only_allowed_ops: [
        *(banned(op) for op in ("Gelu", "Attention", "RMSNormalization", "RotaryEmbedding", "TensorScatter", "Swish")),
        *(banned(op) for op in ("NonZero", "Unique", "Compress", "CumSum", "CastLike", "Trilu", "Loop", "Scan")),
        *(banned(op) for op in ("BitShift", "DynamicQuantizeLinear", "MatMulInteger", "Resize", "Where")),
        banned("Einsum", equation="ij->ji"),
    ],
    reductions_have_constant_axes: [mean_with_two_inputs, max_with_two_inputs, mean_over_all, sum_over_computed_axes],
    nothing_is_cut_and_joined_by_arithmetic_alone: [rotated_halves],
    top_k_is_constant_and_last: [computed_k, k_of_the_first_axis],
    layer_norms_have_scale_and_bias: [norm_without_bias],
    half_graphs_have_fp32_islands: [
        in_half("Softmax"),
        in_half("ReduceMean", axes=[-1]),
        in_half("Pow", ("two", 2.0)),
        in_half("LayerNormalization", ("scale", [1.0] * 4), ("bias", [0.0] * 4)),
    ],
    every_value_has_a_type: [untyped_value],
    constants_are_finite: [infinite_constant, infinite_constant_node, infinite_weight],
    inputs_and_outputs_are_the_contract: [renamed_input, other_letter, another_output, int64_output],
    inputs_and_outputs_are_fp16_fp32_or_int32: [int64_output, bool_output],
    reshape_targets_hold_no_zero: [reshape_with([0, 4]), reshape_with([-1, 2], allowzero=1), computed_reshape],
    weights_lie_in_one_file_beside_it: [
        two_data_files,
        relocated("/weights.data"),
        relocated("../decoder_deep.onnx.data"),
        relocated("other.data"),
        unused_data,
    ],
    weights_are_page_aligned: [moved_weight(64)],
    decoder_layers_share_no_weight: [moved_weight(0), moved_weight(8), weight_used_twice],
    the_checker_passes: [wrong_type, wrong_shape, missing_input],
}


BAD_CASES = [
    pytest.param(rule, change, id=f"{rule.__name__}-{change.__name__}-{number}")
    for rule, changes in BAD.items()
    for number, change in enumerate(changes)
]


@pytest.mark.parametrize(("rule", "change"), BAD_CASES)
def test_the_rule_complains_of_a_bad_graph(tmp_path: Path, rule: Rule, change: Change) -> None:
    graph = base(tmp_path)
    change(graph)
    graph.path.write_bytes(graph.model.SerializeToString())
    assert rule(graph)


@pytest.mark.parametrize("rule", RULES, ids=rule_name)
def test_no_rule_complains_of_a_good_graph(tmp_path: Path, rule: Rule) -> None:
    graph = base(tmp_path)
    in_half("Pow", ("three", 3.0))(graph)  # GELU's cube may stay in fp16
    graph.path.write_bytes(graph.model.SerializeToString())
    assert rule(graph) == []


def test_every_rule_has_a_bad_graph() -> None:
    assert set(BAD) == set(RULES)
