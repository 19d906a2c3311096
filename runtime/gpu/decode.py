"""One decode step on the GPU: embedding, layers, the kept set, logits, the next token. Captured, it is one launch, and
the same one whatever the length: what changes from step to step lies in device memory (state.py)."""

from __future__ import annotations

from ctypes import c_float, c_int32
from typing import Any

import numpy as np

from dycoke_edge.runtime.gpu.device import CudaGraph, Device, DeviceArray, Launch
from dycoke_edge.runtime.gpu.kernels import BLOCK, suffix, warps
from dycoke_edge.runtime.gpu.records import RING, Records
from dycoke_edge.runtime.gpu.rows import NULL, DeviceRows
from dycoke_edge.runtime.gpu.state import OFFSETS, PART
from dycoke_edge.runtime.gpu.weights import Weights

ATTEND_BLOCK, MOST_PARTS = 128, 128  # of kernels/attend.cu
CHOOSE_BLOCK = 1024  # of kernels/keep.cu
PICK_BLOCKS = 64


class DecodeScratch:
    """Memory that a step works in, the same for every KV buffer of a model."""

    def __init__(self, device: Device, weights: Weights, inverse: DeviceArray) -> None:
        spec = weights.spec
        heads, groups, dim = spec.num_heads, spec.kv_heads, spec.head_dim

        def new(count: int, dtype: Any) -> DeviceArray:
            return DeviceArray.empty(device, (count,), dtype)

        self.device, self.weights, self.inverse = device, weights, inverse
        # a block for every multiprocessor, where the rows suffice: every further part has to be joined
        self.parts = min(MOST_PARTS, max(1, -(-device.multiprocessors // groups)))
        self.x, self.turn = new(spec.hidden_size, np.float32), new(dim, np.float32)
        self.qkv = new((heads + 2 * groups) * dim, np.float32)
        self.context = new(heads * dim, spec.numpy_dtype)
        self.act = new(weights.intermediate, spec.numpy_dtype)
        self.logits = new(spec.vocab_size, np.float32)
        self.part_sums = new(self.parts * heads * dim, np.float32)
        self.part_softmax = new(self.parts * heads * PART.itemsize, np.uint8)
        self.heads = new(heads * PART.itemsize, np.uint8)
        self.tickets = new(groups + 2, np.int32)
        self.best, self.best_id = new(PICK_BLOCKS, np.float32), new(PICK_BLOCKS, np.int32)
        self.cosine = new(3 * device.multiprocessors, np.float32)

    def logits_of(self, x: DeviceArray) -> Launch:
        """`logits` of a row [E] fp32 that the last layer made."""
        return self.project(x, self.weights.norm, self.weights.head, None, self.logits)

    def pick(self, state: DeviceArray, ring: DeviceArray, advance: bool) -> Launch:
        """The token of `logits` into the state, and its record."""
        found = self.logits, c_int32(self.logits.size), self.best, self.best_id, self.tickets[-1:]
        return self.device.kernel("pick", PICK_BLOCKS, BLOCK, *found, state, ring, c_int32(RING), c_int32(advance))

    def project(
        self, x: DeviceArray, gain: DeviceArray, matrix: DeviceArray, bias: DeviceArray | None, out: DeviceArray
    ) -> Launch:
        """out = matrix norm(x) + bias."""
        outputs, inputs = matrix.shape
        args = (x, gain, c_float(self.weights.rms_eps), matrix, bias or NULL, out, c_int32(inputs), c_int32(outputs))
        name, shared = f"norm_project_{suffix(matrix.dtype)}", inputs * matrix.dtype.itemsize
        return self.device.kernel(name, warps(outputs), BLOCK, *args, shared=shared)

    def add(self, vector: DeviceArray, matrix: DeviceArray) -> Launch:
        """x += matrix vector."""
        outputs, inputs = matrix.shape
        args = vector, matrix, self.x, c_int32(inputs), c_int32(outputs)
        return self.device.kernel(f"add_project_{suffix(matrix.dtype)}", warps(outputs), BLOCK, *args)

    def gate_up(self, gain: DeviceArray, matrix: DeviceArray) -> Launch:
        """act = silu(gate norm(x)) * up norm(x)."""
        inner, inputs = matrix.shape[0] // 2, matrix.shape[1]
        args = (self.x, gain, c_float(self.weights.rms_eps), matrix, self.act, c_int32(inputs), c_int32(inner))
        name, shared = f"gate_up_{suffix(matrix.dtype)}", inputs * matrix.dtype.itemsize
        return self.device.kernel(name, warps(inner), BLOCK, *args, shared=shared)


class DecodeStep:
    """A step over one KV buffer, with or without choosing what the deep layers attend to, and with or without weights
    as they are now. The buffer's rows own it: it knows their addresses and does not keep them alive."""

    def __init__(self, scratch: DecodeScratch, rows: DeviceRows, choosing: bool) -> None:
        self._scratch, self._device = scratch, scratch.device
        heads, capacity = scratch.weights.spec.num_heads, rows.capacity if choosing else 1
        self._scores = DeviceArray.empty(self._device, (heads, capacity), np.float32)
        self._attention = DeviceArray.empty(self._device, (capacity,), np.float32)
        self._lists = DeviceArray.empty(self._device, (2, capacity), np.int32)  # of tokens that enter, and that leave
        self.records = Records(self._device)
        self._first = scratch.pick(self.records.state, self.records.ring, advance=False)
        self._launches = list(self._all(rows, choosing))
        self._graph: CudaGraph | None = None

    def first(self, x: DeviceArray) -> None:
        """The token after what was prefilled, of which x [E] is the last row."""
        self._scratch.logits_of(x)()
        self._first()
        self.records.note()

    def next(self, captured: bool) -> None:
        """The token after the one in the state: in one launch, or in as many as there are kernels."""
        if captured:
            self._captured().launch()
        else:
            self._launched()
        self.records.note()

    def _launched(self) -> None:
        for launch in self._launches:
            launch()

    def _captured(self) -> CudaGraph:
        if self._graph is None:
            with self._device.capture() as graph:
                self._launched()
            self._graph = graph
        return self._graph

    def _all(self, rows: DeviceRows, choosing: bool) -> list[Launch]:
        s, weights, state = self._scratch, self._scratch.weights, self.records.state
        spec, cut = weights.spec, weights.spec.split_layer
        width, half = c_int32(spec.hidden_size), c_int32(spec.head_dim // 2)
        args = state, weights.embed, s.x, width, s.inverse, s.turn, half
        found = [s.device.kernel(f"embed_{suffix(spec.numpy_dtype)}", -(-spec.hidden_size // BLOCK), BLOCK, *args)]
        for index, layer in enumerate(weights.layers):
            watched = choosing and index == cut - 1
            found.append(s.project(s.x, layer.input_norm, layer.qkv, layer.bias, s.qkv))
            found.append(self._attend(rows, index, index >= cut, watched))
            found += self._choose(rows) if watched else []
            found += [s.add(s.context, layer.out), s.gate_up(layer.post_norm, layer.gate_up), s.add(s.act, layer.down)]
        return [*found, s.logits_of(s.x), s.pick(state, self.records.ring, advance=True)]

    def _attend(self, rows: DeviceRows, index: int, deep: bool, watched: bool) -> Launch:
        s, spec = self._scratch, self._scratch.weights.spec
        bias = NULL if rows.bias is None else rows.bias[int(deep)]
        planes = rows.slab[2 * index], rows.slab[2 * index + 1], bias
        seen = (self._scores, s.heads) if watched else (NULL, NULL)
        sizes = c_int32(spec.num_heads // spec.kv_heads), c_int32(rows.capacity), c_int32(deep)
        work = s.context, s.part_sums, s.part_softmax, s.tickets
        name, grid = f"attend_{suffix(spec.numpy_dtype)}_{spec.head_dim}", (s.parts, spec.kv_heads, 1)
        return s.device.kernel(
            name, grid, ATTEND_BLOCK, self.records.state, s.qkv, s.turn, *planes, *work, *seen, *sizes
        )

    def _choose(self, rows: DeviceRows) -> list[Launch]:
        """Weigh the visual tokens, choose if the attention turned, exchange rows."""
        s, state = self._scratch, self.records.state
        sizes = c_int32(s.weights.spec.num_heads), c_int32(rows.capacity)
        weighed = state, self._scores, s.heads, rows.slot, self._attention, s.cosine, s.tickets[-2:-1], *sizes
        lists = self._lists[0], self._lists[1]
        return [
            s.device.kernel("weigh", self._device.multiprocessors, BLOCK, *weighed),
            s.device.kernel("choose", 1, CHOOSE_BLOCK, state, self._attention, rows.slot, *lists, rows.pairs),
            rows.exchange(state[OFFSETS["swaps"] : OFFSETS["swaps"] + 4]),
        ]
