"""`dycoke-edge chat`: a conversation in a terminal about one clip, which is encoded once."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from dycoke_edge import cli_output as output
from dycoke_edge.cli_options import add, add_bundle, command, installed, single, take
from dycoke_edge.config import Clip, Compression, EngineSpec, LiveSpec, Sampling
from dycoke_edge.errors import EngineError, UsageError

if TYPE_CHECKING:
    from dycoke_edge.runtime.conversation import Message
    from dycoke_edge.runtime.pipeline import VideoLLM
    from dycoke_edge.runtime.reply import Piece

    Ask = Callable[[list[Message]], Iterator[Piece]]

ROWS = 1024  # tokens of a conversation that are remembered; what is older is forgotten
QUIT = ("/quit", "/exit")


def add_commands(commands: Any) -> None:
    """Add the command to the command line."""
    p = command(
        commands,
        "chat",
        chat,
        "have a conversation about a video; questions are read from stdin, a line each, until /quit or its end",
        ("chat BUNDLE --video clip.mp4", "chat BUNDLE --video clip.mp4 --fps 2 < questions.txt > answers.txt"),
    )
    add_bundle(p)
    p.add_argument("--video", action="append", metavar="CLIP", help="what it is about; it is encoded once")
    p.add_argument("--no-compression", action="store_true", help="run the same graphs without DyCoke")
    for group in (Compression, Sampling, Clip, EngineSpec):
        add(p, group)


def chat(args: argparse.Namespace) -> None:
    """dycoke-edge chat BUNDLE --video CLIP"""
    with installed("chat", "dycoke-edge", EngineError):
        from dycoke_edge.runtime.pipeline import VideoLLM
    compression = Compression.off() if args.no_compression else take(args, Compression)
    sampling, clip, engine = take(args, Sampling), take(args, Clip), take(args, EngineSpec)
    video = single(args.video, "--video")
    llm = VideoLLM.load(args.bundle, **dataclasses.asdict(engine))
    ask = _about_video(llm, video, compression, sampling, clip) if video else _about_nothing(llm, compression, sampling)
    output.about(llm.bundle, engine.provider)
    _talk(ask, lambda said: len(llm.text.encode(said, "video" if video else None)[bool(video)]))


def _about_video(llm: VideoLLM, video: str, compression: Compression, sampling: Sampling, clip: Clip) -> Ask:
    """Encode a clip and hold it in memory, as a live video that came to an end."""
    with output.progress() as show:
        show("encoding", 0.0)
        tokens = llm.encode(video, clip)
        spec = LiveSpec(len(tokens), gate_threshold=0, scene_cut=-1, max_question_tokens=ROWS + 1)
        live = llm.live(compression, dataclasses.replace(spec, max_answer_tokens=sampling.max_new_tokens))
        for number, frame in enumerate(tokens):
            live.push_tokens(frame)
            show("reading", (number + 1) / len(tokens))
    count = len(tokens) * llm.bundle.model.tokens_per_frame
    output.note(f"{len(tokens)} frames, {live.num_tokens} of {count} visual tokens kept; /quit ends")
    return lambda said: live.ask(said, sampling)


def _about_nothing(llm: VideoLLM, compression: Compression, sampling: Sampling) -> Ask:
    output.note("no --video: a conversation about text; /quit ends")
    return lambda said: llm.stream(said, compression=compression, sampling=sampling)


def _talk(ask: Ask, count: Callable[[list[Message]], int]) -> None:
    """Read questions and print answers. A question that cannot be asked is one line, and forgotten."""
    from dycoke_edge.runtime.conversation import Message

    said = list[Message]()
    while (question := _read()) is not None:
        if not question:
            continue
        said.append(Message("user", question))
        try:
            while len(said) > 1 and count(said) > ROWS:
                del said[:2]  # the oldest question and its answer
            pieces = list(output.echo(ask(said)))
        except UsageError as error:
            output.error(str(error))
            said.pop()
            continue
        output.repeated(pieces[-1].finish_reason or "length")
        answer = "".join(piece.text for piece in pieces)
        if answer.strip():
            said.append(Message("assistant", answer))
        else:
            said.pop()  # an empty answer can be no part of a conversation


def _read() -> str | None:
    """The next line, asked for where a person types it; None at the end."""
    typed = sys.stdin.isatty()
    if typed:
        output.people.print("> ", end="")
    line = sys.stdin.readline()
    if typed and not line:
        output.people.print()
    return None if not line or line.strip() in QUIT else line.strip()
