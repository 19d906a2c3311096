"""Builds in a child process, so that a build can be stopped, timed out and outlived, on every version of TensorRT.

TensorRT 8.6 has no way to stop a build, and some graphs make its builder run for hours; the system kills the process
that takes most memory, which is this one. The child dies with its parent.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import IO, Any

from dycoke_edge.errors import DycokeEdgeError, EngineError
from dycoke_edge.runtime.trt.compile import Job, Made, Progress, compile_graph
from dycoke_edge.runtime.trt.versions import load

DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG
CHILD = (
    "import sys, json; sys.path[:] = json.loads(sys.argv[1]); from dycoke_edge.runtime.trt.worker import main; main()"
)
POLL = 0.5  # seconds
GRACE = 5.0


def compile_apart(job: Job, time_limit: float, progress: Progress) -> Made:
    """`compile_graph` in a process of its own. EngineError if it fails, crashes, is killed or takes too long."""
    with _pipe() as (reading, writing), tempfile.TemporaryFile() as errors:
        command = [
            sys.executable,
            "-c",
            CHILD,
            json.dumps(sys.path),
            job.model_dump_json(),
            str(writing),
            str(os.getpid()),
        ]
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=errors, pass_fds=(writing,)
        )
        try:
            os.close(writing)
            return _follow(child, reading, job, time_limit, progress, errors)
        finally:
            _end(child)


def _follow(
    child: subprocess.Popen[bytes], reading: int, job: Job, time_limit: float, progress: Progress, errors: IO[bytes]
) -> Made:
    """Hear a child out."""
    deadline = time.monotonic() + time_limit
    for message in _messages(reading, deadline):
        if "share" in message:
            progress(message["what"], message["share"])
        elif "error" in message:
            raise EngineError(message["error"])
        else:
            return Made.model_validate(message["made"])
    if time.monotonic() >= deadline:
        raise EngineError(
            f"building {job.graph} took longer than {time_limit:g} s (--time-limit) and was stopped; allow more, or "
            "run without this graph's plan: --provider cuda"
        )
    raise EngineError(_died(job, child.wait(), errors))


def _messages(reading: int, deadline: float) -> Iterator[dict[str, Any]]:
    """JSON lines until the other end is closed or time is up."""
    rest = b""
    with selectors.DefaultSelector() as selector:
        selector.register(reading, selectors.EVENT_READ)
        while time.monotonic() < deadline:
            if not selector.select(min(POLL, max(deadline - time.monotonic(), 0))):
                continue
            chunk = os.read(reading, 1 << 16)
            if not chunk:
                return
            *lines, rest = (rest + chunk).split(b"\n")
            yield from map(json.loads, lines)


def _died(job: Job, code: int, errors: IO[bytes]) -> str:
    errors.seek(0)
    said = errors.read().decode(errors="replace").strip().splitlines()
    last = f": {' '.join(said[-1].split())[:200]}" if said else ""
    if code == -signal.SIGKILL:
        return (
            f"building {job.graph} was killed, most likely because memory ran out; end other programs, add swap, or "
            "use a smaller --vision-batch or --workspace"
        )
    why = f"signal {-code}" if code < 0 else f"code {code}"
    return f"TensorRT crashed while it built {job.graph} ({why}){last}; --provider cuda runs without it"


def _end(child: subprocess.Popen[bytes]) -> None:
    """TensorRT does not notice SIGTERM while it builds."""
    with contextlib.suppress(ProcessLookupError):
        child.kill()
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(GRACE)


@contextlib.contextmanager
def _pipe() -> Iterator[tuple[int, int]]:
    reading, writing = os.pipe()
    try:
        yield reading, writing
    finally:
        os.close(reading)


def main() -> None:
    """The child: job, pipe and parent are its arguments."""
    job, writing, parent = Job.model_validate_json(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    ctypes.CDLL(None).prctl(DIE_WITH_PARENT, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before it could be watched
        return

    def say(message: dict[str, Any]) -> None:
        os.write(writing, json.dumps(message).encode() + b"\n")

    try:
        made = compile_graph(load(), job, lambda what, share: say({"what": what, "share": share}))
    except DycokeEdgeError as error:
        say({"error": str(error)})
    except OSError as error:
        say({"error": f"cannot write {error.filename or job.plan}: {error.strerror or error}; free some space"})
    else:
        say({"made": made.model_dump()})
