"""`dycoke-edge --print-completion`: what a shell completes of the command line."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from dycoke_edge import cli_output as output
from dycoke_edge.cli_options import installed
from dycoke_edge.errors import UsageError

SHELLS = ("bash", "zsh", "tcsh")
FOLDERS = ("BUNDLE", "MODEL_DIR")  # the others that name a path name a file
FILES = ("CLIP", "FILE", "FILE.png", "URI")


def add_option(parser: argparse.ArgumentParser) -> None:
    """Add --print-completion."""
    text = "print a completion script, e.g. for ~/.local/share/bash-completion/completions/dycoke-edge"
    parser.add_argument("--print-completion", action=_Print, choices=SHELLS, help=text)


class _Print(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *others: Any) -> None:
        with installed("--print-completion", "dycoke-edge[completion]", UsageError):
            import shtab
        for action in _actions(parser):
            if action.metavar in FOLDERS:
                action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
            elif action.metavar in FILES:
                action.complete = shtab.FILE  # type: ignore[attr-defined]
        output.text(shtab.complete(parser, shell=str(others[1])))
        parser.exit()


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Every action of a parser and of its commands."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _actions(command)
