"""A side in a process of its own: its memory is its own, and what kills it kills nothing else.

The driver writes a command a line; each is answered by one JSON line. `import` reads the side's code, which sides do
together; `load` makes the contestant, `round` measures vision alone and then one answer, `profile` says where the time
goes. An error is answered too, and ends the process.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import traceback
from dataclasses import asdict
from time import monotonic
from typing import Any

from benchmarks.environment import status_bytes
from benchmarks.rivals.contestant import Contestant, Job, side_of, stopwatch

Line = dict[str, Any]


class Lost(Exception):
    """A worker ended or did not answer in time."""


class Worker:
    """A running side, seen from the driver."""

    def __init__(self, job: Job) -> None:
        self.job = job
        command = [sys.executable, "-m", "benchmarks.rivals.worker", json.dumps(asdict(job))]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._rest = b""

    def ask(self, command: str, limit: float) -> Line:
        """The answer to a command; Lost if there is none within `limit` seconds, or an error."""
        self.tell(command)
        return self.hear(limit)

    def tell(self, command: str) -> None:
        """Give a command whose answer is heard later."""
        assert self._process.stdin
        try:
            self._process.stdin.write(command.encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise Lost(f"it ended with {self._process.wait()}") from None

    def hear(self, limit: float) -> Line:
        """The answer to what was told."""
        line = self._line(monotonic() + limit)
        if "error" in line:
            raise Lost(str(line["error"]))
        return line

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin and self._process.stdout
        self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def _line(self, deadline: float) -> Line:
        assert self._process.stdout
        pipe = self._process.stdout.fileno()
        while b"\n" not in self._rest:
            if not select.select([pipe], [], [], max(0.0, deadline - monotonic()))[0]:
                self._process.kill()
                raise Lost("no answer in time")
            part = os.read(pipe, 1 << 16)
            if not part:
                raise Lost(f"it ended with {self._process.wait()}")
            self._rest += part
        text, _, self._rest = self._rest.partition(b"\n")
        line: Line = json.loads(text)
        return line


def measured(contestant: Contestant, job: Job) -> Line:
    """One round: seconds of vision, and of an answer's tokens."""
    clock = stopwatch()
    contestant.vision()
    vision = clock()
    answer = contestant.answer(job.new_tokens)
    assert len(answer.ids) == job.new_tokens
    return {
        "vision": vision,
        **asdict(answer),
        "host_bytes": status_bytes("VmHWM"),
    }


def answer(command: str, job: Job, loaded: list[Contestant]) -> Line:
    """Do what a command says."""
    side = side_of(job.name)
    if command == "import":
        side.load()
        return {}
    if command == "load":
        loaded.append(side.load()(job, side))
        return {}
    if command == "profile":
        from benchmarks.rivals.kernels import profile

        return profile(loaded[0], job.new_tokens)
    assert command == "round"
    return measured(loaded[0], job)


def main() -> None:
    job, loaded = Job(**json.loads(sys.argv[1])), list[Contestant]()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    for line in sys.stdin:
        try:
            found = answer(line.strip(), job, loaded)
        except BaseException as error:
            traceback.print_exc()
            found = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"}
        print(json.dumps(found), file=answers, flush=True)
        if "error" in found:
            raise SystemExit(1)


if __name__ == "__main__":
    main()
