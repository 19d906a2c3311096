"""Runs the command line: in this process, or in one of its own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from dycoke_edge.cli import main

ROOT = Path(__file__).parents[1]
PREFIX = "dycoke-edge: "
Argument = str | Path | int | float


@dataclass(frozen=True)
class Outcome:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def complaint(self) -> str:
        """The one line of a failed command, which is all that it printed, without its beginning."""
        assert self.out == "" and self.err.startswith(PREFIX) and self.err.endswith("\n"), self
        assert self.err.count("\n") == 1, self.err
        return self.err[len(PREFIX) : -1]


def here(capsys: pytest.CaptureFixture[str], *arguments: Argument) -> Outcome:
    """Run a command in this process."""
    capsys.readouterr()
    code = main([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    return Outcome(code, printed.out, printed.err)


def start(*arguments: Argument, stderr: int = subprocess.PIPE) -> subprocess.Popen[bytes]:
    """Run a command in a process of its own; the caller waits for it."""
    command = [sys.executable, "-m", "dycoke_edge", *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=stderr)


def apart(*arguments: Argument) -> Outcome:
    """Run a command in a process of its own."""
    process = start(*arguments)
    out, err = process.communicate(timeout=120)
    return Outcome(process.returncode, out.decode(), err.decode())


def python(code: str, *arguments: Argument) -> Outcome:
    """Run Python code in a process of its own."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    return Outcome(done.returncode, done.stdout, done.stderr)


def files(folder: Path) -> dict[str, int]:
    """Every file and folder below one and its size, for comparing before and after."""
    found = sorted(folder.rglob("*"))
    return {str(path.relative_to(folder)): path.stat().st_size if path.is_file() else -1 for path in found}


def wait_until(process: subprocess.Popen[bytes], happened: Callable[[], bool]) -> None:
    """Wait for something that a running process does."""
    while not happened():
        try:
            process.wait(0.01)
        except subprocess.TimeoutExpired:
            continue
        raise AssertionError(process.communicate())
