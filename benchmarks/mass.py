"""How likely a reply begins with yes or no, for questions that a model knows and for others: what `min_mass` is set by.

    python -m benchmarks.mass BUNDLE [--clips 24]

Clips are scenes of the test split. Known are their own yes/no questions; the others ask for what no scene holds, or are
no yes/no questions. Every question is asked with merge 0.7 and without compression. A line of JSON a group of
questions: the smallest, the 5th percentile, the median, the 95th percentile and the largest mass, and the share of
questions above a floor.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path

import numpy as np

from benchmarks.accuracy import SEED
from benchmarks.scenes import questions, world
from dycoke_edge import Compression, LiveSpec, VideoLLM

KNOWN = ("enter", "leave", "moving", "cut")
FLOORS = (0.01, 0.1, 0.5, 0.9)
OTHER = (
    "Is there a fire?",
    "Is a person in view?",
    "Is the door open?",
    "Is there smoke?",
    "Is anybody wearing a helmet?",
    "Has somebody fallen?",
    "Is a car parked in front of the gate?",
    "Do you see a dog or a cat?",
    "What happens?",
    "How many people are there?",
)


def ask(llm: VideoLLM, seed: int, compression: Compression, found: dict[str, list[float]]) -> None:
    """The mass of every question about one scene, by group; OTHER ones by themselves too."""
    scene = world.plan(seed, "test", 16)
    live = llm.live(compression, LiveSpec(memory_frames=16, gate_threshold=0))
    for frame in world.draw(scene):
        live.push(frame)
    for question in questions.ask(scene, seed):
        if question.kind in KNOWN:
            scored = live.score(question.text)
            found["known"].append(scored.mass)
            if max(scored, key=scored.__getitem__) != question.answer:
                found["known, answered wrong"].append(scored.mass)
    for text in OTHER:
        mass = live.score(text).mass
        found["other"].append(mass)
        found[text].append(mass)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, metavar="BUNDLE")
    parser.add_argument("--clips", type=int, default=24)
    args = parser.parse_args(argv)
    llm = VideoLLM.load(args.bundle)
    for name, compression in (("merge 0.7", Compression(merge_ratio=0.7)), ("off", Compression.off())):
        found = defaultdict[str, list[float]](list)
        for seed in range(SEED, SEED + args.clips):
            ask(llm, seed, compression, found)
        for group, masses in found.items():
            spread = [float(f"{value:.4g}") for value in np.percentile(masses, [0, 5, 50, 95, 100])]
            above = {str(floor): round(float(np.mean(np.array(masses) >= floor)), 4) for floor in FLOORS}
            line = {"compression": name, "questions": group, "asked": len(masses), "mass": spread, "above": above}
            print(json.dumps(line))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
