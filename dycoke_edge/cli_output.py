"""Everything the command line prints. Answers and JSON go to stdout; progress, tables and errors to stderr."""

from __future__ import annotations

import argparse
import io
import json
import os
import select
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from dycoke_edge.bundle import EXAMPLE, Bundle, Manifest
from dycoke_edge.errors import UsageError

if TYPE_CHECKING:
    from dycoke_edge.parity import Parity
    from dycoke_edge.runtime.camera.events import Event
    from dycoke_edge.runtime.pipeline import Piece

# paths may hold [brackets] and :colons:, which are not for rich to interpret
people = Console(stderr=True, soft_wrap=True, highlight=False, markup=False, emoji=False)


def prepare() -> None:
    """Have the standard streams take any text: one that was closed becomes a place where nothing is kept, and what an
    encoding lacks is printed as a question mark."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # closed: else the next file that is opened would be taken for it
            os.open(os.devnull, os.O_RDWR)
    sys.stdin = sys.stdin or io.TextIOWrapper(io.FileIO(0, "r"))
    sys.stdout = sys.stdout or io.TextIOWrapper(io.FileIO(1, "w"))
    sys.stderr = sys.stderr or io.TextIOWrapper(io.FileIO(2, "w"))
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "replace"), (sys.stderr, "replace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)


def help_alone(parser: argparse.ArgumentParser) -> NoReturn:
    """What a command line without a command prints; nothing was done, so that is bad use."""
    parser.print_help()
    raise SystemExit(UsageError.exit_code)


def error(text: str) -> None:
    """One line without credentials, whatever the text."""
    from dycoke_edge.runtime.camera.redact import printable, redact  # late: no side is loaded before it is used

    print("dycoke-edge: " + printable(" ".join(redact(text).split())), file=sys.stderr)


@contextmanager
def flushed() -> Iterator[None]:
    """Have what was printed written by the end, so that a failure to write is noticed here and not at exit."""
    try:
        yield
    finally:
        sys.stdout.flush()


def drop_stdout() -> None:
    """Let what stdout still holds go nowhere: Python would try to write it again at exit, and complain."""
    with suppress(io.UnsupportedOperation):  # a stdout without a file, as in tests
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def drop_unread() -> None:
    """Let what cannot be written now, because nobody reads it, go nowhere. A write that waits is tried again by Python
    after the signal in whose handler this is called, and then ends."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(io.UnsupportedOperation, OSError, ValueError):
            if not select.select([], [stream.fileno()], [], 0)[1]:
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def json_line(data: dict[str, Any]) -> None:
    """One JSON object on one line of stdout, at once."""
    print(json.dumps(data), flush=True)


@contextmanager
def progress() -> Iterator[Callable[[str, float], None]]:
    """A progress bar on stderr, only on a terminal; the function given takes what is done now and a share of 1."""
    columns = (TextColumn("{task.description:28}", markup=False), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=people, transient=True, disable=people.quiet or not people.is_terminal) as bar:
        task = bar.add_task("starting", total=1.0)
        yield lambda what, share: bar.update(task, description=what, completed=share)


def parity(found: Parity) -> None:
    """A line per checked output."""
    verdict = "ok" if found.ok else f"OUT OF TOLERANCE {found.tolerance:g}"
    people.print(
        f"{found.graph:16} {found.output:10} max abs {found.max_abs:.1e}  relative {found.relative:.1e}  "
        f"argmax {found.argmax:7.2%}  {verdict}"
    )


def random_weights(manifest: Manifest) -> None:
    """Say so when the text will mean nothing."""
    if manifest.random_seed is not None:
        people.print(f"note: this model has random weights (seed {manifest.random_seed}); its text means nothing")


def about(bundle: Bundle, provider: str) -> None:
    """What to know of a model before its text is read."""
    random_weights(bundle.manifest)
    half_precision(bundle.manifest, provider)
    knows, example = bundle.manifest.knows, bundle.path / EXAMPLE
    if knows is not None:
        where = f" about {example}" if example.is_file() else ""
        asked = ", ".join(f'"{question}"' for question in knows.questions)
        note(f"this model knows {knows.what}. Of anything else its text means nothing. Try{where}: {asked}")


def note(text: str) -> None:
    """Something that people should know."""
    people.print(f"note: {text}")


def half_precision(manifest: Manifest, provider: str) -> None:
    """Say so where fp16 saves nothing."""
    if manifest.model.dtype == "fp16" and provider == "cpu":
        people.print("note: the CPU computes in fp32 and holds fp16 weights a second time so; use --dtype fp32 here")


def repeated(finish_reason: str) -> None:
    """Say why an answer that repeats itself ends where it does."""
    if finish_reason == "repetition":
        note("the answer repeats itself and was stopped; --repeat-limit 0 lets it go on")


def echo(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """Pass pieces on, printing their text as it comes."""
    for piece in pieces:
        sys.stdout.write(piece.text)
        sys.stdout.flush()
        yield piece
    sys.stdout.write("\n")


def text(whole: str) -> None:
    """Text as it is."""
    print(whole)


def answer(text: str, whole: dict[str, Any], as_json: bool) -> None:
    """An answer that is already whole."""
    if as_json:
        json_line(whole)
    else:
        print(text)


def facts(data: dict[str, Any], as_json: bool) -> None:
    """Facts as JSON or as a table, both on stdout."""
    if as_json:
        json_line(data)
        return
    rows = list(_flat(data))
    width = max(len(key) for key, _ in rows)
    for key, value in rows:
        print(f"{key:{width}}  {_readable(key, value)}".rstrip())


def costs(stats: dict[str, Any]) -> None:
    """What compression did and what each stage cost, on stderr."""
    table = Table(title="what it took", title_justify="left", box=None)
    for name in ("stage", "result", "time"):
        table.add_column(name, justify="right" if name == "time" else "left")
    kept, came = stats["visual_tokens_kept"], stats["visual_tokens_in"]
    active = stats["mean_active_rows"]
    share = f" ({kept / came:.1%})" if came else ""
    table.add_row("video", f"{stats['frames']} frames", _ms(stats["video_latency"]))
    table.add_row("vision", f"{came} visual tokens", _ms(stats["vision_latency"]))
    table.add_row("merge", f"{kept} kept{share}", _ms(stats["merge_latency"]))
    table.add_row("prefill", f"{kept + stats['text_tokens']} tokens", _ms(stats["prefill_latency"]))
    table.add_row("first token", "after reading the video", _ms(stats["time_to_first_token"]))
    seen = f"deep layers see {active:.0f} visual rows" + (f" ({active / came:.1%})" if came else "")
    table.add_row("decode", f"{stats['new_tokens']} tokens, {seen}", _ms(stats["inter_token_latency_p50"]) + " each")
    table.add_row("keep", f"{stats['refreshes']} refreshes", _ms(stats["kv_compaction_latency"]))
    table.add_row("KV cache", f"{stats['kv_bytes'] / 2**20:.2f} MiB in use", "")
    people.print(table)
    for reason in stats["why_not"]:
        people.print(f"note: {reason}")


def save_picture(picture: Image.Image, path: Path) -> None:
    """Write a PNG whole or not at all, and say so."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        picture.save(partial, "PNG")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    people.print(f"wrote {path}")


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:.1f} ms"


def _flat(data: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in data.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        elif isinstance(value, list) and value and all(isinstance(one, dict) for one in value):
            yield from _flat({str(at): one for at, one in enumerate(value, 1)}, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _readable(key: str, value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool) and ("bytes" in key or key.startswith("memory_needed")):
        return f"{value:,} ({value / 2**20:,.1f} MiB)"
    return (
        "absent" if value is None else (" ".join(map(str, value)) or "none") if isinstance(value, list) else str(value)
    )


def event(one: Event) -> None:
    """An event of a camera for people: what was seen on stdout, how it goes on stderr."""
    from dycoke_edge.runtime.camera.redact import printable

    clock = datetime.fromtimestamp(one.time, timezone.utc).strftime("%H:%M:%S")
    reason = f" ({printable(one.reason)})" if one.reason else ""
    if one.type == "description":
        print(f"{clock} {printable(' '.join(one.text.split()))}", flush=True)
    elif one.type == "alert":
        score = "" if one.score is None else f" {one.score:.2f}"
        print(f"{clock} {one.severity} {one.rule_id} {one.phase} {one.verdict}{score}{reason}", flush=True)
    else:
        people.print(f"{clock} {one.camera} {one.state or one.type}{reason}")
