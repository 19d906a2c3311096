"""The commands that look at cameras: watch, ask, probe."""

from __future__ import annotations

import argparse
import dataclasses
from time import monotonic
from typing import TYPE_CHECKING, Any

from dycoke_edge import cli_output as output
from dycoke_edge.cli_environment import HELP, fill
from dycoke_edge.cli_options import add, add_bundle, command, installed, single, take
from dycoke_edge.cli_screen import Screen
from dycoke_edge.config import Clip, Compression, EngineSpec, LiveSpec, Sampling
from dycoke_edge.config_camera import Camera, ReaderSpec, Rule
from dycoke_edge.errors import EngineError, StaleError, UsageError

if TYPE_CHECKING:
    from dycoke_edge.runtime.camera.answers import Answer
    from dycoke_edge.runtime.camera.events import Event
    from dycoke_edge.runtime.camera.watcher import CameraWatcher
    from dycoke_edge.runtime.pipeline import VideoLLM

CAMERA = ("fps", "window_s", "every_s", "max_new_tokens", "realtime")
RULE = ("threshold", "clear_threshold", "min_mass", "consecutive", "cooldown_s", "update_s")
READING = ("open_timeout", "read_timeout", "stall_timeout", "max_pixels", "transport", "allow_gst")
LIVE = ("gate_threshold", "scene_cut", "max_question_tokens")
URI = f"rtsp:// rtsps:// v4l2:// csi:// test:// or the path of a video file; {HELP}"


def add_commands(commands: Any) -> None:
    """Add the commands of this file to the command line."""
    p = command(
        commands,
        "watch",
        watch,
        "look at a camera or a video file window by window: JSON Lines, or text",
        (
            'watch BUNDLE clip.mp4 --ask "What happens?" --window 4 --every 2 --fps 2',
            'watch BUNDLE rtsp://camera/stream --rule "person=Is a person in view?" --json',
        ),
    )
    add_bundle(p)
    p.add_argument("uri", metavar="URI", help=URI)
    p.add_argument("--ask", action="append", metavar="TEXT", help="question that every window is asked")
    p.add_argument(
        "--rule",
        action="append",
        default=[],
        metavar="NAME=QUESTION",
        help="yes/no question that raises alerts, e.g. 'person=Is a person in view?'; may be given several times",
    )
    p.add_argument("--id", default="camera", metavar="ID", help="name of the camera in events (default camera)")
    p.add_argument("--json", action="store_true", help="print every event as one line of JSON")
    p.add_argument("--no-compression", action="store_true", help="run the same graphs without DyCoke")
    add(p, Camera, only=CAMERA)
    add(p, Rule, only=RULE)
    add(p, ReaderSpec, only=READING)
    add(p, LiveSpec, only=LIVE)
    add(p, Compression)
    add(p, EngineSpec)

    p = command(
        commands,
        "ask",
        ask,
        "answer one question about a video file, or about what a camera shows now",
        ('ask BUNDLE clip.mp4 "Is the door open?"', 'ask BUNDLE rtsp://camera/stream "Is the door open?" --window 4'),
    )
    add_bundle(p)
    p.add_argument("uri", metavar="URI", help=URI)
    p.add_argument("prompt", metavar="TEXT", help="the question")
    p.add_argument("--json", action="store_true", help="print one JSON object with the answer and its statistics")
    p.add_argument("--no-compression", action="store_true", help="run the same graphs without DyCoke")
    add(p, Camera, only=("window_s",))
    add(p, Clip, only=("num_frames", "fps"))
    add(p, ReaderSpec, only=READING)
    add(p, Compression)
    add(p, Sampling)
    add(p, EngineSpec)

    p = command(
        commands,
        "probe",
        probe,
        "open a camera or a video file and say what it sends; no model is needed",
        ("probe clip.mp4", "probe v4l2:///dev/video0 --json"),
    )
    p.add_argument("uri", metavar="URI", help=URI)
    p.add_argument("--json", action="store_true", help="print JSON")
    add(p, ReaderSpec, only=READING)


def watch(args: argparse.Namespace) -> None:
    """dycoke-edge watch BUNDLE URI --ask TEXT --rule NAME=QUESTION"""
    with installed("watch", "dycoke-edge", EngineError):
        from dycoke_edge.runtime import allocator
        from dycoke_edge.runtime.camera.post import is_lossless
        from dycoke_edge.runtime.camera.watcher import CameraWatcher
        from dycoke_edge.runtime.pipeline import VideoLLM
    rules = [_rule(text, args) for text in args.rule]
    settings = {name: getattr(args, name) for name in CAMERA}
    camera = Camera(args.id, fill(args.uri), prompt=single(args.ask, "--ask"), **settings)
    if camera.prompt is None and not rules:
        raise UsageError("nothing to look for; give --ask TEXT, or --rule 'person=Is a person in view?'")
    reading, live, compression = take(args, ReaderSpec, READING), take(args, LiveSpec, LIVE), _compression(args)
    screen = Screen(patient=is_lossless(camera))
    allocator.keep_small()
    llm = VideoLLM.load(args.bundle, **dataclasses.asdict(take(args, EngineSpec)))
    watcher = CameraWatcher(llm, [camera], rules, screen, compression, reading=reading, live=live)
    output.about(llm.bundle, args.provider)
    try:
        with watcher:
            try:
                _follow(watcher, args.id, screen, args.json)
            finally:
                screen.hurry()
    finally:
        _print(screen.take(0.0), args.json)  # also the last words of a watcher that was stopped


def ask(args: argparse.Namespace) -> None:
    """dycoke-edge ask BUNDLE URI TEXT"""
    with installed("ask", "dycoke-edge", EngineError):
        from dycoke_edge.runtime.camera.uri import parse_uri
        from dycoke_edge.runtime.pipeline import VideoLLM
    sampling, compression = take(args, Sampling), _compression(args)
    clip = take(args, Clip, ("num_frames", "fps", "max_pixels"))
    uri, engine = fill(args.uri), take(args, EngineSpec)
    address = parse_uri(uri)
    llm = VideoLLM.load(args.bundle, **dataclasses.asdict(engine))
    output.about(llm.bundle, engine.provider)
    if address.kind == "file":
        pieces = llm.stream(args.prompt, address.target, None, compression, sampling, clip)
        reply = llm.reply(pieces if args.json else output.echo(pieces))
        if args.json:
            output.json_line(reply.as_dict())
        output.repeated(reply.finish_reason)
        return
    camera = Camera("camera", uri, window_s=args.window_s, **({"fps": args.fps} if args.fps else {}))
    answer = _ask_camera(llm, camera, args.prompt, sampling, compression, take(args, ReaderSpec, READING))
    if answer.status != "ok":
        raise (StaleError if answer.status == "stale" else EngineError)(answer.reason)
    output.answer(answer.text, answer.to_dict(), args.json)


def probe(args: argparse.Namespace) -> None:
    """dycoke-edge probe URI"""
    with installed("probe", "dycoke-edge", EngineError):
        from dycoke_edge.runtime.camera.probe import probe as examine
    facts = examine(fill(args.uri), take(args, ReaderSpec, READING))
    output.facts(dataclasses.asdict(facts), args.json)


def _follow(watcher: CameraWatcher, camera: str, screen: Screen, as_json: bool) -> None:
    """Print what happens until a file ends. Trouble before the first frame ends it, later trouble does not."""
    from dycoke_edge.runtime.camera.watch import check

    told = set[str]()
    while not watcher.join(0):
        _print(screen.take(0.1), as_json)
        watcher.check_bundle()
        _say_what_is_unknown(watcher, camera, told)
        status = watcher.camera_status(camera)
        if status.frames == 0:
            check(status)
    _say_what_is_unknown(watcher, camera, told)
    check(watcher.camera_status(camera))
    if watcher.status()["failures_in_a_row"]:
        raise EngineError(f"the model failed at the end: {watcher.status()['last_failure']}")


def _say_what_is_unknown(watcher: CameraWatcher, camera: str, told: set[str]) -> None:
    """Say once of every rule that the model does not answer it: no alert can come of it."""
    for name, alert in watcher.status()["cameras"][camera]["alerts"].items():
        if name not in told and set(alert["unknown"]) & {"mass", "failed"}:
            told.add(name)
            output.note(f"rule {name} is unknown in a window: {alert['reason']}")


def _ask_camera(
    llm: VideoLLM, camera: Camera, prompt: str, sampling: Sampling, compression: Compression, reading: ReaderSpec
) -> Answer:
    """Watch for the length of a window, then ask."""
    from dycoke_edge.runtime.camera.watch import check
    from dycoke_edge.runtime.camera.watcher import CameraWatcher

    with CameraWatcher(llm, [camera], compression=compression, reading=reading) as watcher:
        full = camera.window_s - 1.5 / camera.fps
        first: float | None = None
        while not watcher.join(0.05):
            window = watcher.window(camera.id)
            if window is None:
                check(watcher.camera_status(camera.id))
                continue
            first = monotonic() if first is None else first
            if window[1] - window[0] >= full or monotonic() - first > camera.window_s:
                break
        return watcher.ask(camera.id, prompt, sampling=sampling)


def _print(events: list[Event], as_json: bool) -> None:
    for event in events:
        if as_json:
            output.json_line(event.to_dict())
        else:
            output.event(event)


def _rule(text: str, args: argparse.Namespace) -> Rule:
    """NAME=QUESTION with the options that hold for all rules."""
    name, equals, question = text.partition("=")
    if not equals:
        raise UsageError(f"--rule {text!r} has no name; use NAME=QUESTION, e.g. --rule 'person=Is a person in view?'")
    return Rule(name.strip(), question.strip(), **{key: getattr(args, key) for key in RULE})


def _compression(args: argparse.Namespace) -> Compression:
    return Compression.off() if args.no_compression else take(args, Compression)
