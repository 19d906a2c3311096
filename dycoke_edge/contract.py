"""The tensors of every graph: one table, written by export, bound by the runtime, checked by tests.

Letters: F frames, N visual tokens a frame, m tokens a compared frame keeps, B compared frames, T new tokens in a call,
S live KV rows (at least one: an empty cache is one masked row), H query heads, G KV heads, D head dim, E hidden size,
R image side in pixels, V vocabulary, L the layer where the decoder is cut. Model tensors have the bundle's dtype;
masks, attention and logits are always fp32.

| graph           | inputs                                                        | outputs                          |
|-----------------|---------------------------------------------------------------|----------------------------------|
| vision          | pixels [F,3,R,R]                                              | tokens [F,N,E]                   |
| merge_070       | reference [B,N,E], frame [B,N,E]                              | kept [B,m,E], index [B,m] int32  |
| decoder_shallow | embeds [T,E], cos/sin [T,D/2], mask [T,S+T], k_i/v_i [S,G,D]  | hidden [T,E], attention [T,S+T], |
|                 | for i < L                                                     | new_k_i/new_v_i [T,G,D]          |
| decoder_deep    | hidden [T,E], cos/sin, mask, k_i/v_i [S,G,D] for i >= L       | logits [1,V], new_k_i/new_v_i    |
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveInt

from dycoke_edge.config import DType, Provider
from dycoke_edge.dycoke import kept_per_frame

OPSET = 17  # what TensorRT 8.6 to 11 and every ONNX Runtime read alike
IR_VERSION = 8  # the IR that opset 17 came with
MASKED = -3e4  # finite: a row of -inf is NaN in softmax, and fp16 cannot hold much less
Element = Literal["fp32", "fp16", "int32"]
NUMPY: dict[Element, type[np.generic]] = {"fp32": np.float32, "fp16": np.float16, "int32": np.int32}


class ModelSpec(BaseModel):
    """The dimensions of an exported model."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dtype: DType
    image_size: int
    tokens_per_frame: int
    hidden_size: int
    num_layers: int
    num_heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    rope_theta: float
    max_positions: int
    split_layer: int

    @property
    def numpy_dtype(self) -> type[np.generic]:
        """The element type of model tensors."""
        return NUMPY[self.dtype]

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes that one token holds in the KV buffer, all layers, K and V."""
        element = np.dtype(self.numpy_dtype).itemsize
        return 2 * self.num_layers * self.kv_heads * self.head_dim * element


class Placed(BaseModel):
    """Where a weight lies: bytes of the bundle's dtype in C order, in a file beside the graphs."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    file: str
    offset: NonNegativeInt
    shape: tuple[NonNegativeInt, ...]


class WeightTable(BaseModel):
    """`decoder_weights.json`: the decoder's weights for an engine that brings kernels of its own. Matrices are
    [in, out], as the graphs have them; q's factor 1/sqrt(D) is in `qkv`.

    layers.<i>.input_layernorm.weight [E], self_attn.qkv.weight [E, (H+2G) D] and .bias, self_attn.o_proj.weight
    [H D, E], post_attention_layernorm.weight [E], mlp.gate_up.weight [E, 2I], mlp.down_proj.weight [I, E]; norm.weight
    [E], lm_head [E, V].
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    rms_eps: float
    tied: bool  # lm_head is the embedding table
    weights: dict[str, Placed]


class VisionTable(BaseModel):
    """`vision_weights.json`: the vision encoder for an engine that brings kernels of its own: SigLIP's tower of width E
    up to the layer whose output is used, LLaVA-OneVision's projector to the decoder's width W.

    patch.weight [E, 3 P P] by colour, row and column; patch.offset [side^2, E], positions and the kernel's bias;
    layers.<i>.norm1.weight [E] and .bias, q, k, v and out.weight [E, E] and .bias [E], norm2.weight and .bias,
    fc1.weight [E, mlp] and .bias, fc2.weight [mlp, E] and .bias; projector.1.weight [E, W] and .bias,
    projector.2.weight [W, W] and .bias. Matrices but the first are [in, out].
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    heads: PositiveInt
    head_dim: PositiveInt
    width: PositiveInt
    mlp: PositiveInt
    layers: NonNegativeInt
    patch: PositiveInt
    side: PositiveInt  # patches along an edge of a frame
    epsilon: float  # of layer norms
    projector_act: Literal["gelu", "gelu_pytorch_tanh"]
    weights: dict[str, Placed]


def vision_shapes(table: VisionTable, spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """The weights that a table must place, and their shapes."""
    wide, deep, narrow, inner = table.width, table.mlp, spec.hidden_size, table.heads * table.head_dim
    matrices = {"q": (wide, inner), "k": (wide, inner), "v": (wide, inner), "out": (inner, wide)}
    matrices |= {"fc1": (wide, deep), "fc2": (deep, wide)}
    shapes: dict[str, tuple[int, ...]] = {"patch.weight": (wide, 3 * table.patch**2)}
    shapes["patch.offset"] = ((spec.image_size // table.patch) ** 2, wide)
    for layer in range(table.layers):
        for name, shape in matrices.items():
            shapes |= {f"layers.{layer}.{name}.weight": shape, f"layers.{layer}.{name}.bias": shape[1:]}
        for name in ("norm1", "norm2"):
            shapes |= {f"layers.{layer}.{name}.{part}": (wide,) for part in ("weight", "bias")}
    for name, shape in (("projector.1", (wide, narrow)), ("projector.2", (narrow, narrow))):
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[1:]}
    return shapes


@dataclass(frozen=True)
class Tensor:
    """One input or output: a name, a shape of numbers and letters, an element type."""

    name: str
    shape: tuple[int | str, ...]
    dtype: Element


@dataclass(frozen=True)
class Graph:
    """One graph: its file is `onnx/<name>.onnx`, its weights `onnx/<name>.onnx.data`."""

    name: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]


# Graphs that an engine runs fast in a form of its own: the same contract, and the same weights in vision.onnx.data
FORMS: dict[tuple[str, Provider], str] = {("vision", "cuda"): "vision_cuda", ("vision", "tensorrt"): "vision_trt"}


def merge_name(merge_ratio: float) -> str:
    """The graph of a merge ratio: 0.7 -> merge_070."""
    return f"merge_{round(merge_ratio * 100):03d}"


def vision(spec: ModelSpec) -> Graph:
    """Tower, projector and 2x2 pooling."""
    pixels = Tensor("pixels", ("F", 3, spec.image_size, spec.image_size), spec.dtype)
    tokens = Tensor("tokens", ("F", spec.tokens_per_frame, spec.hidden_size), spec.dtype)
    return Graph("vision", (pixels,), (tokens,))


def merge(spec: ModelSpec, merge_ratio: float) -> Graph:
    """Stage 1 for frames and their anchors; `kept` and `index` are in raster order."""
    n, e, m = spec.tokens_per_frame, spec.hidden_size, kept_per_frame(spec.tokens_per_frame, merge_ratio)
    inputs = tuple(Tensor(name, ("B", n, e), spec.dtype) for name in ("reference", "frame"))
    outputs = (Tensor("kept", ("B", m, e), spec.dtype), Tensor("index", ("B", m), "int32"))
    return Graph(merge_name(merge_ratio), inputs, outputs)


def decoder_shallow(spec: ModelSpec) -> Graph:
    """Layers below L; also hands out layer L-1's attention, averaged over heads."""
    layers = range(spec.split_layer)
    attention = Tensor("attention", ("T", "S+T"), "fp32")
    hidden = Tensor("hidden", ("T", spec.hidden_size), spec.dtype)
    return Graph(
        "decoder_shallow",
        _decoder_inputs(spec, "embeds", layers),
        (hidden, attention, *_new_rows(spec, layers)),
    )


def decoder_deep(spec: ModelSpec) -> Graph:
    """Layers from L on, the last norm and the language-model head, for the last of the T tokens."""
    layers = range(spec.split_layer, spec.num_layers)
    logits = Tensor("logits", (1, spec.vocab_size), "fp32")
    return Graph("decoder_deep", _decoder_inputs(spec, "hidden", layers), (logits, *_new_rows(spec, layers)))


def graphs(spec: ModelSpec, merge_ratios: tuple[float, ...]) -> list[Graph]:
    """Every graph of a bundle. A ratio that keeps nothing or all of a frame needs none."""
    merges = [merge(spec, ratio) for ratio in merge_ratios if needs_merge_graph(spec, ratio)]
    return [vision(spec), *merges, decoder_shallow(spec), decoder_deep(spec)]


def needs_merge_graph(spec: ModelSpec, merge_ratio: float) -> bool:
    """False where merge keeps no token of a compared frame (ratio 1), or all of them (ratio 0)."""
    return 0 < kept_per_frame(spec.tokens_per_frame, merge_ratio) < spec.tokens_per_frame


def _decoder_inputs(spec: ModelSpec, first: str, layers: range) -> tuple[Tensor, ...]:
    half = ("T", spec.head_dim // 2)
    cached = ("S", spec.kv_heads, spec.head_dim)
    return (
        Tensor(first, ("T", spec.hidden_size), spec.dtype),
        Tensor("cos", half, spec.dtype),
        Tensor("sin", half, spec.dtype),
        Tensor("mask", ("T", "S+T"), "fp32"),
        *(Tensor(f"{kv}_{i}", cached, spec.dtype) for i in layers for kv in "kv"),
    )


def _new_rows(spec: ModelSpec, layers: range) -> tuple[Tensor, ...]:
    shape = ("T", spec.kv_heads, spec.head_dim)
    return tuple(Tensor(f"new_{kv}_{i}", shape, spec.dtype) for i in layers for kv in "kv")
