"""`make demo`: exports the model that comes with the project and asks it three questions about a clip, without and with
DyCoke; then draws which parts of the frames DyCoke kept."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path

from dycoke_edge.bundle import MANIFEST, open_bundle
from dycoke_edge.cli import main
from dycoke_edge.errors import BundleError

BUNDLE, SHEET = Path("build/tiny-bundle"), Path("build/explain.png")
WEIGHTS = Path("export/tiny/model.safetensors")
CLIP = Path("examples/scene.mp4")  # make_scene.py says what is in it
QUESTIONS = {
    "How many objects are there?": "two",
    "What came or left in the last frames?": "the yellow triangle left",
    "Which colour is the spark?": "white",  # it is there in one frame of sixteen
}


def dycoke_edge(*arguments: str) -> None:
    """Show a command as a person would type it, and run it."""
    print("\n$ dycoke-edge " + shlex.join(arguments), flush=True)
    code = main(arguments)
    if code:
        raise SystemExit(code)


def _is_of_today() -> bool:
    """The bundle can be read, and is of the model that is shipped now."""
    try:
        manifest = open_bundle(BUNDLE).path / MANIFEST
    except BundleError:
        return False
    return manifest.stat().st_mtime >= WEIGHTS.stat().st_mtime


def demo() -> None:
    if BUNDLE.exists() and not _is_of_today():
        shutil.rmtree(BUNDLE)
    if not BUNDLE.exists():
        dycoke_edge("export", "tiny", str(BUNDLE))
    for question, answer in QUESTIONS.items():
        print(f"\nIn truth: {answer}", flush=True)
        ask = ("run", str(BUNDLE), "--video", str(CLIP), "--num-frames", "16", "--prompt", question)
        dycoke_edge(*ask, "--no-compression")
        dycoke_edge(*ask, "--explain", str(SHEET))


if __name__ == "__main__":
    demo()
