"""Many tokens through the decoder's layers: matrix products by a library, everything between them by our kernels.

One pass takes visual tokens and the text after them: rows of the former go left of what is cached, of the latter right.
"""

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
from dycoke_edge.runtime.positions import Positions


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
        self.ids, self.positions = (DeviceArray.empty(device, (chunk,), np.int32) for _ in range(2))
        self.turns = scratch(self.dim, np.float32)
        self.x = self.hidden[0]

    def run(
        self, kv: KVBuffer, visual: NDArray[Any] | DeviceArray, text: NDArray[np.int64], positions: Positions
    ) -> None:
        """Visual tokens [M, E], then text [Q], into the next rows of either side. Changes no
        count; KVOverflow if there is no room."""
        left, right = len(visual), len(text)
        shallow, parked = slice(kv.left(left).start, kv.right(right).stop), kv.num_visual - kv.num_active
        assert not (left and parked), "one slice holds what a layer attends to"
        deep = slice(shallow.start + parked, shallow.stop)
        self._embed(visual, text, positions)
        whole, end = _Part(self, slice(0, left + right), left), _Part(self, slice(left + right - 1, left + right), 0)
        for index, layer in enumerate(self.weights.layers):
            seen = deep if index >= self.spec.split_layer else shallow
            keys, values = kv.rows.plane(2 * index, seen), kv.rows.plane(2 * index + 1, seen)
            self._rows(layer, whole, keys, values)
            part = end if layer is self.weights.layers[-1] else whole
            self._attend(part, keys, values, self._bias(kv, seen))
            self._finish(layer, part)
        self.x = self.hidden[left + right - 1]

    def _embed(self, visual: NDArray[Any] | DeviceArray, text: NDArray[np.int64], positions: Positions) -> None:
        """Rows of `hidden` and `turns`."""
        left, right, width = len(visual), len(text), self.spec.hidden_size
        count = left + right
        if left and isinstance(positions.places, DeviceArray):
            shifted = positions.places, self.positions, c_int32(positions.first), c_int32(left)
            self.device.kernel("shift", -(-left // BLOCK), BLOCK, *shifted)()
            self.positions[left:count] = (positions.text + np.arange(right)).astype(np.int32)
        else:
            self.positions[:count] = positions.on_host(right).astype(np.int32)
        if left:
            self.embeds[:left] = visual
        if right:
            self.ids[:right] = text.astype(np.int32)
            found = self.weights.embed, self.ids, self.embeds[left:]
            self._launch("gather", warps(right), *found, c_int32(right), c_int32(width))
        self._launch("widen", -(-count * width // BLOCK), self.embeds, self.hidden, c_int64(count * width))
        turned = self.positions, self._inverse, self.turns, c_int32(self.dim // 2)
        self.device.kernel("turns", count, BLOCK, *turned)()

    def _rows(self, layer: Layer, part: _Part, keys: DeviceArray, values: DeviceArray) -> None:
        """Queries into `qkv`, keys and values into the new ones of the rows [S, G, D] that the layer attends to."""
        self._norm(layer.input_norm, part)
        self.device.product(part.normed, layer.qkv, part.qkv)
        sizes = self.heads, self.groups, self.dim, part.left, len(keys) - part.count
        self._launch("rope_rows", part.count, part.qkv, layer.bias, self.turns, keys, values, *map(c_int32, sizes))

    def _attend(self, part: _Part, keys: DeviceArray, values: DeviceArray, bias: Argument | DeviceArray) -> None:
        """Context of the new tokens, or of the last of them: they see all that is cached and, of the new ones, those up
        to their own."""
        sizes = self.width, part.count, len(keys), part.left, self.heads, self.groups
        grid = self.heads, -(-part.count // queries(self.dtype, self.dim)), 1
        arrays = part.qkv, keys, values, bias, part.context
        name = f"attend_rows_{self._suffix}_{self.dim}"
        self.device.kernel(name, grid, FLASH_BLOCK, *arrays, *map(c_int32, sizes))()

    def _bias(self, kv: KVBuffer, rows: slice) -> Argument | DeviceArray:
        """What is added to the scores of these rows, if anything is."""
        assert isinstance(kv.rows, DeviceRows)
        return NULL if kv.rows.bias is None else kv.rows.bias[0][rows]

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


class _Part:
    """Views of some tokens of a pass, made once for all layers (benchmarks/NOTES.md has what that saves). The first
    `left` of them have their rows left of what is cached."""

    def __init__(self, all_of: Prefill, tokens: slice, left: int) -> None:
        self.count, self.left = tokens.stop - tokens.start, left
        self.hidden, self.qkv, self.context = all_of.hidden[tokens], all_of.qkv[tokens], all_of.context[tokens]
        first = slice(0, self.count)
        self.normed, self.both, self.act = all_of.normed[first], all_of.both[first], all_of.act[first]
