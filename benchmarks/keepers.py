"""Candidates for keep: which visual rows the deep layers see at a decode step. Beside `dycoke.KeepPolicy`, by the same
`step`."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.candidates import Chosen, greedy, unit
from dycoke_edge.dycoke import cosine

Array = NDArray[Any]
Mask = NDArray[np.bool_]


class Fixed:
    """A set that never changes."""

    def __init__(self, mask: Mask) -> None:
        self.mask, self.refreshed, self.refreshes = mask, True, 0

    def step(self, attention: NDArray[np.float32]) -> Mask:
        """The same set; a refresh the first time."""
        self.refreshed, self.refreshes = self.refreshes == 0, 1
        return self.mask


class Remembered:
    """The largest of an attention that is remembered over steps: `how` is the step's own, `max`, `sum`, or `half`
    (half of the places by the step's own, half by the sum). `fixed` [M] rows are always there."""

    def __init__(self, fixed: Mask, count: int, how: str, threshold: float = 0.9) -> None:
        self._fixed, self._count, self._how, self._threshold = fixed, count, how, threshold
        self._memory: NDArray[np.float32] | None = None
        self._previous: NDArray[np.float32] | None = None
        self.active, self.refreshed, self.refreshes = np.ones(len(fixed), np.bool_), False, 0

    def step(self, attention: NDArray[np.float32]) -> Mask:
        """Choose anew when the attention turned."""
        memory = attention if self._memory is None else self._memory
        self._memory = np.maximum(memory, attention) if self._how == "max" else memory + attention
        turned = self._previous is None or cosine(self._previous, attention) < self._threshold
        self._previous, before = attention.copy(), self.active
        if turned:
            self.refreshes += 1
            self.active = self._choose(attention)
        self.refreshed = not np.array_equal(before, self.active)
        return self.active

    def _choose(self, attention: NDArray[np.float32]) -> Mask:
        assert self._memory is not None
        mask, left = self._fixed.copy(), self._count - int(self._fixed.sum())
        if self._how == "half":
            mask = _add(mask, attention, left // 2)
            left = self._count - int(mask.sum())
        return _add(mask, attention if self._how == "own" else self._memory, left)


def _add(mask: Mask, worth: Array, count: int) -> Mask:
    """The `count` most worth among those that are not there yet."""
    worth = np.where(mask, -np.inf, worth)
    added: Mask = mask.copy()
    added[np.argsort(-worth, kind="stable")[:count]] = True
    return added


def even(chosen: Chosen, tokens: Array, share: float) -> Mask:
    """Rows evenly spaced in order of the video."""
    total = len(chosen.index)
    mask = np.zeros(total, np.bool_)
    count = int(total * share)
    mask[np.arange(count) * total // max(count, 1)] = True
    return mask


def nested(chosen: Chosen, tokens: Array, share: float) -> Mask:
    """Those picked first in their frames."""
    assert chosen.rank is not None
    count = int(len(chosen.index) * share)
    mask = np.zeros(len(chosen.index), np.bool_)
    mask[np.lexsort((chosen.index, chosen.rank))[:count]] = True
    return mask


def random(chosen: Chosen, tokens: Array, share: float) -> Mask:
    """Any rows."""
    total = len(chosen.index)
    mask = np.zeros(total, np.bool_)
    mask[np.random.default_rng(total).permutation(total)[: int(total * share)]] = True
    return mask


def covering(chosen: Chosen, tokens: Array, share: float) -> Mask:
    """Facility location over all rows, each weighed by what it stands for."""
    rows = unit(tokens.reshape(-1, tokens.shape[-1])[chosen.index])
    weight = np.ones(len(rows)) if chosen.counts is None else chosen.counts.astype(np.float64)
    alike, best = rows @ rows.T, np.zeros(len(rows))
    mask = np.zeros(len(rows), np.bool_)
    for _ in range(int(len(rows) * share)):
        gain = (np.maximum(alike - best[:, None], 0) * weight[:, None]).sum(0)
        gain[mask] = -1
        pick = int(np.argmax(gain))
        mask[pick] = True
        best = np.maximum(best, alike[pick])
    return mask


def framewise(chosen: Chosen, tokens: Array, share: float) -> Mask:
    """Facility location frame by frame, each row weighed by what it stands for; memory of two frames."""
    rows, frame = unit(tokens.reshape(-1, tokens.shape[-1])[chosen.index]), chosen.index // tokens.shape[1]
    mask, due = np.zeros(len(rows), np.bool_), 0.0
    for f in range(len(tokens)):
        here = np.flatnonzero(frame == f)
        due += len(here) * share
        known = rows[mask & (frame >= f - 2)]
        counts = chosen.counts
        weight = np.ones(len(here)) if counts is None else counts[here].astype(np.float64)
        taken = greedy(rows[here], known, int(due + 1e-9), weight.astype(np.float32))
        due -= len(taken)
        mask[here[taken]] = True
    return mask


def windowed(chosen: Chosen, tokens: Array, share: float) -> Mask:
    """Facility location over windows of four frames."""
    rows, window = unit(tokens.reshape(-1, tokens.shape[-1])[chosen.index]), chosen.index // (4 * tokens.shape[1])
    mask, due = np.zeros(len(rows), np.bool_), 0.0
    for w in range(int(window.max()) + 1):
        here = np.flatnonzero(window == w)
        due += len(here) * share
        counts = chosen.counts
        weight = np.ones(len(here)) if counts is None else counts[here].astype(np.float64)
        taken = greedy(rows[here], rows[:0], int(due + 1e-9), weight.astype(np.float32))
        due -= len(taken)
        mask[here[taken]] = True
    return mask


def heaviest(chosen: Chosen, tokens: Array, share: float) -> Mask:
    """Those that stand for most."""
    assert chosen.counts is not None
    mask = np.zeros(len(chosen.index), np.bool_)
    mask[np.argsort(-chosen.counts, kind="stable")[: int(len(mask) * share)]] = True
    return mask


SETS = {"even": even, "nested": nested, "random": random, "covering": covering, "heaviest": heaviest}
SETS |= {"framewise": framewise, "windowed": windowed}


def heirs(mask: Mask, chosen: Chosen, tokens: Array) -> Array:
    """Counts [M] for the deep layers: a parked row's go to the active one that is most like it."""
    rows = unit(tokens.reshape(-1, tokens.shape[-1])[chosen.index])
    counts = np.ones(len(mask), np.int64) if chosen.counts is None else chosen.counts.copy()
    active, parked = np.flatnonzero(mask), np.flatnonzero(~mask)
    to = active[(rows[parked] @ rows[active].T).argmax(1)]
    np.add.at(counts, to, counts[parked])
    return counts
