"""`dycoke-edge demo`: an answer straight after the installation, from a bundle that comes with the package."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import Any

from dycoke_edge import cli_output as output
from dycoke_edge.bundle import EXAMPLE, open_bundle
from dycoke_edge.cli_options import command, installed
from dycoke_edge.errors import BundleError, EngineError

# In a checkout a link to what `make demo` makes; in a wheel a folder, which `make wheel` puts there.
SHIPPED = Path(__file__).with_name("shipped")


def add_commands(commands: Any) -> None:
    """Add the command to the command line."""
    command(commands, "demo", demo, "ask the small model that comes with the package about its clip", ("demo",))


def demo(args: argparse.Namespace) -> None:
    """dycoke-edge demo"""
    with installed("demo", "dycoke-edge", EngineError):
        from dycoke_edge.runtime.pipeline import VideoLLM
    if not SHIPPED.exists():
        raise BundleError(
            "this installation came without the demo's bundle; in a checkout `make demo` makes it, and where "
            "dycoke-edge[export] is installed: dycoke-edge export tiny BUNDLE"
        )
    bundle = open_bundle(SHIPPED)
    knows, clip = bundle.manifest.knows, SHIPPED / EXAMPLE
    assert knows is not None, "what is shipped says what it knows"
    output.note(f"this model knows {knows.what}, and nothing else; {clip} is one of them")
    llm = VideoLLM.load(SHIPPED)
    for question in knows.questions:
        reply = llm.generate(question, clip)
        stats = reply.stats
        output.text(f"{question} {reply.text}")
        output.note(
            f"from {stats.visual_tokens_kept} of {stats.visual_tokens_in} visual tokens, first token after "
            f"{stats.video_latency + stats.time_to_first_token:.1f} s"
        )
    again = ("run", str(SHIPPED), "--video", str(clip), "--prompt", knows.questions[0])
    output.note(f"the same by hand: dycoke-edge {shlex.join(again)}")
