"""`make demo`: exports the default model and asks it about a clip, without and with DyCoke.

Until a trained default model is in the repository, the default is a small one with seeded random weights and the same
architecture: the answer means nothing, everything else is real.
"""

from __future__ import annotations

import shlex
from pathlib import Path

from benchmarks import random_model
from dycoke_edge.cli import main

BUILD = Path("build")
MODEL, BUNDLE = BUILD / "default-model", BUILD / "default-bundle"
CLIP = Path("examples/clip.mp4")
SEED = 4  # one whose answers vary


def dycoke_edge(*arguments: str) -> None:
    """Show a command as a person would type it, and run it."""
    print("\n$ dycoke-edge " + shlex.join(arguments), flush=True)
    code = main(arguments)
    if code:
        raise SystemExit(code)


def demo() -> None:
    if not MODEL.exists():
        print(f"making {MODEL}: a LLaVA-OneVision of 1.1 M parameters with random weights (seed {SEED})", flush=True)
        partial = MODEL.with_name(MODEL.name + ".partial")
        random_model.make("tiny", partial, seed=SEED)
        partial.rename(MODEL)
    if not BUNDLE.exists():
        dycoke_edge("export", str(MODEL), str(BUNDLE))
    ask = ("run", str(BUNDLE), "--video", str(CLIP), "--prompt", "What happens?", "--max-new-tokens", "64")
    dycoke_edge(*ask, "--no-compression")
    dycoke_edge(*ask)


if __name__ == "__main__":
    demo()
