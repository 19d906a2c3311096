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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import NoneType
from typing import Any, NoReturn, TypeVar, get_args, get_origin, get_type_hints

from dycoke_edge import __version__
from dycoke_edge import cli_output as output
from dycoke_edge.bundle import open_bundle
from dycoke_edge.config import Clip, Compression, EngineSpec, ExportSpec, Options, Sampling, flag
from dycoke_edge.doctor import examine
from dycoke_edge.errors import DycokeEdgeError, EngineError, UsageError
from dycoke_edge.memory import describe

Group = TypeVar("Group", bound=Options)
Command = Callable[[argparse.Namespace], None]


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, like all the others."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage."""
        raise UsageError(f"{message}; see {self.prog} --help")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse a command line; `command` holds the function to run."""
    parser = Parser("dycoke-edge", description="Video language models on the device, with DyCoke.")
    parser.add_argument("--version", action="version", version=f"dycoke-edge {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=Parser)

    p = _command(commands, "export", export, "turn a Hugging Face directory into a bundle")
    p.add_argument("model_dir", type=Path, metavar="MODEL_DIR")
    p.add_argument("bundle", type=Path, metavar="BUNDLE")
    _add(p, ExportSpec)

    p = _command(commands, "run", run, "ask a question about a video, an image, or nothing")
    p.add_argument("bundle", type=Path, metavar="BUNDLE")
    p.add_argument("--video", action="append", metavar="CLIP", help="any file FFmpeg reads")
    p.add_argument("--image", action="append", metavar="FILE", help="a picture instead of a video")
    p.add_argument("--prompt", required=True, metavar="TEXT", help="the question; <video> in it places the frames")
    p.add_argument("--json", action="store_true", help="print one JSON object with the answer and its statistics")
    p.add_argument("--no-compression", action="store_true", help="run the same graphs without DyCoke")
    for group in (Compression, Sampling, Clip, EngineSpec):
        _add(p, group)

    p = _command(commands, "inspect", inspect, "show what a bundle holds and what memory it needs")
    p.add_argument("bundle", type=Path, metavar="BUNDLE")
    p.add_argument("--json", action="store_true", help="print JSON")
    _add(p, Compression, only=("merge_ratio",))
    _add(p, Clip, only=("num_frames",))
    _add(p, EngineSpec, only=("kv_capacity",))

    p = _command(commands, "verify", verify, "hash every file of a bundle and answer one question with it")
    p.add_argument("bundle", type=Path, metavar="BUNDLE")

    p = _command(commands, "doctor", doctor, "show what this machine has and lacks")
    p.add_argument("--json", action="store_true", help="print JSON")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit code."""
    try:
        with _sigterm_unwinds(), output.flushed():
            args = parse_args(argv)
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
    return 0


@contextmanager
def _sigterm_unwinds() -> Iterator[None]:
    """Let SIGTERM end a command as Ctrl-C does, so that half-written things are removed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, frame: object) -> NoReturn:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _refusal(error: OSError | MemoryError) -> str:
    """What the operating system refused, outside of the places that say it better."""
    if isinstance(error, MemoryError) or error.errno == errno.ENOMEM:
        return f"out of memory ({error}); use a smaller --kv-capacity, --prefill-chunk or --num-frames"
    return f"{error.filename or 'standard output'}: {error.strerror or error}; check its path and free space"


@contextmanager
def _installed(command: str, requirement: str, kind: type[DycokeEdgeError]) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise kind(f"{command} needs {error.name or 'a package'} ({error}): pip install '{requirement}'") from None


def export(args: argparse.Namespace) -> None:
    """dycoke-edge export MODEL_DIR BUNDLE"""
    spec = _take(args, ExportSpec)
    with _installed("export", "dycoke-edge[export]", UsageError):
        from dycoke_edge.export.build import export as build
    with output.progress() as show:
        manifest = build(args.model_dir, args.bundle, spec, show, output.parity)
    output.random_weights(manifest)
    output.json_line({"bundle": str(args.bundle), "files": len(manifest.files), "ok": True})


def run(args: argparse.Namespace) -> None:
    """dycoke-edge run BUNDLE --video CLIP --prompt TEXT"""
    with _installed("run", "dycoke-edge", EngineError):
        from dycoke_edge.runtime.pipeline import VideoLLM
    compression = Compression.off() if args.no_compression else _take(args, Compression)
    sampling, clip, engine = _take(args, Sampling), _take(args, Clip), _take(args, EngineSpec)
    video, image = _single(args.video, "--video"), _single(args.image, "--image")
    llm = VideoLLM.load(args.bundle, **dataclasses.asdict(engine))
    with output.progress() as show:
        pieces = llm.stream(
            args.prompt,
            video,
            image,
            compression,
            sampling,
            clip,
            lambda stage, done, total: show(f"{stage} {done}/{total}", done / total),
        )
        first = next(pieces)  # reading, encoding and prefill happen here
    output.random_weights(llm.bundle.manifest)
    output.half_precision(llm.bundle.manifest, engine.provider)
    whole = itertools.chain([first], pieces)
    reply = llm.reply(whole if args.json else output.echo(whole), sampling)
    if args.json:
        output.json_line(reply.as_dict())
    else:
        output.costs(reply.stats.as_dict())


def inspect(args: argparse.Namespace) -> None:
    """dycoke-edge inspect BUNDLE"""
    merge_ratio = _take(args, Compression, ("merge_ratio",)).merge_ratio
    num_frames = _take(args, Clip, ("num_frames",)).num_frames
    capacity = _take(args, EngineSpec, ("kv_capacity",)).kv_capacity
    facts = describe(open_bundle(args.bundle), num_frames, merge_ratio, capacity)
    output.facts(facts, args.json)


def verify(args: argparse.Namespace) -> None:
    """dycoke-edge verify BUNDLE"""
    with _installed("verify", "dycoke-edge", EngineError):
        from dycoke_edge.runtime.smoke import smoke_run
    bundle = open_bundle(args.bundle)
    names = list(bundle.manifest.files)
    with output.progress() as show:
        bundle.verify(lambda name: show(name, names.index(name) / len(names)))
        show("answering", 1.0)
        reply = smoke_run(args.bundle)
    output.json_line({"bundle": str(args.bundle), "files": len(names), "tokens": reply.token_ids, "ok": True})


def doctor(args: argparse.Namespace) -> None:
    """dycoke-edge doctor"""
    output.facts(examine(), args.json)


def _command(commands: Any, name: str, function: Command, help: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=help, description=help)
    parser.set_defaults(command=function)
    return parser


def _add(parser: argparse.ArgumentParser, group: type[Options], only: tuple[str, ...] = ()) -> None:
    """Add a dataclass' fields as options; the default stays in the dataclass."""
    hints = get_type_hints(group)
    for field in dataclasses.fields(group):
        if only and field.name not in only:
            continue
        shown = " ".join(map(str, field.default)) if isinstance(field.default, tuple) else field.default
        text = field.metadata["help"] + ("" if shown is None or shown is False else f" (default {shown})")
        if hints[field.name] is bool:
            parser.add_argument(flag(field.name), action="store_true", help=text)
            continue
        kind, many = _scalar_type(hints[field.name])
        choices = field.metadata["choices"] or None
        metavar = None if choices else kind.__name__.upper()
        parser.add_argument(
            flag(field.name),
            type=kind,
            nargs="+" if many else None,
            default=field.default,
            choices=choices,
            metavar=metavar,
            help=text.replace("%", "%%"),
        )


def _scalar_type(hint: Any) -> tuple[type, bool]:
    """The element type of a field and whether it takes several values."""
    parts = [part for part in (get_args(hint) or (hint,)) if part is not NoneType]
    if any(get_origin(part) is tuple for part in parts):
        return get_args(parts[0])[0], True
    if get_origin(hint) is tuple:
        return parts[0], True
    return (str if isinstance(parts[0], str) else parts[0]), False


def _take(args: argparse.Namespace, group: type[Group], only: tuple[str, ...] = ()) -> Group:
    """Build a dataclass from parsed options; its checks name the option that is wrong."""
    names = only or tuple(field.name for field in dataclasses.fields(group))
    values = {name: getattr(args, name) for name in names}
    return group(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def _single(values: list[str] | None, name: str) -> str | None:
    if values and len(values) > 1:
        raise UsageError(f"{name} was given {len(values)} times; one is supported, e.g. {name} {values[0]}")
    return values[0] if values else None
