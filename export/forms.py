"""The vision graph in the forms that two engines run fast: the same contract, the same weights in vision.onnx.data.

Both are rewritten from the traced vision.onnx, pattern by pattern; a graph with another number of any pattern than it
has layers is an error.

vision_cuda.onnx, for ONNX Runtime's CUDA kernels, uses its contrib operators. What they save, a layer, in passes over
memory (the traced form takes 2.0 times as long as torch's SDPA):
- MultiHeadAttention: flash attention for fp16 (head sizes to 256, multiples of 8), no scores in memory, no transposes.
  A bias on K adds the same to all scores of a row, which softmax takes out again, so there is none; one on V passes
  through softmax, whose rows add up to 1, so it is in the output projection's bias. Only Q's is added by a kernel.
- SkipLayerNormalization: bias, residual and norm in one pass, norms summed in fp32 but read and written in fp16.
- FastGelu: bias and tanh-GELU, eight operators when traced, in one pass.
- The patch embedding is a MatMul: stride and kernel are the same, so nothing overlaps. Without a convolution there is
  no search for an algorithm at every new number of frames.

vision_trt.onnx, for TensorRT: attention as MatMul, Softmax, MatMul in one precision, which is what its builder fuses;
with casts or a scale in between it does not. The scale is on Q. Norms stay fp32 between casts, which a strongly typed
network needs to sum in fp32, and which the builder fuses.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from onnx import NodeProto, TensorProto

from dycoke_edge.contract import OPSET
from dycoke_edge.export.traced import Traced

MICROSOFT = "com.microsoft"
SPLIT, TURNED = [0, 2, 1, 3], [0, 2, 3, 1]  # [F, S, H, D] to [F, H, S, D], and to [F, H, D, S]


@dataclass(frozen=True)
class Attention:
    """One attention of the traced graph: its values [F, S, H * D] before and after."""

    queries: str
    keys: str
    values: str
    product: str  # scores before the scale
    probabilities: str  # as the second product takes them
    output: str
    split: NodeProto  # the Reshape of queries
    heads: int
    scale: float


def write_cuda(vision: Path, path: Path, layers: int) -> None:
    """vision.onnx -> the form for ONNX Runtime's CUDA kernels."""
    graph = Traced(vision)
    for attention in attentions(graph, layers):
        _fuse_attention(graph, attention)
    norms = [_narrow_norm(graph, node) for node in graph.all("LayerNormalization")]
    fused = sum(_fuse_skip(graph, norm) for norm in norms)
    if (len(norms), fused) != (2 * layers, 2 * layers - 1):
        raise graph.unknown(f"{len(norms)} norms, {fused} of them after a residual, in {layers} layers")
    gelus = [_fuse_gelu(graph, node) for node in graph.all("Tanh")[:layers]]  # the projector may have one more
    if len(gelus) != layers:
        raise graph.unknown(f"{len(gelus)} GELUs in {layers} layers")
    _patches_by_matmul(graph)
    graph.save(path, {"": OPSET, MICROSOFT: 1})


def write_tensorrt(vision: Path, path: Path, layers: int) -> None:
    """vision.onnx -> the form that TensorRT fuses."""
    graph = Traced(vision)
    for attention in attentions(graph, layers):
        dtype = graph.array(graph.linear(attention.queries)[1]).dtype
        scale = graph.constant(f"{attention.queries}.scale", np.array(attention.scale, dtype))
        scaled = graph.make("Mul", [attention.queries, scale], [f"{attention.queries}.scaled"])
        attention.split.input[0] = scaled
        graph.make("Softmax", [attention.product], [attention.probabilities], axis=-1)
    graph.save(path, {"": OPSET})


def attentions(graph: Traced, layers: int) -> list[Attention]:
    """Every attention, in order; BundleError unless there are `layers`."""
    found = [_attention(graph, node) for node in graph.all("Softmax")]
    if len(found) != layers:
        raise graph.unknown(f"{len(found)} attentions in {layers} layers")
    return found


def _attention(graph: Traced, softmax: NodeProto) -> Attention:
    scores, probabilities = softmax.input[0], softmax.output[0]
    if graph.maker[scores].op_type == "Cast":
        scores = graph.up(scores, "Cast", to=TensorProto.FLOAT).input[0]
        probabilities = graph.down(probabilities, "Cast", to=TensorProto.FLOAT16).output[0]
    product, scale = graph.halves(graph.up(scores, "Mul"))
    pair, weighted = graph.up(product, "MatMul"), graph.down(probabilities, "MatMul")
    queries, keys = _split(graph, pair.input[0], SPLIT), _split(graph, pair.input[1], TURNED)
    values = _split(graph, weighted.input[1], SPLIT)
    back = graph.down(weighted.output[0], "Transpose", perm=SPLIT)
    heads, size = graph.array(queries.input[1])[-2:].tolist()
    if not math.isclose(graph.scalar(scale), size**-0.5, rel_tol=1e-3):
        raise graph.unknown(f"{scale} is {graph.scalar(scale)}, not 1/sqrt({size})")
    return Attention(
        queries=queries.input[0],
        keys=keys.input[0],
        values=values.input[0],
        product=product,
        probabilities=probabilities,
        output=graph.down(back.output[0], "Reshape").output[0],
        split=queries,
        heads=heads,
        scale=size**-0.5,
    )


def _split(graph: Traced, value: str, perm: list[int]) -> NodeProto:
    """The Reshape that splits [F, S, H * D] into heads."""
    return graph.up(graph.up(value, "Transpose", perm=perm).input[0], "Reshape")


def _fuse_attention(graph: Traced, attention: Attention) -> None:
    (keys, _), (values, value_bias) = graph.linear(attention.keys), graph.linear(attention.values)
    into = graph.down(attention.output, "MatMul")
    projected = graph.down(into.output[0], "Add")
    _, bias = graph.halves(projected)
    summed, weight = graph.array(bias), graph.array(into.input[1])
    folded = summed.astype(np.float64) + graph.array(value_bias).astype(np.float64) @ weight.astype(np.float64)
    total = graph.constant(f"{projected.output[0]}.bias", folded.astype(summed.dtype))
    graph.make("Add", [into.output[0], total], [projected.output[0]])
    graph.make(
        "MultiHeadAttention",
        [attention.queries, keys, values],
        [attention.output],
        MICROSOFT,
        num_heads=attention.heads,
        scale=attention.scale,
    )


def _narrow_norm(graph: Traced, norm: NodeProto) -> NodeProto:
    """A norm without casts around it: the operator sums in fp32 whatever it reads. Its weights were fp16 once."""
    source, scale, bias = norm.input
    if graph.maker[source].op_type != "Cast":
        return norm
    source = graph.up(source, "Cast", to=TensorProto.FLOAT).input[0]
    output = graph.down(norm.output[0], "Cast", to=TensorProto.FLOAT16).output[0]
    weights = [graph.constant(f"{output}.{i}", graph.array(w).astype(np.float16)) for i, w in enumerate((scale, bias))]
    graph.make("LayerNormalization", [source, *weights], [output], axis=-1, epsilon=_epsilon(norm), stash_type=1)
    return graph.maker[output]


def _fuse_skip(graph: Traced, norm: NodeProto) -> bool:
    """Norm of a residual plus a linear layer: one operator, which also gives the sum. False for any other norm."""
    source, scale, bias = norm.input
    total = graph.up(source, "Add")
    if any(value in graph.constants for value in total.input):
        return False  # the first norm: of patches plus positions
    residual, branch = total.input
    product, branch_bias = graph.linear(branch)
    inputs, outputs = [product, residual, scale, bias, branch_bias], [norm.output[0], "", "", source]
    graph.make("SkipLayerNormalization", inputs, outputs, MICROSOFT, epsilon=_epsilon(norm))
    return True


def _epsilon(norm: NodeProto) -> float:
    return float(next(attribute.f for attribute in norm.attribute if attribute.name == "epsilon"))


def _fuse_gelu(graph: Traced, tanh: NodeProto) -> str:
    """0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))) of a linear layer."""
    inner, root = graph.halves(graph.up(tanh.input[0], "Mul"))
    source, cubed = graph.up(inner, "Add").input
    cube, factor = graph.halves(graph.up(cubed, "Mul"))
    power = graph.up(cube, "Pow")
    plus = graph.down(tanh.output[0], "Add")
    half = graph.down(plus.output[0], "Mul")
    last = graph.down(half.output[0], "Mul")
    constants = (root, factor, power.input[1], graph.halves(plus)[1], graph.halves(half)[1])
    numbers = [graph.scalar(name) for name in constants]
    if not np.allclose(numbers, [math.sqrt(2 / math.pi), 0.044715, 3, 1, 0.5], rtol=1e-3):
        raise graph.unknown(f"{tanh.name} is not in a tanh-GELU: {numbers}")
    if power.input[0] != source or source not in last.input:
        raise graph.unknown(f"{tanh.name} is not in a tanh-GELU")
    return graph.make("FastGelu", list(graph.linear(source)), [last.output[0]], MICROSOFT)


def _patches_by_matmul(graph: Traced) -> None:
    """Patches [F, S * S, 3 * P * P] times the kernel, plus its bias and the positions in one constant."""
    (conv,) = graph.all("Conv") or (None,)
    if conv is None:
        raise graph.unknown("it has no convolution")
    pixels, weight, *bias = conv.input  # the exporter leaves a bias of zeros out
    kernel = graph.array(weight)
    width, colours, size, _ = kernel.shape
    graph.up(conv.output[0], "Conv", strides=[size, size], pads=[0] * 4, dilations=[1, 1], group=1)
    rows = graph.down(graph.down(conv.output[0], "Reshape").output[0], "Transpose", perm=[0, 2, 1])
    added = graph.down(rows.output[0], "Add")
    positions = graph.array(graph.halves(added)[1])
    side = math.isqrt(positions.shape[1])
    name = conv.output[0]

    def ints(part: str, *values: int) -> str:
        return graph.constant(f"{name}.{part}", np.array(values, np.int64))

    zeros, ends, axes = ints("zeros", 0, 0), ints("ends", side * size, side * size), ints("axes", 2, 3)
    cells, flat = ints("cells", -1, colours, side, size, side, size), ints("flat", -1, side * side, colours * size**2)
    matrix = graph.constant(f"{name}.matrix", kernel.reshape(width, -1).T)
    offset = (positions.astype(np.float64) + (graph.array(bias[0]) if bias else 0)).astype(kernel.dtype)
    value = graph.make("Slice", [pixels, zeros, ends, axes], [f"{name}.whole"])
    value = graph.make("Reshape", [value, cells], [f"{name}.split"])
    value = graph.make("Transpose", [value], [f"{name}.turned"], perm=[0, 2, 4, 1, 3, 5])
    value = graph.make("Reshape", [value, flat], [f"{name}.patches"])
    value = graph.make("MatMul", [value, matrix], [f"{name}.embedded"])
    graph.make("Add", [value, graph.constant(f"{name}.offset", offset)], [added.output[0]])
