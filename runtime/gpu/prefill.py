"""Many tokens through the decoder's layers: matrix products by a library, everything between them by our kernels."""

from __future__ import annotations

from ctypes import c_float, c_int32, c_int64
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dycoke_edge.runtime.gpu.device import Argument, Device, DeviceArray
from dycoke_edge.runtime.gpu.kernels import BLOCK, suffix
from dycoke_edge.runtime.gpu.weights import Layer, Weights
from dycoke_edge.runtime.kv import KVBuffer

ATTEND_BLOCK = 128  # of kernels/attend_rows.cu
QUERIES = {"f16": 64, "f32": 4}  # that a block takes there


class Prefill:
    """Runs chunks of tokens. The last token of a chunk ends in `x`, from which logits are made when wanted.

    The last layer computes only what is read of it: K and V of every token, the rest of the last one.
    """

    def __init__(self, device: Device, weights: Weights, inverse: DeviceArray, chunk: int) -> None:
        spec = weights.spec
        self.device, self.weights, self.spec, self.chunk, self._inverse = device, weights, spec, chunk, inverse
        self.dtype: np.dtype[Any] = np.dtype(spec.numpy_dtype)
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
        self, kv: KVBuffer, embeds: NDArray[Any] | DeviceArray, positions: NDArray[np.integer], rows: slice
    ) -> None:
        """embeds [T, E] at positions [T] into `rows`, which lie at an end of kv.shallow."""
        count = len(embeds)
        self.embeds[:count] = embeds
        self.positions[:count] = positions.astype(np.int32)
        size = self.embeds[:count].size
        self._launch("widen", -(-size // BLOCK), self.embeds, self.hidden, c_int64(size))
        turned = self.positions, self._inverse, self.turns, c_int32(self.dim // 2)
        self.device.kernel("turns", count, BLOCK, *turned)()
        *others, last = enumerate(self.weights.layers)
        whole, end = slice(0, count), slice(count - 1, count)
        for index, layer in others:
            self._rows(kv, index, layer, count, rows)
            self._attend(kv, index, whole, rows)
            self._finish(layer, whole)
        index, layer = last
        self._rows(kv, index, layer, count, rows)
        self._attend(kv, index, end, rows)
        self._finish(layer, end)
        self.x = self.hidden[count - 1]

    def _rows(self, kv: KVBuffer, index: int, layer: Layer, count: int, rows: slice) -> None:
        """Queries into `qkv`, keys and values into their rows of the buffer."""
        self._norm(layer.input_norm, slice(0, count))
        self.device.product(self.normed[:count], layer.qkv, self.qkv[:count])
        keys, values = kv.rows.plane(2 * index, rows), kv.rows.plane(2 * index + 1, rows)
        sizes = c_int32(self.heads), c_int32(self.groups), c_int32(self.dim)
        self._launch("rope_rows", count, self.qkv, layer.bias, self.turns, keys, values, *sizes)

    def _attend(self, kv: KVBuffer, index: int, tokens: slice, rows: slice) -> None:
        """Context of the new tokens in `rows`, or of the last of them: they see all that is cached and, of the new
        ones, those up to their own."""
        cached = kv.deep if index >= self.spec.split_layer else kv.shallow
        assert rows.start in (cached.stop, cached.start - (rows.stop - rows.start)), "one slice holds them all"
        seen = slice(min(cached.start, rows.start), max(cached.stop, rows.stop))
        count = tokens.stop - tokens.start
        new_at = 0 if count == 1 else rows.start - seen.start  # one token sees everything
        keys, values = kv.rows.plane(2 * index, seen), kv.rows.plane(2 * index + 1, seen)
        sizes = self.width, count, seen.stop - seen.start, new_at, self.heads, self.groups
        per_block = QUERIES[suffix(self.dtype)]
        arrays = self.qkv[tokens], keys, values, self.context[tokens]
        name = f"attend_rows_{suffix(self.dtype)}_{self.dim}"
        self.device.kernel(name, (-(-count // per_block), self.heads, 1), ATTEND_BLOCK, *arrays, *map(c_int32, sizes))()

    def _finish(self, layer: Layer, tokens: slice) -> None:
        """What comes after attention: out, norm, MLP, both added to `hidden`."""
        count, inner = tokens.stop - tokens.start, self.weights.intermediate
        self.device.product(self.context[tokens], layer.out, self.hidden[tokens], 1.0)
        self._norm(layer.post_norm, tokens)
        self.device.product(self.normed[:count], layer.gate_up, self.both[:count])
        self._launch("silu_rows", (-(-inner // BLOCK), count, 1), self.both, self.act, c_int32(inner))
        self.device.product(self.act[:count], layer.down, self.hidden[tokens], 1.0)

    def _norm(self, gain: DeviceArray, tokens: slice) -> None:
        """`normed` from some rows of `hidden`, at its beginning."""
        count, eps = tokens.stop - tokens.start, c_float(self.weights.rms_eps)
        self._launch("norm_rows", count, self.hidden[tokens], gain, eps, self.normed, c_int32(self.spec.hidden_size))

    def _launch(self, name: str, grid: int | tuple[int, int, int], *args: Argument | DeviceArray) -> None:
        self.device.kernel(f"{name}_{suffix(self.dtype)}", grid, BLOCK, *args)()
