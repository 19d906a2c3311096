"""The KV buffer: one slab, one origin, two directions.

Visual rows grow left from the origin and text rows right from it, so what a layer attends to is always one contiguous
slice that an engine binds by pointer. Order inside does not matter: RoPE is applied before rows are stored and
everything stored is in the past.

    [ free ... | parked | active visual | text: prefix, suffix, generated ... | free ]
                        ^ deep layers see from here                            ^ the next token's row
               ^ shallow layers see from here
"""

from __future__ import annotations

import math
import mmap
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dycoke_edge.contract import ModelSpec
from dycoke_edge.errors import KVOverflow, UsageError

Array = NDArray[Any]
Mask = NDArray[np.bool_]
SWAP_ROWS = 256  # row pairs exchanged at a time: bounds the scratch memory of a refresh


class KVBuffer:
    """K and V of every layer, [capacity, G, D] each, allocated once.

    Visual token v, counted from the oldest, lives in row `slot[v]`, the same row in every layer. The slab is an
    anonymous mapping: rows never written cost no memory, and rows given back return to the system.
    """

    def __init__(self, spec: ModelSpec, capacity: int) -> None:
        self.spec = spec
        self.capacity = capacity
        shape = (2 * spec.num_layers, capacity, spec.kv_heads, spec.head_dim)
        dtype = np.dtype(spec.numpy_dtype)
        self._memory = _anonymous(math.prod(shape) * dtype.itemsize, capacity)
        self.slab: Array = np.frombuffer(self._memory, dtype).reshape(shape)
        self.slot = np.zeros(capacity, np.int64)
        self._scratch = np.zeros((2, SWAP_ROWS, spec.kv_heads, spec.head_dim), dtype)
        self.reset(text_rows=0)

    def reset(self, text_rows: int) -> None:
        """Forget everything; keep `text_rows` rows right of the origin, the others left of it for visual tokens."""
        if not 0 <= text_rows <= self.capacity:
            raise KVOverflow(text_rows, self.capacity)
        self.origin = self.capacity - text_rows
        self.num_visual = 0
        self.num_active = 0
        self.num_text = 0
        self.freed = False
        self._memory.madvise(mmap.MADV_DONTNEED)  # the whole slab reads as zeros again

    @property
    def shallow(self) -> slice:
        """The rows that layers below the cut attend to."""
        return slice(self.origin - self.num_visual, self.origin + self.num_text)

    @property
    def deep(self) -> slice:
        """The rows that layers from the cut on attend to."""
        return slice(self.origin - self.num_active, self.origin + self.num_text)

    @property
    def nbytes(self) -> int:
        """Bytes reserved."""
        return int(self.slab.nbytes)

    @property
    def live_nbytes(self) -> int:
        """Bytes of rows in use: parked rows count until they are given back."""
        spec, row = self.spec, self.spec.kv_bytes_per_token // self.spec.num_layers
        deep_visual = self.num_active if self.freed else self.num_visual
        shallow_rows, deep_rows = self.num_visual + self.num_text, deep_visual + self.num_text
        return row * (spec.split_layer * shallow_rows + (spec.num_layers - spec.split_layer) * deep_rows)

    def keys(self, layer: int, rows: slice) -> Array:
        """A view [n, G, D] of a layer's K."""
        return self.slab[2 * layer, rows]

    def values(self, layer: int, rows: slice) -> Array:
        """A view [n, G, D] of a layer's V."""
        return self.slab[2 * layer + 1, rows]

    def left(self, count: int) -> slice:
        """Where the next `count` visual tokens go; KVOverflow if there is no room. Changes nothing."""
        end = self.origin - self.num_visual
        if count > end:
            raise KVOverflow(self.capacity - end + count, self.capacity)
        return slice(end - count, end)

    def right(self, count: int) -> slice:
        """Where the next `count` text tokens go; KVOverflow if there is no room. Changes nothing."""
        start = self.origin + self.num_text
        if start + count > self.capacity:
            raise KVOverflow(start + count, self.capacity)
        return slice(start, start + count)

    def grow_left(self, count: int) -> None:
        """Count `count` visual tokens just written to `left(count)`. Every visual row becomes active."""
        assert not self.freed, "rows given back cannot become active again"
        rows = self.left(count)
        self.slot[self.num_visual : self.num_visual + count] = np.arange(rows.start, rows.stop)
        self.num_visual += count
        self.num_active = self.num_visual

    def grow_right(self, count: int) -> None:
        """Count `count` text tokens just written to `right(count)`."""
        self.right(count)
        self.num_text += count

    def truncate(self, num_text: int) -> None:
        """Forget the text rows after the first `num_text`."""
        assert 0 <= num_text <= self.num_text
        self.num_text = num_text

    def active(self) -> Mask:
        """bool [num_visual], True = the deep layers attend to this visual token."""
        mask: Mask = self.slot[: self.num_visual] >= self.origin - self.num_active
        return mask

    def refresh(self, active: Mask) -> int:
        """Make exactly these visual tokens (bool [num_visual]) active; returns how many row pairs were exchanged.

        Rows that leave trade places with rows that enter, so only the difference moves and the deep slice ends where
        it did.
        """
        assert not self.freed, "rows given back cannot become active again"
        assert active.shape == (self.num_visual,)
        count = int(active.sum())
        moved = self._pack(active, self.origin - count, self.origin)
        self.num_active = count
        return moved

    def free_parked(self) -> None:
        """Give the parked rows of the deep layers back to the system: the kept set is final from here on."""
        parked = slice(self.origin - self.num_visual, self.origin - self.num_active)
        self._give_back(range(2 * self.spec.split_layer, 2 * self.spec.num_layers), parked)
        self.freed = True

    def evict(self, count: int) -> None:
        """Forget the `count` oldest visual tokens: swap their rows to the left end, then shrink."""
        assert not self.freed and 0 <= count <= self.num_visual
        old = np.arange(self.num_visual) < count
        self.refresh(self.active() & ~old)
        start = self.origin - self.num_visual
        self._pack(old, start, start + count)
        self.slot[: self.num_visual - count] = self.slot[count : self.num_visual].copy()
        self.num_visual -= count

    def rotate(self, cos: NDArray[np.float64], sin: NDArray[np.float64]) -> None:
        """Turn the K of every visual row by one angle a dimension pair, cos and sin [D/2]: RoPE positions move by a
        common offset (rotate-half). Arithmetic is fp32, also for an fp16 slab, which rounds once, on storing."""
        half, end = self.spec.head_dim // 2, self.origin
        turn = cos.astype(np.float32), sin.astype(np.float32)
        for layer in range(self.spec.num_layers):
            for start in range(self.origin - self.num_visual, end, SWAP_ROWS):
                keys = self.keys(layer, slice(start, min(start + SWAP_ROWS, end)))
                a, b = keys[..., :half].astype(np.float32), keys[..., half:].astype(np.float32)
                keys[..., :half] = a * turn[0] - b * turn[1]
                keys[..., half:] = b * turn[0] + a * turn[1]

    def _pack(self, tokens: Mask, start: int, stop: int) -> int:
        """Bring the rows of `tokens`, as many as start..stop has, into start..stop by exchanging row pairs."""
        slot = self.slot[: self.num_visual]
        inside = (slot >= start) & (slot < stop)
        enter, leave = np.flatnonzero(tokens & ~inside), np.flatnonzero(~tokens & inside)
        assert enter.size == leave.size
        for at in range(0, enter.size, SWAP_ROWS):
            pair = enter[at : at + SWAP_ROWS], leave[at : at + SWAP_ROWS]
            self._swap_rows(slot[pair[0]], slot[pair[1]])
        slot[enter], slot[leave] = slot[leave], slot[enter]
        return int(enter.size)

    def _swap_rows(self, a: NDArray[np.int64], b: NDArray[np.int64]) -> None:
        from_a, from_b = self._scratch[:, : a.size]
        for plane in self.slab:
            np.take(plane, a, axis=0, out=from_a, mode="clip")  # clip: the only mode that writes to `out` directly
            np.take(plane, b, axis=0, out=from_b, mode="clip")
            plane[a] = from_b
            plane[b] = from_a

    def _give_back(self, planes: range, rows: slice) -> None:
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
