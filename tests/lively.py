"""A tiny random model, clips and settings under which answers vary and the kept set turns.

All choices of greedy decoding are clear-cut here (top-2 logits, cosine against the threshold, last
token kept against first one parked), so any other fp32 implementation must make the same ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dycoke_edge.config import Compression

SHAPE = "tiny"
SEED = 4
SPLIT_LAYER = 3
PREFIX_IDS = [257, 84, 82, 68, 81, 220]  # "<|im_start|>user "
SUFFIX_IDS = [
    198,
    39,
    72,
    30,
    258,
    257,
    64,
    82,
    82,
    72,
    82,
    83,
    64,
    77,
    83,
    198,
]  # "\nHi?<|im_end|>...assistant\n"


def clip(frames: int, seed: int, size: int = 100) -> Tensor:
    """A moving square before a noisy still background: pixels in -1..1, [F, 3, size, size]."""
    rng = np.random.default_rng(seed)
    background = rng.uniform(-1, 1, (3, size, size))
    pixels = background + 0.05 * rng.standard_normal((frames, 3, size, size))
    for frame in range(frames):
        left = frame * 11 % (size - 30)
        pixels[frame, :, 20:50, left : left + 30] = rng.uniform(-1, 1, (3, 1, 1))
    return torch.from_numpy(pixels.clip(-1, 1).astype(np.float32))


@dataclass(frozen=True)
class Case:
    """A request whose 64-token answer refreshes, and what the reference says it does."""

    frames: int
    clip_seed: int
    compression: Compression
    refreshes: int
    returned: int

    @property
    def pixels(self) -> Tensor:
        """fp32 [F, 3, R, R]."""
        return clip(self.frames, self.clip_seed)


CASES = {
    "merge-0.7": Case(9, 3, Compression(mode="paper", refresh_threshold=0.85), refreshes=6, returned=5),
    "merge-0.7-often": Case(9, 1, Compression(mode="paper", refresh_threshold=0.85), refreshes=12, returned=11),
    "merge-0.7-long": Case(16, 0, Compression(mode="paper", refresh_threshold=0.85), refreshes=17, returned=16),
    "merge-0.5": Case(9, 3, Compression(merge_ratio=0.5, refresh_threshold=0.85), refreshes=12, returned=11),
    "positions-keep": Case(
        16, 1, Compression(mode="paper", positions="keep", refresh_threshold=0.8), refreshes=4, returned=3
    ),
    "positions-keep-often": Case(9, 1, Compression(mode="paper", positions="keep"), refreshes=57, returned=56),
    "weighed": Case(16, 0, Compression(mode="paper", refresh_threshold=0.85, weigh=True), refreshes=14, returned=13),
    "weighed-often": Case(16, 2, Compression(mode="paper", positions="keep", weigh=True), refreshes=47, returned=46),
    "coverage": Case(9, 3, Compression(budget=0.5), refreshes=0, returned=0),
    "coverage-little": Case(16, 2, Compression(budget=0.25, prune_ratio=0.25), refreshes=0, returned=0),
    "coverage-attended": Case(
        16,
        2,
        Compression(budget=0.5, prune_ratio=0.7, keep="attention", positions="reassign"),
        refreshes=34,
        returned=33,
    ),
    "official": Case(16, 1, Compression(mode="official", refresh_threshold=0.8), refreshes=9, returned=3),
    "free-parked": Case(9, 0, Compression(mode="paper", free_parked=True), refreshes=1, returned=0),
}
