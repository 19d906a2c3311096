"""Ways to rotate halves, (a, b) to (a cos - b sin, b cos + a sin). x is [T, H, D], cos and sin are [T, 1, D/2]."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dycoke_edge.config import DType
from dycoke_edge.contract import NUMPY, Graph
from dycoke_edge.export.graph import GraphWriter

Array = NDArray[Any]


class Writer(GraphWriter):
    """A writer whose constants have the graph's element type."""

    def __init__(self, path: Path, spec: Graph, dtype: DType) -> None:
        super().__init__(path, spec)
        self.dtype = NUMPY[dtype]

    def typed(self, name: str, array: Array) -> str:
        """A small constant of that type."""
        return self.constant(name, array.astype(self.dtype))


def slice_concat(w: Writer, x: str, cos: str, sin: str, heads: int, d: int) -> str:
    """Two slices and a concat."""
    a = w.node("Slice", x, w.ints([0]), w.ints([d // 2]), w.ints([2]))
    b = w.node("Slice", x, w.ints([d // 2]), w.ints([d]), w.ints([2]))
    return _halves(w, a, b, cos, sin)


def split_concat(w: Writer, x: str, cos: str, sin: str, heads: int, d: int) -> str:
    """A split and a concat: what the decoder did at first."""
    a, b = w.split(x, [d // 2, d // 2], axis=2)
    return _halves(w, a, b, cos, sin)


def matrix_tile(w: Writer, x: str, cos: str, sin: str, heads: int, d: int) -> str:
    """x cos + (x R) sin with a constant matrix R; cos and sin are repeated."""
    whole = [w.node("Tile", one, w.ints([1, 1, 2])) for one in (cos, sin)]
    return _turned(w, x, w.node("MatMul", x, _rotation(w, d)), *whole)


def matrix_product(w: Writer, x: str, cos: str, sin: str, heads: int, d: int) -> str:
    """As matrix_tile, cos and sin spread by a constant matrix."""
    spread = w.typed("spread", np.tile(np.eye(d // 2), 2))
    return _turned(w, x, w.node("MatMul", x, _rotation(w, d)), *(w.node("MatMul", one, spread) for one in (cos, sin)))


def gather(w: Writer, x: str, cos: str, sin: str, heads: int, d: int) -> str:
    """The halves exchanged by Gather with constant indices."""
    order = w.ints([*range(d // 2, d), *range(d // 2)])
    signs = w.typed("signs", np.repeat([-1.0, 1.0], d // 2))
    turned = w.node("Mul", w.node("Gather", x, order, axis=2), signs)
    return _turned(w, x, turned, *(w.node("Tile", one, w.ints([1, 1, 2])) for one in (cos, sin)))


def pairs_matrix(w: Writer, x: str, cos: str, sin: str, heads: int, d: int) -> str:
    """x as [T, H, 2, D/2], its two rows exchanged by a 2x2 matrix: no slice, no concat, cos and sin as they are."""
    pair = w.node("Reshape", x, w.ints([-1, heads, 2, d // 2]))
    turned = w.node("MatMul", w.typed("turn", np.array([[0.0, -1.0], [1.0, 0.0]])), pair)
    wide = [w.node("Unsqueeze", one, w.ints([1])) for one in (cos, sin)]
    return w.node("Reshape", _turned(w, pair, turned, *wide), w.ints([-1, heads, d]))


def pairs_gather(w: Writer, x: str, cos: str, sin: str, heads: int, d: int) -> str:
    """As pairs_matrix, the rows exchanged by Gather: what the decoder does."""
    pair = w.node("Reshape", x, w.ints([-1, heads, 2, d // 2]))
    signs = w.typed("pair_signs", np.array([[-1.0], [1.0]]))
    turned = w.node("Mul", w.node("Gather", pair, w.ints([1, 0]), axis=2), signs)
    wide = [w.node("Unsqueeze", one, w.ints([1])) for one in (cos, sin)]
    return w.node("Reshape", _turned(w, pair, turned, *wide), w.ints([-1, heads, d]))


Rope = Callable[[Writer, str, str, str, int, int], str]
ROPES: dict[str, Rope] = {
    rope.__name__: rope
    for rope in (split_concat, slice_concat, matrix_tile, matrix_product, pairs_matrix, pairs_gather, gather)
}


def _halves(w: Writer, a: str, b: str, cos: str, sin: str) -> str:
    first = w.node("Sub", w.node("Mul", a, cos), w.node("Mul", b, sin))
    second = w.node("Add", w.node("Mul", b, cos), w.node("Mul", a, sin))
    return w.node("Concat", first, second, axis=2)


def _turned(w: Writer, x: str, turned: str, cos: str, sin: str) -> str:
    return w.node("Add", w.node("Mul", x, cos), w.node("Mul", turned, sin))


def _rotation(w: Writer, d: int) -> str:
    half, zero = np.eye(d // 2), np.zeros((d // 2, d // 2))
    return w.typed("rotation", np.block([[zero, half], [-half, zero]]))
