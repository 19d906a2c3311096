"""Options of the command line, read from the dataclasses of `config`."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import NoneType
from typing import Any, Literal, NoReturn, TypeVar, get_args, get_origin, get_type_hints

from dycoke_edge.config import Options, flag
from dycoke_edge.errors import DycokeEdgeError, UsageError

Group = TypeVar("Group", bound=Options)
Command = Callable[[argparse.Namespace], None]


class Help(argparse.HelpFormatter):
    """A help formatter that leaves the lines of examples as they are."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if "\n" in text:
            return "".join(indent + line for line in text.splitlines(keepends=True))
        return super()._fill_text(text, width, indent)


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, like all the others."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage."""
        raise UsageError(f"{message}; see {self.prog} --help")


def command(
    commands: Any, name: str, function: Command, help: str, examples: tuple[str, ...] = ()
) -> argparse.ArgumentParser:
    """Add a command, what runs it, and examples, which are written without `dycoke-edge`."""
    epilog = "\n  dycoke-edge ".join(("examples:", *examples)) if examples else None
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=help, description=help, epilog=epilog, formatter_class=Help
    )
    add_quiet(parser, argparse.SUPPRESS)  # else it would undo the one before the command
    parser.set_defaults(command=function)
    return parser


def add_quiet(parser: argparse.ArgumentParser, default: Any) -> None:
    """Add --quiet, which holds for every command."""
    text = "print no progress, tables or notes on stderr; errors still"
    parser.add_argument("--quiet", action="store_true", default=default, help=text)


def add_bundle(parser: argparse.ArgumentParser, **more: Any) -> None:
    """Add BUNDLE."""
    text = "a folder that `dycoke-edge export MODEL_DIR BUNDLE` made"
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help=text, **more)


def add(parser: argparse.ArgumentParser, group: type[Options], only: tuple[str, ...] = ()) -> None:
    """Add a dataclass' fields as options under a heading; the default stays in the dataclass."""
    shown = parser.add_argument_group(_title(group), _about(group))
    hints = get_type_hints(group)
    for field in dataclasses.fields(group):
        if only and field.name not in only:
            continue
        default = " ".join(map(str, field.default)) if isinstance(field.default, tuple) else field.default
        text = field.metadata["help"] + ("" if default is None or default is False else f" (default {default})")
        if hints[field.name] is bool:
            shown.add_argument(flag(field.name), action="store_true", help=text)
            continue
        short = [flag(field.name).removesuffix("-s")] if field.name.endswith("_s") else []  # --window for window_s
        kind, many = _scalar_type(hints[field.name])
        choices = field.metadata["choices"] or None
        metavar = None if choices else kind.__name__.upper()
        shown.add_argument(
            *short,
            flag(field.name),
            dest=field.name,
            type=kind,
            nargs="+" if many else None,
            default=field.default,
            choices=choices,
            metavar=metavar,
            help=text.replace("%", "%%"),
        )


def _title(group: type[Options]) -> str:
    """The name of a dataclass in words: EngineSpec -> engine."""
    return group.__name__.removesuffix("Spec").lower()


def _about(group: type[Options]) -> str:
    """The first sentence of its docstring, on one line, as plain text."""
    text = " ".join((group.__doc__ or "").split())
    return (text.partition(". ")[0].rstrip(".") + ".").replace("`", "")


def _scalar_type(hint: Any) -> tuple[type, bool]:
    """The element type of a field and whether it takes several values."""
    parts = [part for part in (get_args(hint) or (hint,)) if part is not NoneType]
    if any(get_origin(part) is tuple for part in parts):
        return get_args(parts[0])[0], True
    if get_origin(hint) is tuple:
        return parts[0], True
    named = isinstance(parts[0], str) or get_origin(parts[0]) is Literal
    return (str if named else parts[0]), False


def take(args: argparse.Namespace, group: type[Group], only: tuple[str, ...] = ()) -> Group:
    """Build a dataclass from parsed options; its checks name the option that is wrong."""
    names = only or tuple(field.name for field in dataclasses.fields(group))
    values = {name: getattr(args, name) for name in names}
    return group(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def single(values: list[str] | None, name: str) -> str | None:
    """The value of an option that may be given once."""
    if values and len(values) > 1:
        raise UsageError(f"{name} was given {len(values)} times; one is supported, e.g. {name} {values[0]}")
    return values[0] if values else None


@contextmanager
def installed(command: str, requirement: str, kind: type[DycokeEdgeError]) -> Iterator[None]:
    """Say what to install where an import fails."""
    try:
        yield
    except ImportError as error:
        raise kind(f"{command} needs {error.name or 'a package'} ({error}): pip install '{requirement}'") from None
