"""The rows of a KV buffer in a GPU's memory."""

from __future__ import annotations

from ctypes import c_int32, c_int64, c_void_p
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dycoke_edge.contract import ModelSpec
from dycoke_edge.errors import UsageError
from dycoke_edge.runtime.gpu.device import Device, DeviceArray, Launch
from dycoke_edge.runtime.gpu.kernels import BLOCK, suffix

NULL = c_void_p(0)


class DeviceRows:
    """K and V of every layer, [capacity, G, D] each; and what a step on the GPU decides about them: which rows are
    exchanged, and so in which row each visual token lies."""

    def __init__(self, device: Device, spec: ModelSpec, capacity: int) -> None:
        shape = (2 * spec.num_layers, capacity, spec.kv_heads, spec.head_dim)
        self.device, self.capacity = device, capacity
        self.row_bytes = spec.kv_heads * spec.head_dim * np.dtype(spec.numpy_dtype).itemsize
        if self.row_bytes % 16:
            raise UsageError(f"a KV row of {self.row_bytes} bytes cannot be moved 16 at a time; use --provider cpu")
        self.slab = DeviceArray.empty(device, shape, spec.numpy_dtype)
        self.slot = DeviceArray.empty(device, (capacity,), np.int32)
        self.pairs = DeviceArray.empty(device, (capacity, 2), np.int32)
        self.swaps = DeviceArray.empty(device, (1,), np.int32)
        self._bias: DeviceArray | None = None  # fp32 [2, capacity], made when something is weighed
        self._weighed = False
        self.decided = False  # the GPU may have exchanged rows since `slot` was read
        self.visual = 0  # slots that it knows of
        self.steps: dict[tuple[bool, bool], Any] = {}  # what decodes over these rows, made once

    @property
    def nbytes(self) -> int:
        """Bytes reserved."""
        return self.slab.nbytes + (self._bias.nbytes if self._bias else 0)

    @property
    def bias(self) -> DeviceArray | None:
        """fp32 [2, capacity], what is added to the scores of each row, row 1 by deep layers in a decode step; None
        where nothing is weighed."""
        return self._bias if self._weighed else None

    def plane(self, index: int, rows: slice) -> DeviceArray:
        """A view [n, G, D]."""
        slab, (_, capacity, groups, dim) = self.slab, self.slab.shape
        assert 0 <= rows.start <= rows.stop <= capacity
        at = slab.address + (index * capacity + rows.start) * self.row_bytes
        return DeviceArray(self.device, at, (rows.stop - rows.start, groups, dim), slab.dtype, slab)

    def clear(self) -> None:
        """The whole slab reads as zeros again."""
        self.device.zero(self.slab.address, self.slab.nbytes)
        self.decided = self._weighed = False

    def swap(self, a: NDArray[np.int64], b: NDArray[np.int64]) -> None:
        """Exchange rows in every plane."""
        self.pairs[: a.size] = np.stack((a, b), 1).astype(np.int32)
        self.swaps[...] = np.array([a.size], np.int32)
        self.exchange(self.swaps)()

    def exchange(self, swaps: DeviceArray) -> Launch:
        """Exchanges as many of `pairs` as `swaps`, an int32, says: a number that only the GPU may know."""
        planes, grid = self.slab.shape[0], 8 * self.device.multiprocessors
        sizes = c_int64(self.slab.nbytes // planes), c_int32(self.row_bytes), c_int32(planes)
        moved = swaps, self.pairs, self.slab, self.bias or NULL
        return self.device.kernel("exchange", grid, BLOCK, *moved, *sizes)

    def weigh(self, rows: slice, bias: NDArray[np.float32]) -> None:
        """From now on `bias` [2, n] is added to the scores of these rows, until `clear`; 0 to those of others."""
        if self._bias is None:
            self._bias = DeviceArray.empty(self.device, (2, self.capacity), np.float32)
        elif not self._weighed:
            self.device.zero(self._bias.address, self._bias.nbytes)
        self._weighed = True
        for row in range(2):
            self._bias[row][rows] = bias[row]

    def rotate(self, rows: slice, cos: NDArray[np.float32], sin: NDArray[np.float32]) -> None:
        """Turn the K of some rows, in fp32."""
        if rows.stop <= rows.start:
            return
        planes, capacity, groups, dim = self.slab.shape
        turn = DeviceArray.of(self.device, np.stack((cos, sin)))
        grid = (rows.stop - rows.start, planes // 2, 1)
        sizes = c_int32(groups), c_int32(dim), c_int64(2 * capacity * groups * dim)
        keys = self.plane(0, rows)
        name = f"rotate_{suffix(self.slab.dtype)}"
        self.device.kernel(name, grid, BLOCK, keys, turn[0], turn[1], *sizes)()

    def give_back(self, planes: range, rows: slice) -> None:
        """They are not read any more. The slab is one allocation, of which no part returns to the system."""

    def decide(self, slot: NDArray[np.int64]) -> None:
        """The GPU takes over: slots [M] as they are now."""
        self.visual = slot.size
        if self.visual:
            self.slot[: self.visual] = slot.astype(np.int32)
        self.decided = True

    def settle(self, slot: NDArray[np.int64]) -> None:
        """Read back the slots that the GPU may have exchanged; waits."""
        if self.decided:
            self.decided = False
            slot[: self.visual] = self.slot[: self.visual].numpy()
