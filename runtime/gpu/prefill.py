"""Many tokens through the decoder's layers: matrix products by a library, everything between them by our kernels."""

from __future__ import annotations

from ctypes import c_float, c_int32, c_int64
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dycoke_edge.runtime.gpu.device import Argument, Device, DeviceArray
from dycoke_edge.runtime.gpu.flash import FLASH_BLOCK, queries
from dycoke_edge.runtime.gpu.kernels import BLOCK, VECTOR, suffix, warps
from dycoke_edge.runtime.gpu.rows import NULL, DeviceRows
from dycoke_edge.runtime.gpu.weights import Layer, Weights
from dycoke_edge.runtime.kv import KVBuffer


class Prefill:
    """Runs chunks of tokens. The last token of a chunk ends in `x`, from which logits are made when wanted.

    The last layer computes only what is read of it: K and V of every token, the rest of the last one.
    """

    def __init__(self, device: Device, weights: Weights, inverse: DeviceArray, chunk: int) -> None:
        spec = weights.spec
        self.device, self.weights, self.spec, self.chunk, self._inverse = device, weights, spec, chunk, inverse
        self.dtype: np.dtype[Any] = np.dtype(spec.numpy_dtype)
        self._suffix = suffix(self.dtype)
        self.heads, self.groups, self.dim = spec.num_heads, spec.kv_heads, spec.head_dim
        self.width = (self.heads + 2 * self.groups) * self.dim

        def scratch(columns: int, dtype: Any = self.dtype) -> DeviceArray:
            return DeviceArray.empty(device, (chunk, columns), dtype)

        self.embeds, self.normed = scratch(spec.hidden_size), scratch(spec.hidden_size)
        self.qkv, self.context = scratch(self.width), scratch(self.heads * self.dim)
        self.both, self.act = scratch(2 * weights.intermediate), scratch(weights.intermediate)
        self.hidden = scratch(spec.hidden_size, np.float32)
        self.positions = DeviceArray.empty(device, (chunk,), np.int32)
        self.turns = scratch(self.dim, np.float32)
        self.x = self.hidden[0]

    def run(
        self, kv: KVBuffer, parts: list[NDArray[Any] | DeviceArray], positions: NDArray[np.integer], left: int
    ) -> None:
        """Tokens [T, E], one part after the other, at positions [T]: the rows of the first `left` go left of those in
        `kv`, the others right of them."""
        count = len(positions)
        rows = _NewRows(kv, left, count)
        begin = 0
        for embeds in parts:
            self.embeds[begin : begin + len(embeds)] = embeds
            begin += len(embeds)
        self.positions[:count] = positions.astype(np.int32)
        size = self.embeds[:count].size
        self._launch("widen", -(-size // BLOCK), self.embeds, self.hidden, c_int64(size))
        turned = self.positions, self._inverse, self.turns, c_int32(self.dim // 2)
        self.device.kernel("turns", count, BLOCK, *turned)()
        whole, end = _Part(self, slice(0, count)), _Part(self, slice(count - 1, count))
        for index, layer in enumerate(self.weights.layers):
            self._rows(kv, index, layer, whole, rows)
            part = end if layer is self.weights.layers[-1] else whole
            self._attend(kv, index, part, rows)
            self._finish(layer, part)
        self.x = self.hidden[count - 1]

    def _rows(self, kv: KVBuffer, index: int, layer: Layer, part: _Part, rows: _NewRows) -> None:
        """Queries into `qkv`, keys and values into their rows of the buffer."""
        self._norm(layer.input_norm, part)
        self.device.product(part.normed, layer.qkv, part.qkv)
        keys, values = kv.rows.plane(2 * index, rows.all), kv.rows.plane(2 * index + 1, rows.all)
        sizes = self.heads, self.groups, self.dim, rows.left, rows.between
        self._launch("rope_rows", part.count, part.qkv, layer.bias, self.turns, keys, values, *map(c_int32, sizes))

    def _attend(self, kv: KVBuffer, index: int, part: _Part, rows: _NewRows) -> None:
        """Context of the new tokens, or of the last of them: they see all that is cached and, of the new ones, those up
        to their own."""
        seen = rows.seen(kv.deep if index >= self.spec.split_layer else kv.shallow)
        left = rows.left if part.count > 1 else 0  # one token, the last, sees everything
        keys, values = kv.rows.plane(2 * index, seen), kv.rows.plane(2 * index + 1, seen)
        sizes = self.width, part.count, seen.stop - seen.start, left, self.heads, self.groups
        grid = self.heads, -(-part.count // queries(self.dtype, self.dim)), 1
        arrays = part.qkv, keys, values, self._bias(kv, seen), part.context
        name = f"attend_rows_{self._suffix}_{self.dim}"
        self.device.kernel(name, grid, FLASH_BLOCK, *arrays, *map(c_int32, sizes))()

    def _bias(self, kv: KVBuffer, rows: slice) -> Argument | DeviceArray:
        """What is added to the scores of these rows, if anything is."""
        assert isinstance(kv.rows, DeviceRows)
        return NULL if kv.rows.bias is None else kv.rows.bias[rows]

    def _finish(self, layer: Layer, part: _Part) -> None:
        """What comes after attention: out, norm, MLP, both added to `hidden`."""
        inner = self.weights.intermediate
        self.device.product(part.context, layer.out, part.hidden, 1.0)
        self._norm(layer.post_norm, part)
        self.device.product(part.normed, layer.gate_up, part.both)
        grid = -(-inner * self.dtype.itemsize // (VECTOR * BLOCK)), part.count, 1
        self._launch("silu_rows", grid, part.both, part.act, c_int32(inner))
        self.device.product(part.act, layer.down, part.hidden, 1.0)

    def _norm(self, gain: DeviceArray, part: _Part) -> None:
        """`normed` from some rows of `hidden`, at its beginning."""
        eps, sizes = c_float(self.weights.rms_eps), (c_int32(part.count), c_int32(self.spec.hidden_size))
        self._launch("norm_rows", warps(part.count), part.hidden, gain, eps, part.normed, *sizes)

    def _launch(self, name: str, grid: int | tuple[int, int, int], *args: Argument | DeviceArray) -> None:
        self.device.kernel(f"{name}_{self._suffix}", grid, BLOCK, *args)()


class _NewRows:
    """Where new tokens go: `left` of them left of what is cached, the others right of it."""

    def __init__(self, kv: KVBuffer, left: int, count: int) -> None:
        at_left, at_right = kv.left(left), kv.right(count - left)
        self.left = left
        self.between = at_right.start - at_left.stop if 0 < left < count else 0  # rows that are skipped
        self.all = slice(at_left.start if left else at_right.start, at_right.stop if left < count else at_left.stop)

    def seen(self, cached: slice) -> slice:
        """With these cached rows, in one slice."""
        assert not self.left or self.all.start + self.left == cached.start, "one slice holds them all"
        return slice(min(cached.start, self.all.start), max(cached.stop, self.all.stop))


class _Part:
    """Views of some tokens of a chunk, made once for all layers (benchmarks/NOTES.md has what that saves)."""

    def __init__(self, all_of: Prefill, tokens: slice) -> None:
        self.count = tokens.stop - tokens.start
        self.hidden, self.qkv, self.context = all_of.hidden[tokens], all_of.qkv[tokens], all_of.context[tokens]
        first = slice(0, self.count)
        self.normed, self.both, self.act = all_of.normed[first], all_of.both[first], all_of.act[first]
