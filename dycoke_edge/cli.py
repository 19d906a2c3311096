"""The command line: parses and dispatches; `cli_output` prints.

Machine output goes to stdout, people's output and progress to stderr. Exit codes: 0, 2 bad use, 3 input failed,
4 bundle or engine failed.
"""

from __future__ import annotations

import argparse
import dataclasses
import errno
import itertools
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from dycoke_edge import __version__, cli_bench, cli_build, cli_camera, cli_chat, cli_completion, cli_demo, cli_serve
from dycoke_edge import cli_output as output
from dycoke_edge.bundle import open_bundle
from dycoke_edge.cli_options import Help, Parser, add, add_bundle, add_quiet, command, installed, single, take
from dycoke_edge.config import Clip, Compression, EngineSpec, ExportSpec, Sampling
from dycoke_edge.doctor import examine
from dycoke_edge.errors import DycokeEdgeError, EngineError, UsageError
from dycoke_edge.memory import describe

DESCRIPTION = (
    "Video language models on the device, with DyCoke. A BUNDLE is a folder that `export` makes of a model on a "
    "workstation, and all that the other commands need."
)
EXAMPLES = """examples:
  dycoke-edge demo
  dycoke-edge export MODEL_DIR BUNDLE
  dycoke-edge run BUNDLE --video clip.mp4 --prompt "What happens?"
  dycoke-edge watch BUNDLE rtsp://camera/stream --rule "person=Is a person in view?"
  dycoke-edge run --help"""
MERGE = ("mode", "budget", "merge_ratio")  # of Compression, what decides how many tokens enter
UNREAD_S = (2.0, 0.5)  # after a signal, when output that nobody reads is given up: first, and again
WHAT_RUNS = ("provider", "decoder", "vision")  # of EngineSpec, what verify tries


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse a command line; `command` holds the function to run."""
    return make_parser().parse_args(argv)


def make_parser() -> Parser:
    """The whole command line."""
    parser = Parser("dycoke-edge", description=DESCRIPTION, epilog=EXAMPLES, formatter_class=Help)
    parser.set_defaults(command=lambda args: output.help_alone(parser))
    parser.add_argument("--version", action="version", version=f"dycoke-edge {__version__}")
    add_quiet(parser, False)
    cli_completion.add_option(parser)
    commands = parser.add_subparsers(metavar="COMMAND", title="commands", parser_class=Parser)

    cli_demo.add_commands(commands)
    p = command(
        commands,
        "export",
        export,
        "turn a Hugging Face directory into a bundle",
        (
            "export llava-onevision-qwen2-0.5b-ov-hf bundle",
            "export MODEL_DIR BUNDLE --dtype fp16 --merge-ratio 0.5 0.7",
            "export tiny bundle    # the model that comes with the package",
        ),
    )
    text = "a directory that transformers saved or that was downloaded from the hub, or `tiny`"
    p.add_argument("model_dir", type=Path, metavar="MODEL_DIR", help=text)
    p.add_argument("bundle", type=Path, metavar="BUNDLE", help="the folder to make, which must not be there yet")
    add(p, ExportSpec)

    p = command(
        commands,
        "run",
        run,
        "ask a question about a video, an image, or nothing",
        (
            'run BUNDLE --video clip.mp4 --prompt "What happens?"',
            'run BUNDLE --video clip.mp4 --fps 2 --end 10 --prompt "What happens?" --json',
            'run BUNDLE --video clip.mp4 --prompt "What happens?" --explain kept.png',
            'run BUNDLE --image photo.jpg --prompt "Is the door open?" --max-new-tokens 8',
        ),
    )
    add_bundle(p)
    p.add_argument("--video", action="append", metavar="CLIP", help="any file FFmpeg reads, or an animated WebP or PNG")
    p.add_argument(
        "--image",
        action="append",
        metavar="FILE",
        help="a picture instead of a video; it is one frame, not cut into tiles, so small things in it are lost",
    )
    p.add_argument("--prompt", required=True, metavar="TEXT", help="the question; <video> in it places the frames")
    p.add_argument("--json", action="store_true", help="print one JSON object with the answer and its statistics")
    p.add_argument("--no-compression", action="store_true", help="run the same graphs without DyCoke")
    p.add_argument("--explain", metavar="FILE.png", help="draw the frames, kept tokens bright and dropped ones dim")
    for group in (Compression, Sampling, Clip, EngineSpec):
        add(p, group)

    p = command(
        commands,
        "inspect",
        inspect,
        "show what a bundle holds and what memory it needs",
        ("inspect BUNDLE", "inspect BUNDLE --num-frames 64 --merge-ratio 0.9 --json"),
    )
    add_bundle(p)
    p.add_argument("--json", action="store_true", help="print JSON")
    add(p, Compression, only=MERGE)
    add(p, Clip, only=("num_frames",))
    add(p, EngineSpec, only=("kv_capacity",))

    p = command(
        commands,
        "verify",
        verify,
        "hash every file of a bundle and answer one question with it",
        ("verify BUNDLE", "verify BUNDLE --provider cuda"),
    )
    add_bundle(p)
    add(p, EngineSpec, only=WHAT_RUNS)

    p = command(commands, "doctor", doctor, "show what this machine has and lacks", ("doctor", "doctor --json"))
    p.add_argument("--json", action="store_true", help="print JSON")

    cli_chat.add_commands(commands)
    cli_build.add_commands(commands)
    cli_bench.add_commands(commands)
    cli_camera.add_commands(commands)
    cli_serve.add_commands(commands)
    return parser


def _interrupted(error: BaseException | None) -> bool:
    """Ctrl-C was what came first: a library that it hit half-way may fail at its own clean-up, as torch's modes do."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    return error is not None


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit code."""
    with _signals_unwind():
        return _main(argv)


def _main(argv: Sequence[str] | None) -> int:
    try:
        output.prepare()
        with output.flushed():
            args = parse_args(argv)
            output.people.quiet = args.quiet
            args.command(args)
    except DycokeEdgeError as error:
        output.error(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        output.error("interrupted")
        return 130
    except BrokenPipeError:  # the reader of stdout went away, e.g. `| head`
        output.drop_stdout()
        return 141
    except (OSError, MemoryError) as error:
        output.drop_stdout()
        output.error(_refusal(error))
        return 4
    except Exception as error:
        if not _interrupted(error):
            raise
        output.error("interrupted")
        return 130
    return 0


@contextmanager
def _signals_unwind() -> Iterator[None]:
    """Let SIGTERM end a command as Ctrl-C does, so that half-written things are removed. Neither waits for ever for
    somebody to read the output."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, frame: object) -> NoReturn:
        signal.setitimer(signal.ITIMER_REAL, *UNREAD_S)
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + number)

    handlers: dict[int, Any] = {signal.SIGTERM: leave, signal.SIGALRM: lambda *_: output.drop_unread()}
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else somebody chose to ignore it
        handlers[signal.SIGINT] = leave
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


def _refusal(error: OSError | MemoryError) -> str:
    """What the operating system refused, outside of the places that say it better."""
    if isinstance(error, MemoryError) or error.errno == errno.ENOMEM:
        return f"out of memory ({error}); use a smaller --kv-capacity, --prefill-chunk or --num-frames"
    return f"{error.filename or 'standard output'}: {error.strerror or error}; check its path and free space"


def export(args: argparse.Namespace) -> None:
    """dycoke-edge export MODEL_DIR BUNDLE"""
    from dycoke_edge.export.shipped import check_there, named

    spec = take(args, ExportSpec)
    check_there(named(args.model_dir))  # torch takes seconds to import
    with installed("export", "dycoke-edge[export]", UsageError):
        from dycoke_edge.export.build import export as build
    with output.progress() as show:
        manifest = build(args.model_dir, args.bundle, spec, show, output.parity)
    output.random_weights(manifest)
    output.json_line({"bundle": str(args.bundle), "files": len(manifest.files), "ok": True})


def run(args: argparse.Namespace) -> None:
    """dycoke-edge run BUNDLE --video CLIP --prompt TEXT"""
    with installed("run", "dycoke-edge", EngineError):
        from dycoke_edge.runtime.explain import Seen, contact_sheet, open_shown, sheet_path
        from dycoke_edge.runtime.pipeline import VideoLLM
    compression = Compression.off() if args.no_compression else take(args, Compression)
    sampling, clip, engine = take(args, Sampling), take(args, Clip), take(args, EngineSpec)
    video, image = single(args.video, "--video"), single(args.image, "--image")
    sheet = sheet_path(args.explain) if args.explain else None
    if sheet and not (video or image):
        raise UsageError("--explain shows frames, but none were given; add --video or --image")
    llm = VideoLLM.load(args.bundle, **dataclasses.asdict(engine))
    seen = list[Seen]()
    with output.progress() as show:
        pieces = llm.stream(
            args.prompt,
            video,
            image,
            compression,
            sampling,
            clip,
            lambda stage, done, total: show(f"{stage} {done}/{total}", done / total),
            seen.append,
        )
        first = next(pieces)  # reading, encoding and prefill happen here
    output.about(llm.bundle, engine.provider)
    whole = itertools.chain([first], pieces)
    reply = llm.reply(whole if args.json else output.echo(whole))
    if args.json:
        output.json_line(reply.as_dict())
    else:
        output.costs(reply.stats.as_dict())
    output.repeated(reply.finish_reason)
    if sheet:
        shown = open_shown(video, image, clip)
        drawn = contact_sheet(
            shown, seen[0].kept, llm.kv.active(), llm.bundle.model.tokens_per_frame, args.prompt, reply.text
        )
        output.save_picture(drawn, sheet)


def inspect(args: argparse.Namespace) -> None:
    """dycoke-edge inspect BUNDLE"""
    compression = take(args, Compression, MERGE)
    num_frames = take(args, Clip, ("num_frames",)).num_frames
    capacity = take(args, EngineSpec, ("kv_capacity",)).kv_capacity
    bundle = open_bundle(args.bundle)
    facts = describe(bundle, num_frames, compression, capacity)
    with installed("inspect", "dycoke-edge", EngineError):
        from dycoke_edge.runtime.trt.plan import describe as engines
    output.facts(facts | {"engines": engines(bundle)}, args.json)


def verify(args: argparse.Namespace) -> None:
    """dycoke-edge verify BUNDLE"""
    with installed("verify", "dycoke-edge", EngineError):
        from dycoke_edge.runtime.smoke import smoke_run
        from dycoke_edge.runtime.trt.plan import verify as verify_plans
    engine, bundle = take(args, EngineSpec, WHAT_RUNS), open_bundle(args.bundle)
    names = list(bundle.manifest.files)
    with output.progress() as show:
        bundle.verify(lambda name: show(name, names.index(name) / len(names)))
        plans = verify_plans(bundle, lambda name: show(name, 1.0))
        show("answering", 1.0)
        reply, results = smoke_run(args.bundle, engine.provider, decoder=engine.decoder, vision=engine.vision)
    for result in results:
        output.parity(result)
    told = {"bundle": str(args.bundle), "files": len(names), "plans": plans, "tokens": reply.token_ids, "ok": True}
    output.json_line(told)


def doctor(args: argparse.Namespace) -> None:
    """dycoke-edge doctor"""
    facts = examine()
    if facts["can_run"]:
        from dycoke_edge.runtime.readiness import gpu_facts

        facts |= gpu_facts()
    output.facts(facts, args.json)
