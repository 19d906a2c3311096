"""Made-up video, the same every time, for measuring and smoke runs."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def moving_patch(frames: int, size: int, seed: int = 0) -> NDArray[np.uint8]:
    """A still textured background with sensor noise and a moving square: uint8 [F, size, size, 3]."""
    random = np.random.default_rng(seed)
    blocks = random.integers(0, 256, (-(-size // 8), -(-size // 8), 3))
    background = blocks.repeat(8, 0).repeat(8, 1)[:size, :size].astype(np.int16)
    noise = random.integers(-6, 7, (frames, *background.shape), dtype=np.int16)
    video = background + noise
    for frame in range(frames):
        left = frame * 37 % (size - size // 5)
        video[frame, size // 4 : size // 2, left : left + size // 5] = random.integers(0, 256, 3)
    return video.clip(0, 255).astype(np.uint8)
