"""The two decoder graphs (Qwen2), written node by node while weights stream from the checkpoint to disk.

Attention is written out so that one graph serves prefill and decode, binds K and V in place and hands out
probabilities: scores over cached K and over new K, one concat of scores, softmax in fp32, two matmuls with V. RoPE is
applied before rows are stored. In fp16 bundles norms, softmax and logits are fp32 islands (Hugging Face's Qwen2
computes norms and softmax in fp32 too). The query weights carry the factor 1/sqrt(D).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dycoke_edge import contract
from dycoke_edge.contract import ModelSpec, Placed
from dycoke_edge.export.graph import ONNX_TYPE, GraphWriter

Array = NDArray[Any]
ReadTensor = Callable[[str], Array]  # canonical name -> array in the bundle's dtype


@dataclass
class _Shared:
    """Values that every layer of a graph uses."""

    cos: str  # [T, 1, 1, D/2]
    sin: str
    mask: str  # [R*T, S+T]: the mask once per query head of a group
    cached: str  # [1] int64: S


class DecoderWriter:
    """Writes layers of one decoder graph."""

    def __init__(self, writer: GraphWriter, spec: ModelSpec, read: ReadTensor, rms_eps: float) -> None:
        self.w = writer
        self.spec = spec
        self.read = read
        self.rms_eps = rms_eps
        self.group = spec.num_heads // spec.kv_heads

    def shared(self, first_layer: int) -> _Shared:
        w = self.w
        rows = w.node("Shape", f"k_{first_layer}")
        return _Shared(
            cos=w.node("Unsqueeze", "cos", w.ints([1, 2])),
            sin=w.node("Unsqueeze", "sin", w.ints([1, 2])),
            mask=w.node("Tile", "mask", w.ints([self.group, 1])),
            cached=w.node("Slice", rows, w.ints([0]), w.ints([1])),
        )

    def layer(self, x: str, i: int, shared: _Shared, out: str = "", last_row: bool = False) -> tuple[str, str]:
        """One decoder layer; returns (hidden, attention probabilities [G, R*T, S+T] fp32)."""
        w = self.w
        context, probs = self._attention(self._norm(x, f"layers.{i}.input_layernorm"), i, shared)
        if last_row:  # only the last token's logits are wanted: the rest of the layer is skipped
            context, x = self._last(context), self._last(x)
        x = w.node("Add", x, self._linear(context, f"layers.{i}.self_attn.o_proj"))
        y = self._mlp(self._norm(x, f"layers.{i}.post_attention_layernorm"), i)
        return w.node("Add", x, y, out=out), probs

    def head_mean(self, probs: str, out: str) -> str:
        """Mean over all query heads of probs [G, R*T, S+T]: fp32 [T, S+T]."""
        w = self.w
        groups = w.node("ReduceMean", probs, axes=[0], keepdims=0)
        heads = w.split(groups, self.group, axis=0) if self.group > 1 else [groups]
        return w.node("Mul", w.node("Sum", *heads), w.scalar(1 / self.group), out=out)

    def logits(self, x: str, out: str) -> None:
        """Final norm and head. x: [1, E]; logits fp32 [1, V]."""
        w = self.w
        head = w.weight("lm_head", self.read("lm_head.weight").T)
        y = w.node("MatMul", self._norm(x, "norm"), head, out="" if self._half else out)
        if self._half:
            w.node("Cast", y, out=out, to=ONNX_TYPE["fp32"])

    @property
    def _half(self) -> bool:
        return self.spec.dtype == "fp16"

    def _fp32(self, x: str) -> str:
        return self.w.node("Cast", x, to=ONNX_TYPE["fp32"]) if self._half else x

    def _own(self, x: str) -> str:
        return self.w.node("Cast", x, to=ONNX_TYPE["fp16"]) if self._half else x

    def _last(self, x: str) -> str:
        ends = self.w.ints([np.iinfo(np.int64).max])
        return self.w.node("Slice", x, self.w.ints([-1]), ends, self.w.ints([0]))

    def _norm(self, x: str, name: str) -> str:
        w, x32 = self.w, self._fp32(x)
        square = w.node("Pow", x32, w.scalar(2.0))
        mean = w.node("ReduceMean", square, axes=[-1], keepdims=1)
        rms = w.node("Sqrt", w.node("Add", mean, w.scalar(self.rms_eps)))
        normed = self._own(w.node("Div", x32, rms))
        return w.node("Mul", normed, w.weight(f"{name}.weight", self.read(f"{name}.weight")))

    def _linear(self, x: str, name: str) -> str:
        weight = self.read(f"{name}.weight").T
        return self.w.node("MatMul", x, self.w.weight(f"{name}.weight", weight))

    def _attention(self, x: str, i: int, shared: _Shared) -> tuple[str, str]:
        w, s, g = self.w, self.spec, self.spec.kv_heads
        q, k, v = self._qkv(x, i, shared)
        k = w.node("Identity", k, out=f"new_k_{i}")
        v = w.node("Reshape", v, w.ints([-1, g, s.head_dim]), out=f"new_v_{i}")
        grouped = w.node("Reshape", q, w.ints([-1, g, self.group, s.head_dim]))
        q = w.node("Transpose", grouped, perm=[1, 2, 0, 3])
        q = w.node("Reshape", q, w.ints([g, -1, s.head_dim]))  # [G, R*T, D]
        probs = self._softmax(q, f"k_{i}", k, shared)
        context = self._weighted(self._own(probs), f"v_{i}", v, shared)
        context = w.node("Reshape", context, w.ints([g, self.group, -1, s.head_dim]))
        context = w.node("Transpose", context, perm=[2, 0, 1, 3])
        return w.node("Reshape", context, w.ints([-1, s.num_heads * s.head_dim])), probs

    def _qkv(self, x: str, i: int, shared: _Shared) -> tuple[str, str, str]:
        """q [T, H, D] and k [T, G, D] with RoPE applied, v [T, G*D]."""
        w, s = self.w, self.spec
        names = [f"layers.{i}.self_attn.{part}_proj" for part in "qkv"]
        scales = [s.head_dim**-0.5, 1.0, 1.0]
        weight = np.concatenate([self._scaled(f"{n}.weight", c) for n, c in zip(names, scales, strict=True)])
        bias = np.concatenate([self._scaled(f"{n}.bias", c) for n, c in zip(names, scales, strict=True)])
        y = w.node("MatMul", x, w.weight(f"layers.{i}.self_attn.qkv.weight", weight.T))
        y = w.node("Add", y, w.weight(f"layers.{i}.self_attn.qkv.bias", bias))
        turned, kept = (s.num_heads + s.kv_heads) * s.head_dim, s.kv_heads * s.head_dim
        qk, v = w.split(y, [turned, kept], axis=1)
        qk = self._rope(w.node("Reshape", qk, w.ints([-1, s.num_heads + s.kv_heads, s.head_dim])), shared)
        q, k = w.split(qk, [s.num_heads, s.kv_heads], axis=1)
        return q, k, v

    def _scaled(self, name: str, scale: float) -> Array:
        array = self.read(name)
        return array if scale == 1.0 else (array.astype(np.float32) * scale).astype(array.dtype)

    def _rope(self, x: str, shared: _Shared) -> str:
        """Rotate halves: (a, b) -> (a, b) cos + (-b, a) sin. The halves change places by Gather: with Split or Slice
        and Concat, or a matrix product, TensorRT 8.6's builder runs without end (benchmarks/trt_forms.py)."""
        w, d, heads = self.w, self.spec.head_dim, self.spec.num_heads + self.spec.kv_heads
        halves = w.node("Reshape", x, w.ints([-1, heads, 2, d // 2]))
        signs = w.constant("rope_signs", np.array([[-1.0], [1.0]], self.spec.numpy_dtype))
        turned = w.node("Mul", w.node("Gather", halves, w.ints([1, 0]), axis=2), signs)
        both = w.node("Add", w.node("Mul", halves, shared.cos), w.node("Mul", turned, shared.sin))
        return w.node("Reshape", both, w.ints([-1, heads, d]))

    def _softmax(self, q: str, cached_k: str, new_k: str, shared: _Shared) -> str:
        w = self.w
        scores = [w.node("MatMul", q, w.node("Transpose", k, perm=[1, 2, 0])) for k in (cached_k, new_k)]
        joined = self._fp32(w.node("Concat", *scores, axis=2))
        return w.node("Softmax", w.node("Add", joined, shared.mask), axis=-1)

    def _weighted(self, probs: str, cached_v: str, new_v: str, shared: _Shared) -> str:
        w, end = self.w, self.w.ints([np.iinfo(np.int64).max])
        over_cached = w.node("Slice", probs, w.ints([0]), shared.cached, w.ints([2]))
        over_new = w.node("Slice", probs, shared.cached, end, w.ints([2]))
        parts = [
            w.node("MatMul", p, w.node("Transpose", v, perm=[1, 0, 2]))
            for p, v in ((over_cached, cached_v), (over_new, new_v))
        ]
        return w.node("Add", *parts)

    def _mlp(self, x: str, i: int) -> str:
        w, name = self.w, f"layers.{i}.mlp"
        both = np.concatenate([self.read(f"{name}.{part}_proj.weight") for part in ("gate", "up")])
        y = w.node("MatMul", x, w.weight(f"{name}.gate_up.weight", both.T))
        gate, up = w.split(y, 2, axis=1)
        gated = w.node("Mul", w.node("Mul", gate, w.node("Sigmoid", gate)), up)
        return self._linear(gated, f"{name}.down_proj")


def write_decoders(
    folder: Path, spec: ModelSpec, read: ReadTensor, rms_eps: float, on_layer: Callable[[], None]
) -> dict[str, Placed]:
    """Write decoder_shallow.onnx and decoder_deep.onnx into a folder, layer by layer; returns where the weights lie.

    `read` gives a tensor by its canonical name in the bundle's dtype; it is called once a tensor, so memory holds one
    layer's largest matrix whatever the model's size.
    """
    shallow, deep = contract.decoder_shallow(spec), contract.decoder_deep(spec)
    cut = spec.split_layer
    with GraphWriter(folder / f"{shallow.name}.onnx", shallow) as writer:
        decoder = DecoderWriter(writer, spec, read, rms_eps)
        x, shared = "embeds", decoder.shared(0)
        for i in range(cut):
            x, probs = decoder.layer(x, i, shared, out="hidden" if i == cut - 1 else "")
            on_layer()
        decoder.head_mean(probs, out="attention")
        writer.save()
        placed = writer.placed
    with GraphWriter(folder / f"{deep.name}.onnx", deep) as writer:
        decoder = DecoderWriter(writer, spec, read, rms_eps)
        x, shared = "hidden", decoder.shared(cut)
        for i in range(cut, spec.num_layers):
            x, _ = decoder.layer(x, i, shared, last_row=i == spec.num_layers - 1)
            on_layer()
        decoder.logits(x, out="logits")
        writer.save()
        return placed | writer.placed
