"""The frame gate: which frames of a camera are worth encoding. Compares pixels, before any model runs."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.uint8]
BLOCKS = 48  # blocks a side: 8 x 8 pixels of 384, a ninth of what a visual token covers
DARK = 16.0  # levels; darker blocks say nothing of how the light changed
LIGHT = 1.25  # light that changed by more than this factor, either way, is an event
SIGMAS = 6.0  # the largest of 7,000 block means of pure noise lies 4 sigma out
NOISIEST = 3.0  # noise raises the threshold to at most so many times what was asked for


class FrameGate:
    """Tells frames that repeat the last one encoded.

    The mean of every block of pixels, each colour apart, is compared with that of the last encoded frame after the
    light is made equal: one factor a colour, the median over all blocks, so that no object can pass for light. The
    frame repeats if no block differs by more than `threshold` levels of 255, or by 6 sigma of the noise in a block,
    which is measured between neighbouring pixels. What was not encoded is never the reference, so a drift adds up.
    """

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self._frame: NDArray[np.float32] | None = None
        self._blocks: NDArray[np.float32] | None = None

    def repeats(self, image: Image) -> bool:
        """Whether uint8 [R, R, 3] may be skipped. False until a frame was remembered."""
        if self._frame is None or self._blocks is None:
            return False
        blocks = block_means(image)
        light = _light(self._blocks, blocks)
        if max(light.max(), 1 / light.min()) > LIGHT:
            return False
        noise = _noise(image - self._frame * light) / _pixels_a_block(len(image))
        limit = min(max(self.threshold, SIGMAS * noise), NOISIEST * self.threshold)
        return bool(np.abs(blocks - self._blocks * light).max() <= limit)

    def remember(self, image: Image) -> None:
        """Compare what comes with uint8 [R, R, 3]: it was encoded."""
        self._frame, self._blocks = image.astype(np.float32), block_means(image)

    def forget(self) -> None:
        """Let the next frame pass whatever it shows."""
        self._frame = self._blocks = None

    @property
    def nbytes(self) -> int:
        """Bytes of the frame that others are compared with."""
        return 0 if self._frame is None or self._blocks is None else self._frame.nbytes + self._blocks.nbytes


def block_means(image: Image) -> NDArray[np.float32]:
    """uint8 [R, R, 3] -> fp32 [B, B, 3]; every pixel is in a block."""
    edges = _edges(len(image))
    sums = np.add.reduceat(np.add.reduceat(image, edges, axis=0, dtype=np.uint32), edges, axis=1)
    sizes = np.diff(np.append(edges, len(image)))
    return np.asarray(sums / (sizes[:, None, None] * sizes[None, :, None]), np.float32)


def _edges(size: int) -> NDArray[np.intp]:
    """Where blocks begin: at most 48 a side, of 4 pixels or more where there are as many."""
    count = max(1, min(BLOCKS, size // 4))
    return np.arange(count) * size // count


def _pixels_a_block(size: int) -> float:
    """The root of the number of pixels in a block: noise in its mean is smaller by that."""
    return size / len(_edges(size))


def _light(before: NDArray[np.float32], now: NDArray[np.float32]) -> NDArray[np.float32]:
    """How the light changed, one factor a colour: fp32 [3]. 1 where most of the picture is too dark to tell."""
    factor = np.ones(3, np.float32)
    for colour in range(3):
        bright = before[..., colour] >= DARK
        if bright.mean() > 0.5:
            factor[colour] = np.median(now[..., colour][bright] / before[..., colour][bright])
    return np.maximum(factor, 1e-3)


def _noise(difference: NDArray[np.float32]) -> float:
    """Sigma of the noise in the difference of two frames [R, R, 3]: between neighbours, where objects cancel out."""
    rows = difference[::4]
    return float(np.median(np.abs(rows[:, 1:] - rows[:, :-1])) / (0.6745 * np.sqrt(2.0)))
