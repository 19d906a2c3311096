"""The KV buffer: one slab, one origin, two directions.

Visual rows grow left from the origin and text rows right from it, so what a layer attends to is always one contiguous
slice that an engine binds by pointer. Order inside does not matter: RoPE is applied before rows are stored and
everything stored is in the past.

    [ free ... | parked | active visual | text: prefix, suffix, generated ... | free ]
                        ^ deep layers see from here                            ^ the next token's row
               ^ shallow layers see from here
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from dycoke_edge.contract import ModelSpec
from dycoke_edge.dycoke import Counts
from dycoke_edge.errors import KVOverflow
from dycoke_edge.runtime.host_rows import HostRows

Array = NDArray[Any]
Mask = NDArray[np.bool_]
Slots = NDArray[np.int64]


class Rows(Protocol):
    """The memory of a KV buffer: planes [capacity, G, D], K and V of every layer, wherever they lie."""

    slab: Any  # [2 * layers, capacity, G, D]; `slab[plane, start:stop]` is what an engine binds

    @property
    def nbytes(self) -> int:
        """Bytes reserved."""

    def plane(self, index: int, rows: slice) -> Any:
        """A view [n, G, D]: K of layer i is plane 2i, V is 2i + 1."""

    def clear(self) -> None:
        """All rows read as zeros."""

    def swap(self, a: Slots, b: Slots) -> None:
        """Exchange rows a[i] and b[i] in every plane; no row is named twice."""

    def weigh(self, rows: slice, bias: NDArray[np.float32]) -> None:
        """From now on `bias` [2, n] is added to the scores of these rows, until `clear`; where rows go, it goes. Row
        1 is for deep layers in a decode step, row 0 for all else."""

    def weigh_there(self, rows: slice, counts: Any) -> None:
        """The same by counts [2, n] that lie where the rows do."""

    def rotate(self, rows: slice, cos: NDArray[np.float32], sin: NDArray[np.float32]) -> None:
        """Turn the K of some rows by one angle a dimension pair, cos and sin [D/2]."""

    def give_back(self, planes: range, rows: slice) -> None:
        """These rows are not needed any more: their memory returns to the system where that is possible."""

    def settle(self, slot: Slots) -> None:
        """Bring `slot` up to date with exchanges that were decided where the rows lie."""


class KVBuffer:
    """K and V of every layer, [capacity, G, D] each, allocated once.

    Visual token v, counted from the oldest, lives in row `slot[v]`, the same row in every layer. Where the rows lie,
    in host memory or on a GPU, is the business of `rows`; what they mean is decided here.
    """

    def __init__(self, spec: ModelSpec, capacity: int, rows: Rows | None = None) -> None:
        self.spec = spec
        self.capacity = capacity
        self.rows: Rows = rows or HostRows(spec, capacity)
        self._slot = np.zeros(capacity, np.int64)
        self._parts: list[Any] = []  # counts [2, n] of tokens from the oldest on, on the host or on a GPU
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
        self.weighed = False  # visual tokens have weights: `bias` says what they add
        self._parts = []
        self.rows.clear()

    @property
    def slab(self) -> Any:
        """[2 * layers, capacity, G, D], K and V in turn."""
        return self.rows.slab

    @property
    def slot(self) -> Slots:
        """int64 [capacity]: the row of each visual token."""
        self.rows.settle(self._slot)
        return self._slot

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
        return self.rows.nbytes

    @property
    def live_nbytes(self) -> int:
        """Bytes of rows in use: parked rows count until they are given back."""
        spec, row = self.spec, self.spec.kv_bytes_per_token // self.spec.num_layers
        deep_visual = self.num_active if self.freed else self.num_visual
        shallow_rows, deep_rows = self.num_visual + self.num_text, deep_visual + self.num_text
        return row * (spec.split_layer * shallow_rows + (spec.num_layers - spec.split_layer) * deep_rows)

    def keys(self, layer: int, rows: slice) -> Array:
        """A view [n, G, D] of a layer's K."""
        view: Array = self.rows.plane(2 * layer, rows)
        return view

    def values(self, layer: int, rows: slice) -> Array:
        """A view [n, G, D] of a layer's V."""
        view: Array = self.rows.plane(2 * layer + 1, rows)
        return view

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

    @property
    def counts(self) -> Counts:
        """int64 [2, num_visual]: for how many tokens each visual token stands, as `dycoke.Covered` has them. Waits
        for a GPU that knows them alone."""
        return self._all_counts()[:, : self.num_visual] if self.weighed else np.ones((2, self.num_visual), np.int64)

    def _all_counts(self) -> Counts:
        """Those of tokens that are being computed included."""
        if len(self._parts) != 1 or not isinstance(self._parts[0], np.ndarray):
            host = [part if isinstance(part, np.ndarray) else part.numpy() for part in self._parts]
            self._parts = [np.concatenate([np.empty((2, 0), np.int64), *host], 1)]
        counts: Counts = self._parts[0]
        return counts

    def weigh(self, counts: Counts) -> None:
        """For how many tokens each visual token stands from now on: int64 [2, num_visual]. A token that stands for n
        has log(n) added to every score (arXiv 2210.09461, section 3.4)."""
        assert counts.shape[1] == self.num_visual
        self.weighed, self._parts = True, [counts]
        rows = slice(self.origin - self.num_visual, self.origin)
        self.rows.weigh(rows, self.bias(rows))

    def weigh_next(self, counts: Any) -> None:
        """The same for the tokens that `left(n)` is for: [2, n], on the host or where the rows lie."""
        assert self.weighed or not self.num_visual, "all tokens have weights or none has"
        count = counts.shape[1]
        self._place(count)
        self.weighed = True
        self._parts.append(counts)
        if isinstance(counts, np.ndarray):
            self.rows.weigh(self.left(count), np.log(np.maximum(counts, 1)).astype(np.float32))
        else:
            self.rows.weigh_there(self.left(count), counts)

    def bias(self, rows: slice) -> NDArray[np.float32]:
        """fp32 [2, n]: what is added to the scores of these rows of a weighed buffer, 0 for text; row 1 for deep layers
        in a decode step, to which a parked row counts nothing."""
        added = np.zeros((2, rows.stop - rows.start), np.float32)
        if rows.start >= self.origin:
            return added
        counts = self._all_counts()
        slot = self.slot[: counts.shape[1]]
        there = (slot >= rows.start) & (slot < rows.stop)
        added[:, slot[there] - rows.start] = np.log(np.maximum(counts[:, there], 1))
        return added

    def covering(self) -> Mask:
        """bool [num_visual]: the visual tokens that keep by coverage leaves active; all where nothing was parked."""
        mask: Mask = self.counts[1] > 0
        return mask

    def grow_left(self, count: int) -> None:
        """Count `count` visual tokens just written to `left(count)`. Every visual row becomes active."""
        assert not self.freed, "rows given back cannot become active again"
        self._place(count)
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
        self.rows.give_back(range(2 * self.spec.split_layer, 2 * self.spec.num_layers), parked)
        self.freed = True

    def evict(self, count: int) -> None:
        """Forget the `count` oldest visual tokens: swap their rows to the left end, then shrink."""
        assert not self.freed and 0 <= count <= self.num_visual
        old = np.arange(self.num_visual) < count
        self.refresh(self.active() & ~old)
        start = self.origin - self.num_visual
        self._pack(old, start, start + count)
        self.slot[: self.num_visual - count] = self.slot[count : self.num_visual].copy()
        self._forget_counts(count)
        self.num_visual -= count

    def _forget_counts(self, count: int) -> None:
        """Of the `count` oldest tokens: whole parts where they end together, so that no GPU is waited for."""
        while self._parts and count >= self._parts[0].shape[1]:
            count -= self._parts.pop(0).shape[1]
        if self._parts and count:
            self._parts = [self._all_counts()[:, count:]]

    def rotate(self, cos: NDArray[np.float64], sin: NDArray[np.float64]) -> None:
        """Turn the K of every visual row by one angle a dimension pair, cos and sin [D/2]: RoPE positions move by a
        common offset (rotate-half). Arithmetic is fp32, also for an fp16 slab, which rounds once, on storing."""
        visual = slice(self.origin - self.num_visual, self.origin)
        self.rows.rotate(visual, cos.astype(np.float32), sin.astype(np.float32))

    def _place(self, count: int) -> None:
        """Note where the next `count` visual tokens lie."""
        rows = self.left(count)
        self.slot[self.num_visual : self.num_visual + count] = np.arange(rows.start, rows.stop)

    def _pack(self, tokens: Mask, start: int, stop: int) -> int:
        """Bring the rows of `tokens`, as many as start..stop has, into start..stop by exchanging row pairs."""
        slot = self.slot[: self.num_visual]
        inside = (slot >= start) & (slot < stop)
        enter, leave = np.flatnonzero(tokens & ~inside), np.flatnonzero(~tokens & inside)
        assert enter.size == leave.size
        if enter.size:
            self.rows.swap(slot[enter], slot[leave])
        slot[enter], slot[leave] = slot[leave], slot[enter]
        return int(enter.size)
