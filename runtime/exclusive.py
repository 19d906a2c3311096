"""Who may compute on a model, and who reads an answer from one of its KV buffers, when several threads want to.

A model computes for one thread at a time. A KV buffer belongs to an answer from its first piece to its last: other
threads wait that long, the thread that reads it may begin something else, which ends the answer with a UsageError.
"""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from functools import wraps
from time import monotonic
from typing import Concatenate, ParamSpec, Protocol, TypeVar

from dycoke_edge.errors import BusyError, EngineError

T = TypeVar("T")
P = ParamSpec("P")
PATIENCE_S = 10.0  # that an answer may lie half read while another thread waits
LOOK_S = 0.2  # how often who waits looks whether the reader's thread has ended


class Exclusive:
    """The lock of one model, or of what works with it. A thread may take it again while it has it. A forked child is
    refused: it has a copy of the memory, but not the threads that would do the work or release the lock."""

    def __init__(self, what: str = "this VideoLLM was loaded") -> None:
        self._lock = threading.RLock()
        self._what, self._process = what, os.getpid()

    @property
    def is_forked(self) -> bool:
        """This process is a child of the one that it belongs to."""
        return os.getpid() != self._process

    def check_process(self) -> None:
        """EngineError in a forked child."""
        if self.is_forked:
            raise EngineError(
                f"{self._what} before this process was forked, and works in the parent only; load the model in the "
                "child, or start children with multiprocessing.get_context('spawn')"
            )

    def __enter__(self) -> Exclusive:
        self.check_process()
        self._lock.acquire()
        return self

    def __exit__(self, *exception: object) -> None:
        self._lock.release()

    @contextmanager
    def unless_taken(self) -> Iterator[bool]:
        """Take the lock if no other thread has it, and say so. For what Python's garbage collector may call: it runs in
        any thread, at any moment, and must wait for nobody."""
        taken = self._lock.acquire(blocking=False)
        try:
            yield taken
        finally:
            if taken:
                self._lock.release()


class _Reader:
    """An answer, or a single call: the thread that reads it, and whether it computes or has lain since when."""

    def __init__(self) -> None:
        self.take()

    def take(self) -> None:
        self.thread = threading.current_thread()  # that of the newest piece: pools read every one in another
        self.computing = True

    def rest(self) -> None:
        self.since = monotonic()  # first: others look at it as soon as nothing is computed
        self.computing = False

    @property
    def is_ours(self) -> bool:
        """Its thread is this one, or has ended without reading on."""
        return self.thread is threading.current_thread() or not (self.computing or self.thread.is_alive())

    @property
    def is_left(self) -> bool:
        return not self.computing and monotonic() - self.since >= PATIENCE_S


class Buffer:
    """The right to use one KV buffer."""

    def __init__(self, exclusive: Exclusive) -> None:
        self._exclusive = exclusive
        # Released by whichever thread closes or collects an answer. A plain lock and a dictionary's `pop` can be used
        # by the garbage collector: neither runs Python code that it could have interrupted.
        self._free = threading.Lock()
        self._readers = dict[_Reader, bool]()  # the one that holds `_free`

    @contextmanager
    def alone(self) -> Iterator[None]:
        """For one call: compute, when no other thread reads an answer. BusyError when one lies half read."""
        reader = self._begin()
        try:
            with self._exclusive:
                yield
        finally:
            self._end(reader)

    def reading(self, pieces: Iterator[T]) -> Generator[T, None, None]:
        """For an answer: compute each piece alone, and let no other thread use the buffer until the last was read, the
        generator closed, or forgotten. BusyError with the first piece when another answer lies half read."""
        reader = self._begin()
        try:
            while True:
                reader.take()
                with self._exclusive:
                    piece = next(pieces, self)
                reader.rest()
                if isinstance(piece, Buffer):
                    return
                yield piece
        finally:
            with self._exclusive.unless_taken() as taken:
                if taken and (close := getattr(pieces, "close", None)):
                    close()
            self._end(reader)

    def _begin(self) -> _Reader:
        """Wait for whoever reads; what this thread reads itself is overtaken."""
        self._exclusive.check_process()
        collected = False
        while not (self._free.acquire(blocking=False) or self._overtake() or self._free.acquire(timeout=LOOK_S)):
            if any(reader.is_left for reader in self._readers.copy()):
                if collected:
                    raise BusyError(
                        f"another thread has read a part of an answer and asked for no more for {PATIENCE_S:g} s; read "
                        "it to its end, close() it, or ask through a CameraWatcher, which takes questions in turn",
                        PATIENCE_S,
                    )
                gc.collect()  # it may be forgotten, and only its cycle of references keep it
                collected = True
        reader = _Reader()
        self._readers[reader] = True
        return reader

    def _overtake(self) -> bool:
        """Inherit the lock from an answer of this thread, or of one that has ended."""
        return any(reader.is_ours and self._readers.pop(reader, False) for reader in self._readers.copy())

    def _end(self, reader: _Reader) -> None:
        if self._readers.pop(reader, False):  # else it was overtaken
            self._free.release()


class HasBuffer(Protocol):
    """What owns a KV buffer."""

    @property
    def buffer(self) -> Buffer: ...


Owner = TypeVar("Owner", bound=HasBuffer)


def alone(method: Callable[Concatenate[Owner, P], T]) -> Callable[Concatenate[Owner, P], T]:
    """Have a method run as `Buffer.alone` has it."""

    @wraps(method)
    def run(self: Owner, /, *arguments: P.args, **options: P.kwargs) -> T:
        with self.buffer.alone():
            return method(self, *arguments, **options)

    return run
