"""Draws examples/clip.mp4: what a camera on a wall might see. The same frames come out on every
run.

python examples/make_clip.py [OUT]

8 seconds at 12 frames a second, 320 x 240: a still room, a red ball that crosses from left to
right, and a blue box that enters from the right after half of the time. A little noise makes it
a camera's picture.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import cast

import av
import numpy as np
from numpy.typing import NDArray

WIDTH, HEIGHT, RATE, SECONDS = 320, 240, 12, 8
RED, BLUE = (205, 40, 35), (40, 70, 200)
Y: NDArray[np.int64]
X: NDArray[np.int64]
Y, X = np.mgrid[0:HEIGHT, 0:WIDTH]


def background() -> NDArray[np.float64]:
    """float64 [HEIGHT, WIDTH, 3]: a wall with a rough surface above a floor of planks."""
    rough = np.random.default_rng(0).normal(0, 6, (HEIGHT // 4, WIDTH // 4)).repeat(4, 0).repeat(4, 1)
    wall = np.stack([168 - Y / 8, 160 - Y / 8, 140 - Y / 8], -1)
    planks = np.where((X + Y // 3) % 40 < 2, 60, 105)
    floor = np.stack([planks * 1.1, planks * 0.8, planks * 0.55], -1)
    return np.where((Y > 170)[..., None], floor, wall) + rough[..., None]


def frame(room: NDArray[np.float64], index: int) -> NDArray[np.uint8]:
    """uint8 [HEIGHT, WIDTH, 3]: the room at frame `index` of RATE * SECONDS."""
    done = index / (RATE * SECONDS - 1)
    picture: NDArray[np.float64] = room.copy()
    picture[box(done)] = BLUE
    ball = np.hypot(X - (done * (WIDTH + 40) - 20), Y - 185)
    picture[ball < 18] = RED
    noise = np.random.default_rng(index + 1).normal(0, 2.0, picture.shape)
    return (picture + noise).clip(0, 255).astype(np.uint8)


def box(done: float) -> NDArray[np.bool_]:
    """bool [HEIGHT, WIDTH]: where the box is when the share `done` of the clip is over."""
    left = WIDTH - max(done - 0.5, 0) * 2 * 120
    return (left <= X) & (left + 60 > X) & (Y >= 90) & (Y < 150)


def main(path: Path) -> None:
    room = background()
    options = {"crf": "30", "preset": "medium", "threads": "1", "g": "24"}
    with av.open(str(path), "w", options={"movflags": "faststart"}) as out:
        stream = cast(av.VideoStream, out.add_stream("libx264", rate=RATE, options=options))
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for index in range(RATE * SECONDS):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(frame(room, index), format="rgb24")))
        out.mux(stream.encode(None))


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("clip.mp4"))
