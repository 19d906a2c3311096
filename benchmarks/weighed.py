"""Merge with a weight: a kept token stands for itself and for those that were dropped because they resembled it.

log(n) is added to the scores of a token that stands for n, as ToMe does for the tokens that it averages (arXiv
2210.09461, section 3.4, "proportional attention"); the graphs take it with the mask.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from dycoke_edge.dycoke import merged_layout
from dycoke_edge.runtime.engine import AnyArray
from dycoke_edge.runtime.kv import KVBuffer
from dycoke_edge.runtime.layers import GraphLayers
from dycoke_edge.runtime.step import Side

Array = NDArray[Any]


def stands_for(index: NDArray[np.int32], frames: int, per_frame: int) -> NDArray[np.int64]:
    """For how many of the F*N tokens each kept one [M] stands, by merge's flat indices in mode "paper": a token that
    was dropped is counted at its place in the anchor of its frame. They sum to F*N."""
    kept = np.zeros((frames, per_frame), np.bool_)
    kept.reshape(-1)[index] = True
    anchor, _ = merged_layout(frames, per_frame, 0)
    count = kept.astype(np.int64)
    for frame, place in np.argwhere(~kept):
        source = int(anchor[frame])
        while not kept[source, place]:
            source = int(anchor[source])
        count[source, place] += 1
    weights: NDArray[np.int64] = count.reshape(-1)[index]
    return weights


class WeighedLayers(GraphLayers):
    """The decoder graphs with `bias` [M] fp32 on the scores of a buffer's visual tokens, in the order they were
    seen."""

    bias: NDArray[np.float32] = np.zeros(0, np.float32)

    def shallow(
        self, kv: KVBuffer, embeds: AnyArray, positions: NDArray[np.integer], side: Side
    ) -> tuple[dict[str, Array], slice]:
        """As there; the mask needs to know whose rows these are."""
        self._kv, self._side = kv, side
        return super().shallow(kv, embeds, positions, side)

    def _masked(self, count: int, rows: slice) -> Array:
        mask, kv, seen = super()._masked(count, rows).copy(), self._kv, self._kv.num_visual
        columns = kv.slot[:seen] - rows.start
        visible = (columns >= 0) & (columns < mask.shape[1] - count)  # the deep layers do not see parked rows
        mask[:, columns[visible]] += self.bias[:seen][visible]
        if self._side == "left":
            mask[:, -count:] += self.bias[seen : seen + count]
        biased: Array = mask
        return biased
