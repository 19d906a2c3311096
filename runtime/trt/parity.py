"""The export's gate, on the device: a plan is compared with ONNX Runtime on the CPU, on the same random inputs.

A decoder's cached rows are what the graph itself computed from the rows before, embeddings of random tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from dycoke_edge.bundle import Bundle
from dycoke_edge.contract import MASKED, Graph
from dycoke_edge.errors import EngineError
from dycoke_edge.parity import CACHED, NEW, TOLERANCE, Parity, compare, run_on_cpu, worst_of
from dycoke_edge.runtime.engine import one_line
from dycoke_edge.runtime.layers import Rope

Array = NDArray[Any]
Feeds = dict[str, Array]
FRAMES, PAIRS = 2, 3


class Runner(Protocol):
    """An engine."""

    def run(self, graph: str, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> None:
        """Run a graph."""


def check(bundle: Bundle, graph: Graph, onnx: Path, engine: Runner, most: int, seed: int = 0) -> list[Parity]:
    """Compare every output; `most` is the largest batch that the plan takes. EngineError if one is out of tolerance."""
    results = measure(bundle, graph, onnx, engine, most, seed)
    worst = worst_of(results)
    if worst is not None:
        raise EngineError(
            f"{worst.graph}: {worst.output} of the TensorRT plan differs from onnxruntime by {worst.relative:.2g} "
            f"relative, more than {worst.tolerance:g}; the plan was not kept, use --provider cuda"
        )
    return results


def measure(bundle: Bundle, graph: Graph, onnx: Path, engine: Runner, most: int, seed: int = 0) -> list[Parity]:
    """How far every output of an engine is from ONNX Runtime's on the CPU, for batches of up to `most`."""
    return [
        parity
        for feeds in _feeds(bundle, graph, onnx, most, seed)
        for parity in _compare(bundle, graph, onnx, engine, feeds)
    ]


def _compare(bundle: Bundle, graph: Graph, onnx: Path, engine: Runner, feeds: Feeds) -> Iterator[Parity]:
    wanted = _on_cpu(bundle, graph, onnx, feeds)
    got = {name: np.empty_like(array) for name, array in wanted.items()}
    engine.run(graph.name, feeds, got)
    for name, want in wanted.items():
        yield compare(graph.name, name, got[name], want, TOLERANCE[bundle.model.dtype])


def _feeds(bundle: Bundle, graph: Graph, onnx: Path, most: int, seed: int) -> Iterator[Feeds]:
    spec, random = bundle.model, np.random.default_rng(seed)
    size, tokens = spec.image_size, (spec.tokens_per_frame, spec.hidden_size)
    if graph.name == "vision":
        yield {"pixels": random.uniform(-1, 1, (min(FRAMES, most), 3, size, size)).astype(spec.numpy_dtype)}
    elif graph.name.startswith("merge"):
        shape = (min(PAIRS, most), *tokens)
        yield {name: random.standard_normal(shape).astype(spec.numpy_dtype) for name in ("reference", "frame")}
    else:
        yield from _decoder(bundle, graph, onnx, random)


def _decoder(bundle: Bundle, graph: Graph, onnx: Path, random: np.random.Generator) -> Iterator[Feeds]:
    """A chunk of NEW tokens behind CACHED rows, and one token."""
    spec, rows = bundle.model, CACHED + NEW
    x = np.asarray(bundle.embed_tokens()[random.integers(0, spec.vocab_size, rows)])
    cached = [t.name for t in graph.inputs if t.shape[0] == "S"]
    empty = {name: np.zeros((1, spec.kv_heads, spec.head_dim), spec.numpy_dtype) for name in cached}
    before = _on_cpu(bundle, graph, onnx, _tokens(bundle, graph, x[:CACHED], 0, empty))
    seen = {name: before[f"new_{name}"] for name in cached}
    yield _tokens(bundle, graph, x[CACHED:], CACHED, seen)
    yield _tokens(bundle, graph, x[CACHED : CACHED + 1], CACHED, seen)


def _tokens(bundle: Bundle, graph: Graph, x: Array, start: int, seen: Feeds) -> Feeds:
    count, rows = len(x), len(next(iter(seen.values())))
    cos, sin = Rope(bundle.model, count)(np.arange(start, start + count))
    mask = np.zeros((count, rows + count), np.float32)
    mask[:, rows:][np.triu_indices(count, 1)] = MASKED
    if start == 0:
        mask[:, :rows] = MASKED
    return {graph.inputs[0].name: x, "cos": cos, "sin": sin, "mask": mask, **seen}


def _on_cpu(bundle: Bundle, graph: Graph, onnx: Path, feeds: Feeds) -> Feeds:
    try:
        outputs = run_on_cpu(onnx, feeds, bundle.model.dtype)
    except Exception as error:  # onnxruntime raises a class of its own per status code
        raise EngineError(f"onnxruntime cannot run {onnx}: {one_line(error)}; export again") from None
    return {tensor.name: array for tensor, array in zip(graph.outputs, outputs, strict=True)}
