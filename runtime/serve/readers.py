"""Processes that decode what strangers sent: a ceiling of memory, a deadline, and an end when nobody waits any more."""

from __future__ import annotations

import asyncio
import errno
import json
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from multiprocessing import Pipe, ProcessError
from multiprocessing.connection import Connection
from tempfile import TemporaryDirectory
from typing import Any, TypeVar, cast

import numpy as np
from anyio import CapacityLimiter
from anyio.to_thread import run_sync
from numpy.typing import NDArray

from dycoke_edge.config_serve import ServeSpec
from dycoke_edge.errors import EngineError, InputError, UsageError
from dycoke_edge.runtime.serve import fetch
from dycoke_edge.runtime.serve.child import READY
from dycoke_edge.runtime.serve.errors import ApiError, no_room

Frames = NDArray[np.uint8]
T = TypeVar("T")

START = "import sys; fd, *sys.path = sys.argv[1:]; from dycoke_edge.runtime.serve.child import main; main(int(fd))"
START_S = 60.0  # that a process may take to be ready
MOST_READS = 256  # of one process: what its libraries lose does not add up


class Reader:
    """One process, from its start to its end. `start` and `read` block; `kill` does not, and may come at any time."""

    def __init__(self, spec: ServeSpec, size: int) -> None:
        self._spec, self._size = replace(spec, api_key=None, host="127.0.0.1"), size
        self._lock = threading.Lock()  # over its birth and death, which take no time
        self._starting = threading.RLock()
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection[Any, Any] | None = None
        self._dead = False
        self.reads = 0

    def start(self) -> None:
        """Start the process, unless that is done, and wait until it is ready. EngineError if it will not be, ApiError
        507 without room for its folder."""
        with self._starting:
            try:
                if self._connection is None:
                    self._connection = self._spawn()
                    self._connection.send((self._spec, self._size, self._folder.name))
                    self._connection.recv_bytes(len(READY))
            except (EOFError, OSError):
                self.close()
                raise EngineError("the process that reads media did not start; see that memory is free") from None

    def _spawn(self) -> Connection[Any, Any]:
        with self._lock:
            if self._dead:
                raise EOFError
            self._folder = _folder()
            ours, theirs = Pipe()
            with theirs:
                command = [sys.executable, "-c", START, str(theirs.fileno()), *map(str, sys.path)]
                quiet: Any = {name: subprocess.DEVNULL for name in ("stdin", "stdout", "stderr")}
                self._process = subprocess.Popen(command, pass_fds=(theirs.fileno(),), start_new_session=True, **quiet)
            return ours

    def read(self, name: str, arguments: tuple[Any, ...], seconds: float) -> Frames:
        """What a method of Media returns, or raises, once started; ApiError 507 if it found no room. InputError if the
        process ends meanwhile; nobody but the file is to blame for that."""
        self.reads += 1
        try:
            return self._called(name, arguments, seconds)
        except (EOFError, OSError, ProcessError):
            self.close()
            raise InputError(f"{part(name)}: its decoder broke off; copy it again, or convert it with ffmpeg") from None

    def _called(self, name: str, arguments: tuple[Any, ...], seconds: float) -> Frames:
        connection = self._connection
        if connection is None:
            raise EOFError
        connection.send((name, arguments, seconds))
        facts = json.loads(connection.recv_bytes(1 << 20))
        if "shape" in facts:
            frames = np.empty(facts["shape"], np.uint8)
            if frames.nbytes > self._spec.max_frames * self._size * self._size * 3:
                raise EOFError
            connection.recv_bytes_into(frames.data.cast("B"))
            return frames
        if "memory" in facts:
            self.close()
            most = self._spec.read_memory_mb
            raise InputError(f"{part(name)}: reading it takes more than {most} MB of memory; give a smaller one")
        if "full" in facts:
            self.close()  # its folder may be gone; the next one has its own
            raise no_room(OSError(errno.ENOSPC, facts["full"]))
        if "says" in facts:
            raise (UsageError if facts["usage"] else InputError)(facts["says"])
        raise RuntimeError(facts["bug"])

    @property
    def spent(self) -> bool:
        """It is to be replaced: it ended, if only because the machine's memory ran out, or has read enough."""
        process = self._process
        return self._dead or self.reads >= MOST_READS or (process is not None and process.poll() is not None)

    def kill(self) -> None:
        """End it for good, whatever it is doing."""
        with self._lock:
            self._dead = True
            if self._process is not None:
                self._process.kill()

    def close(self) -> None:
        """End it and wait for that. While `read` runs it does this itself."""
        self.kill()
        with self._starting:
            process, self._process = self._process, None
            connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()
        if process is not None:
            process.wait()
            with suppress(OSError):
                self._folder.cleanup()


def _folder() -> TemporaryDirectory[str]:
    """A process's own: what it leaves when it is killed goes with it. ApiError 507 where there is no room."""
    try:
        return TemporaryDirectory(prefix="dycoke-")
    except OSError as error:
        raise no_room(error) from None


class Readers:
    """As many readers as `server.readers`, warm before a request comes. Belongs to one event loop."""

    def __init__(self, spec: ServeSpec, size: int) -> None:
        self._spec, self._size = spec, size
        self._idle = [Reader(spec, size) for _ in range(spec.readers)]
        self._free = asyncio.Semaphore(spec.readers)
        self._threads = CapacityLimiter(4 * spec.readers)  # those of killed ones end a moment later
        self._warming = set[asyncio.Task[None]]()
        self._closed = False

    def start(self) -> None:
        """Begin to warm all of them up."""
        for reader in self._idle:
            self._warm(reader)

    async def read(self, name: str, *arguments: Any) -> Frames:
        """What a method of Media returns, or raises, after the reads before it. InputError when it takes too long or
        too much memory. Cancelling ends the process."""
        async with self._free:
            reader, seconds = self._idle.pop(), self._seconds(name, arguments)
            reader = self._replaced(reader) if reader.spent else reader
            task: asyncio.Future[Any] = self._begun(reader.start)
            try:
                await asyncio.wait((task,), timeout=START_S)
                if not task.done():
                    raise EngineError(f"the process that reads media was not ready within {START_S:g} s")
                task.result()
                task = self._begun(partial(reader.read, name, arguments, seconds))
                await asyncio.wait((task,), timeout=seconds)
                if not task.done():
                    raise InputError(f"{part(name)}: reading it takes more than {seconds:g} s; give a smaller one")
                return cast(Frames, task.result())
            finally:
                if not task.done():
                    reader.kill()  # which ends the thread that waits for it, and that clears up
                    task.cancel()
                    self._idle.append(self._replaced())
                else:
                    self._idle.append(self._replaced(reader) if reader.spent else reader)

    async def close(self) -> None:
        """End all that are idle; one that reads ends when that is cancelled."""
        self._closed = True
        for reader in self._idle:
            await run_sync(reader.close)

    def _seconds(self, name: str, arguments: tuple[Any, ...]) -> float:
        """How long a call may take: a picture is no video, and what must be fetched comes later."""
        spec, urls = self._spec, arguments[0] if isinstance(arguments[0], list) else arguments[:1]
        fetched = any(str(url)[:8].lower().startswith(("http:", "https:")) for url in urls)
        return (spec.image_timeout_s if name == "image" else spec.video_timeout_s) + fetched * fetch.TIMEOUT_S

    def _begun(self, function: Callable[[], T]) -> asyncio.Future[T]:
        return asyncio.ensure_future(run_sync(function, abandon_on_cancel=True, limiter=self._threads))

    def _replaced(self, old: Reader | None = None) -> Reader:
        """A new one instead of `old`, which nobody uses."""
        new = Reader(self._spec, self._size)
        if not self._closed:
            self._warm(new, old)
        return new

    def _warm(self, reader: Reader, old: Reader | None = None) -> None:
        async def warm() -> None:
            if old is not None:
                await run_sync(old.close)
            with suppress(EngineError, ApiError):  # it is started again, and complained of, when it is to read
                await run_sync(reader.start)

        task = asyncio.get_running_loop().create_task(warm())
        self._warming.add(task)
        task.add_done_callback(self._warming.discard)


def part(name: str) -> str:
    """The key of a request that a method of Media reads."""
    return "video_url" if name == "video" else "image_url"
