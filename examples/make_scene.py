"""Draws examples/scene.mp4: a scene of benchmarks/scenes as a camera would send it. The same frames on every run.

    python -m examples.make_scene [OUT] [--seed 513]

16 frames, two a second, enlarged to 448 x 448; of the test split, so the shipped model has not been trained on it.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import cast

import av

from benchmarks.scenes.world import draw, plan

FRAMES, RATE, LARGER = 16, 2, 4
SEED = 513


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?", default=Path(__file__).with_name("scene.mp4"))
    parser.add_argument("--seed", type=int, default=SEED)
    args = parser.parse_args()
    video = draw(plan(args.seed, "test", FRAMES)).repeat(LARGER, 1).repeat(LARGER, 2)
    options = {"crf": "20", "preset": "medium", "threads": "1"}
    with av.open(str(args.out), "w", options={"movflags": "faststart"}) as out:
        stream = cast(av.VideoStream, out.add_stream("libx264", rate=RATE, options=options))
        stream.height, stream.width, stream.pix_fmt = *video.shape[1:3], "yuv420p"
        for frame in video:
            out.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        out.mux(stream.encode(None))


if __name__ == "__main__":
    main()
