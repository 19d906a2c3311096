"""The frames of a live video that the next one is compared with: those of its window."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dycoke_edge.config import LiveSpec, MergeMode
from dycoke_edge.dycoke import PAIR, WINDOW, anchors, cosine
from dycoke_edge.runtime.engine import AnyArray

ANCHOR = {frame: anchor for anchor, frame in anchors(WINDOW)}  # of a frame's place in its window


@dataclass(frozen=True)
class Compared:
    """A frame: its tokens [N, E], what was kept of them [m, E], and which token in memory, counted from the oldest,
    stands for each: int64 [N], or [0] where no later frame adds to it."""

    tokens: AnyArray
    kept: AnyArray
    numbers: NDArray[np.int64]


class Window:
    """A merge window of the paper, or a pair of coverage. Never longer than the memory, because merge needs the
    frame that another one is compared with."""

    def __init__(self, spec: LiveSpec, mode: MergeMode) -> None:
        self._length = min(PAIR if mode == "coverage" else WINDOW, spec.memory_frames)
        self._scene_cut = spec.scene_cut
        self._frames = list[Compared]()

    def __len__(self) -> int:
        return len(self._frames)

    @property
    def nbytes(self) -> int:
        """Bytes of tokens."""
        return sum(frame.tokens.nbytes for frame in self._frames)

    def compare(self, tokens: AnyArray) -> tuple[Compared | None, float | None, bool]:
        """What a frame [N, E] is merged against, how similar it is, and whether it is a scene cut. Begins a window when
        due."""
        if len(self) >= self._length:
            self.clear()
        if not self._frames:
            return None, None, False
        anchor = self._frames[ANCHOR[len(self)]]
        similarity = float(cosine(np.asarray(anchor.tokens), np.asarray(tokens)).mean())  # a few 100 KB off a GPU
        cut = self._scene_cut is not None and similarity < self._scene_cut
        if cut:
            self.clear()
        return None if cut else anchor, similarity, cut

    def append(self, frame: Compared) -> None:
        """It came next."""
        self._frames.append(frame)

    def evicted(self, count: int) -> None:
        """Memory has forgotten its `count` oldest tokens."""
        for frame in self._frames:
            frame.numbers[...] -= count

    def clear(self) -> None:
        """The next frame begins a window."""
        self._frames.clear()
