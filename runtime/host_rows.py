"""The rows of a KV buffer in host memory."""

from __future__ import annotations

import math
import mmap
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dycoke_edge.contract import ModelSpec
from dycoke_edge.errors import UsageError

Array = NDArray[Any]
SWAP_ROWS = 256  # row pairs exchanged at a time: bounds the scratch memory of a refresh


class HostRows:
    """K and V of every layer, [capacity, G, D] each, allocated once.

    The slab is an anonymous mapping: rows never written cost no memory, and rows given back return to the system.
    """

    def __init__(self, spec: ModelSpec, capacity: int) -> None:
        shape = (2 * spec.num_layers, capacity, spec.kv_heads, spec.head_dim)
        dtype = np.dtype(spec.numpy_dtype)
        self._memory = _anonymous(math.prod(shape) * dtype.itemsize, capacity)
        self.slab: Array = np.frombuffer(self._memory, dtype).reshape(shape)
        self._scratch = np.zeros((2, SWAP_ROWS, spec.kv_heads, spec.head_dim), dtype)

    @property
    def nbytes(self) -> int:
        """Bytes reserved."""
        return int(self.slab.nbytes)

    def plane(self, index: int, rows: slice) -> Array:
        """A view [n, G, D]."""
        return self.slab[index, rows]

    def clear(self) -> None:
        """The whole slab reads as zeros again."""
        self._memory.madvise(mmap.MADV_DONTNEED)

    def swap(self, a: NDArray[np.int64], b: NDArray[np.int64]) -> None:
        """Exchange rows in every plane."""
        for at in range(0, a.size, SWAP_ROWS):
            self._swap(a[at : at + SWAP_ROWS], b[at : at + SWAP_ROWS])

    def weigh(self, rows: slice, bias: NDArray[np.float32]) -> None:
        """Nothing: the graphs take it with their mask."""

    def weigh_there(self, rows: slice, counts: Any) -> None:
        """Counts lie on the host as well: `weigh` takes them."""
        raise AssertionError("rows of the host are weighed by arrays of the host")

    def rotate(self, rows: slice, cos: NDArray[np.float32], sin: NDArray[np.float32]) -> None:
        """Turn the K of some rows, in fp32."""
        half = cos.size
        for plane in self.slab[::2]:
            for start in range(rows.start, rows.stop, SWAP_ROWS):
                keys = plane[start : min(start + SWAP_ROWS, rows.stop)]
                a, b = keys[..., :half].astype(np.float32), keys[..., half:].astype(np.float32)
                keys[..., :half] = a * cos - b * sin
                keys[..., half:] = b * cos + a * sin

    def settle(self, slot: NDArray[np.int64]) -> None:
        """Nothing is ever decided here."""

    def _swap(self, a: NDArray[np.int64], b: NDArray[np.int64]) -> None:
        from_a, from_b = self._scratch[:, : a.size]
        for plane in self.slab:
            np.take(plane, a, axis=0, out=from_a, mode="clip")  # clip: the only mode that writes to `out` directly
            np.take(plane, b, axis=0, out=from_b, mode="clip")
            plane[a] = from_b
            plane[b] = from_a

    def give_back(self, planes: range, rows: slice) -> None:
        """Return the whole pages of these rows to the system; they read as zeros when touched again."""
        row_bytes = self.slab.strides[1]
        for plane in planes:
            first = plane * self.slab.strides[0] + rows.start * row_bytes
            start = -(-first // mmap.PAGESIZE) * mmap.PAGESIZE
            length = (first + (rows.stop - rows.start) * row_bytes - start) // mmap.PAGESIZE * mmap.PAGESIZE
            if length > 0:
                self._memory.madvise(mmap.MADV_DONTNEED, start, length)


def _anonymous(nbytes: int, capacity: int) -> mmap.mmap:
    try:
        return mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError):
        raise UsageError(
            f"kv_capacity={capacity} rows (--kv-capacity) need {nbytes / 2**30:.1f} GiB, more than this machine gives; "
            "use fewer, e.g. --kv-capacity 8192"
        ) from None
