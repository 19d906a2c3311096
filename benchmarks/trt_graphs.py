"""The tiny graphs of `trt_forms`: the same arithmetic written in ways that TensorRT's builders take differently.

Each case is NAME.onnx and NAME.npz with `in.*` (inputs), `out.*` (what ONNX Runtime's CPU kernels give) and
`profile.*` ([3, rank]: the smallest, usual and largest shape of an input).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from benchmarks.trt_ropes import ROPES, Rope, Writer, pairs_matrix, split_concat
from dycoke_edge import contract
from dycoke_edge.config import DType
from dycoke_edge.contract import MASKED, NUMPY, Graph, ModelSpec, Tensor
from dycoke_edge.export.decoder import DecoderWriter, _Shared
from dycoke_edge.parity import run_on_cpu

Array = NDArray[Any]
DTYPES: tuple[DType, ...] = ("fp32", "fp16")
TOKENS, ROWS = (1, 5, 16), (1, 24, 128)  # T and S: smallest, usual, largest


@dataclass(frozen=True)
class Size:
    """Dimensions of a decoder layer."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    wide: int  # of the MLP

    def spec(self, dtype: DType, layers: int, split: int = 1) -> ModelSpec:
        """A model of this size."""
        return ModelSpec(
            dtype=dtype,
            image_size=28,
            tokens_per_frame=4,
            hidden_size=self.hidden,
            num_layers=layers,
            num_heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            vocab_size=256,
            rope_theta=1e4,
            max_positions=512,
            split_layer=split,
        )


TINY, HALF_B = Size(64, 4, 2, 16, 128), Size(896, 14, 2, 64, 4864)


class Forms(DecoderWriter):
    """The decoder's own layers with another way to rotate."""

    def __init__(self, writer: Writer, spec: ModelSpec, rope: Rope) -> None:
        super().__init__(writer, spec, _random_weights(spec), 1e-6)
        self._form = rope

    def shared(self, first_layer: int) -> _Shared:
        narrow = {name: self.w.node("Unsqueeze", name, self.w.ints([1])) for name in ("cos", "sin")}
        return replace(super().shared(first_layer), **narrow)

    def _rope(self, x: str, shared: _Shared) -> str:
        return self._turn(x, shared, self.spec.num_heads + self.spec.kv_heads)

    def _turn(self, x: str, shared: _Shared, heads: int) -> str:
        return self._form(cast(Writer, self.w), x, shared.cos, shared.sin, heads, self.spec.head_dim)


class Apart(Forms):
    """Queries and keys are rotated apart, not as one tensor that is split afterwards."""

    def _qkv(self, x: str, i: int, shared: _Shared) -> tuple[str, str, str]:
        w, s = self.w, self.spec
        parts = []
        for name, heads in (("q", s.num_heads), ("k", s.kv_heads), ("v", s.kv_heads)):
            y = self._linear(x, f"layers.{i}.self_attn.{name}_proj")
            if name != "v":
                y = self._turn(w.node("Reshape", y, w.ints([-1, heads, s.head_dim])), shared, heads)
            parts.append(y)
        return parts[0], parts[1], parts[2]


def _random_weights(spec: ModelSpec) -> Callable[[str], Array]:
    """Weights by name, as `ReadTensor`: shapes of Qwen2, values small enough for fp16."""
    random = np.random.default_rng(0)
    wide = TINY.wide if spec.hidden_size == TINY.hidden else HALF_B.wide
    e, d = spec.hidden_size, spec.head_dim
    rows = {"q_proj": spec.num_heads * d, "k_proj": spec.kv_heads * d, "v_proj": spec.kv_heads * d}
    shapes: dict[str, tuple[int, int]] = {name: (count, e) for name, count in rows.items()}
    shapes |= {"o_proj": (e, spec.num_heads * d), "gate_proj": (wide, e), "up_proj": (wide, e), "down_proj": (e, wide)}
    shapes |= {"lm_head": (spec.vocab_size, e)}

    def read(name: str) -> Array:
        layer, kind = name.split(".")[-2:]
        if kind == "bias":
            return (random.standard_normal(shapes[layer][0]) * 0.1).astype(spec.numpy_dtype)
        if "norm" in layer:
            return (1 + 0.1 * random.standard_normal(e)).astype(spec.numpy_dtype)
        out, width = shapes[layer]
        weight: Array = (random.standard_normal((out, width)) / np.sqrt(width)).astype(spec.numpy_dtype)
        return weight

    return read


# Cases. Each writes a graph; T and S are dynamic in all of them


Case = tuple[str, DType, Graph, Callable[[Writer], None]]


def cases(large: bool) -> Iterator[Case]:
    """Known to build first, then from the rotation alone to whole graphs. `large` adds layers as wide as 0.5B's."""
    for name in CORES:
        yield name, "fp32", _core_spec("fp32", turned=False), CORES[name]
    for dtype in DTYPES:
        for name, rope in ROPES.items():
            yield f"rope_{name}", dtype, _rope_spec(dtype), _alone(rope)
            yield f"attention_{name}", dtype, _core_spec(dtype), _attention(rope)
            yield f"layer_{name}", dtype, _deep_spec(TINY, dtype, 2), _deep(TINY, dtype, 2, Forms, rope)
            yield f"deep_{name}", dtype, _deep_spec(TINY, dtype, 7), _deep(TINY, dtype, 7, Forms, rope)
        for rope in (split_concat, pairs_matrix):
            yield f"apart_{rope.__name__}", dtype, _deep_spec(TINY, dtype, 2), _deep(TINY, dtype, 2, Apart, rope)
    for rope in (*ROPES.values(),) if large else ():
        yield f"wide_{rope.__name__}", "fp16", _deep_spec(HALF_B, "fp16", 2), _deep(HALF_B, "fp16", 2, Forms, rope)


def _rope_spec(dtype: DType) -> Graph:
    s = TINY
    inputs = (Tensor("x", ("T", s.heads, s.head_dim), dtype), *_turn(dtype))
    return Graph("rope", inputs, (Tensor("y", ("T", s.heads, s.head_dim), dtype),))


def _core_spec(dtype: DType, turned: bool = True) -> Graph:
    s, d = TINY, TINY.head_dim
    inputs = (
        Tensor("q", ("T", s.heads, d), dtype),
        *(Tensor(f"new_{name}", ("T", s.kv_heads, d), dtype) for name in "kv"),
        *(Tensor(f"cached_{name}", ("S", s.kv_heads, d), dtype) for name in "kv"),
        Tensor("mask", ("T", "S+T"), "fp32"),
        *(_turn(dtype) if turned else ()),
    )
    return Graph("core", inputs, (Tensor("context", ("T", s.heads * d), dtype),))


def _turn(dtype: DType) -> tuple[Tensor, ...]:
    return tuple(Tensor(name, ("T", TINY.head_dim // 2), dtype) for name in ("cos", "sin"))


def _deep_spec(size: Size, dtype: DType, layers: int) -> Graph:
    return contract.decoder_deep(size.spec(dtype, layers))


def _alone(rope: Rope) -> Callable[[Writer], None]:
    def write(w: Writer) -> None:
        cos, sin = (w.node("Unsqueeze", name, w.ints([1])) for name in ("cos", "sin"))
        w.node("Identity", rope(w, "x", cos, sin, TINY.heads, TINY.head_dim), out="y")

    return write


def _attention(rope: Rope) -> Callable[[Writer], None]:
    def write(w: Writer) -> None:
        cos, sin = (w.node("Unsqueeze", name, w.ints([1])) for name in ("cos", "sin"))
        heads = {"q": TINY.heads, "new_k": TINY.kv_heads}
        _core_concat_slice(w, *(rope(w, name, cos, sin, count, TINY.head_dim) for name, count in heads.items()))

    return write


def _deep(size: Size, dtype: DType, layers: int, kind: type[Forms], rope: Rope) -> Callable[[Writer], None]:
    spec = size.spec(dtype, layers)

    def write(w: Writer) -> None:
        decoder = kind(w, spec, rope)
        x, shared = "hidden", decoder.shared(1)
        for i in range(1, layers):
            x, _ = decoder.layer(x, i, shared, last_row=i == layers - 1)
        decoder.logits(x, out="logits")

    return write


def _core_concat_slice(w: Writer, q: str = "q", new_k: str = "new_k") -> None:
    """Attention as the decoder has it: two products, concat of scores, softmax, two slices, two products."""
    q = _grouped(w, q)
    scores = [w.node("MatMul", q, w.node("Transpose", k, perm=[1, 2, 0])) for k in ("cached_k", new_k)]
    probs = _softmax(w, w.node("Concat", *scores, axis=2))
    rows = w.node("Slice", w.node("Shape", "cached_k"), w.ints([0]), w.ints([1]))
    parts = [
        w.node("Slice", probs, w.ints([0]), rows, w.ints([2])),
        w.node("Slice", probs, rows, w.ints([np.iinfo(np.int64).max]), w.ints([2])),
    ]
    pairs = zip(parts, ("cached_v", "new_v"), strict=True)
    _out(w, w.node("Add", *(w.node("MatMul", p, w.node("Transpose", v, perm=[1, 0, 2])) for p, v in pairs)))


def _core_joined(w: Writer) -> None:
    """K and V joined first: no concat of scores, no slices, but copies of the cache."""
    k, v = (w.node("Concat", f"cached_{name}", f"new_{name}", axis=0) for name in "kv")
    scores = w.node("MatMul", _grouped(w, "q"), w.node("Transpose", k, perm=[1, 2, 0]))
    _out(w, w.node("MatMul", _softmax(w, scores), w.node("Transpose", v, perm=[1, 0, 2])))


def _core_halves(w: Writer) -> None:
    """Scores as the sum of two half products: queries and keys never put together again after they are rotated."""
    half, joined = TINY.head_dim // 2, []
    queries = w.split(_grouped(w, "q"), [half, half], axis=2)
    for k in ("cached_k", "new_k"):
        keys = w.split(k, [half, half], axis=2)
        pairs = zip(queries, keys, strict=True)
        joined.append(w.node("Add", *(w.node("MatMul", a, w.node("Transpose", b, perm=[1, 2, 0])) for a, b in pairs)))
    probs = _softmax(w, w.node("Concat", *joined, axis=2))
    v = w.node("Concat", "cached_v", "new_v", axis=0)
    _out(w, w.node("MatMul", probs, w.node("Transpose", v, perm=[1, 0, 2])))


def _grouped(w: Writer, q: str) -> str:
    s, group = TINY, TINY.heads // TINY.kv_heads
    q = w.node("Transpose", w.node("Reshape", q, w.ints([-1, s.kv_heads, group, s.head_dim])), perm=[1, 2, 0, 3])
    return w.node("Reshape", q, w.ints([s.kv_heads, -1, s.head_dim]))


def _softmax(w: Writer, scores: str) -> str:
    mask = w.node("Tile", "mask", w.ints([TINY.heads // TINY.kv_heads, 1]))
    half = w.dtype == np.float16
    x = w.node("Cast", scores, to=1) if half else scores
    probs = w.node("Softmax", w.node("Add", x, mask), axis=-1)
    return w.node("Cast", probs, to=10) if half else probs


def _out(w: Writer, context: str) -> None:
    s, group = TINY, TINY.heads // TINY.kv_heads
    context = w.node("Reshape", context, w.ints([s.kv_heads, group, -1, s.head_dim]))
    context = w.node("Transpose", context, perm=[2, 0, 1, 3])
    w.node("Reshape", context, w.ints([-1, s.heads * s.head_dim]), out="context")


CORES: dict[str, Callable[[Writer], None]] = {
    "core_concat_slice": _core_concat_slice,
    "core_joined": _core_joined,
    "core_halves": _core_halves,
}


# Files


def make(folder: Path, large: bool = False) -> list[str]:
    """Write every case with inputs and what ONNX Runtime makes of them; returns their names in order."""
    folder.mkdir(parents=True, exist_ok=True)
    names = list[str]()
    for name, dtype, graph, write in cases(large):
        file = folder / f"{len(names):02d}_{name}_{dtype}.onnx"
        writer = Writer(file, graph, dtype)
        with writer:
            write(writer)
            writer.save()
        feeds = _inputs(graph)
        outputs = run_on_cpu(file, feeds, dtype)
        arrays: dict[str, Any] = {f"in.{key}": value for key, value in feeds.items()}
        arrays |= {f"out.{t.name}": value for t, value in zip(graph.outputs, outputs, strict=True)}
        arrays |= {f"profile.{t.name}": np.array(_profile(t)) for t in graph.inputs}
        np.savez(file.with_suffix(".npz"), **arrays)
        names.append(file.stem)
    return names


def _inputs(graph: Graph) -> dict[str, Array]:
    random, sizes = np.random.default_rng(1), {"T": TOKENS[1], "S": ROWS[1], "S+T": ROWS[1] + TOKENS[1]}
    feeds = dict[str, Array]()
    for tensor in graph.inputs:
        shape = tuple(n if isinstance(n, int) else sizes[n] for n in tensor.shape)
        feeds[tensor.name] = random.standard_normal(shape).astype(NUMPY[tensor.dtype])
    if "cos" in feeds:
        angles = random.uniform(0, 6, feeds["cos"].shape)
        feeds["cos"][...], feeds["sin"][...] = np.cos(angles), np.sin(angles)
    if "mask" in feeds:
        mask = np.zeros((TOKENS[1], ROWS[1] + TOKENS[1]), np.float32)
        mask[:, ROWS[1] :][np.triu_indices(TOKENS[1], 1)] = MASKED
        feeds["mask"] = mask
    return feeds


def _profile(tensor: Tensor) -> list[list[int]]:
    sizes = {"T": TOKENS, "S": ROWS, "S+T": tuple(a + b for a, b in zip(TOKENS, ROWS, strict=True))}
    return [[n if isinstance(n, int) else sizes[n][at] for n in tensor.shape] for at in range(3)]
