"""Whose turn it is: one thread makes every call of the model; questions first, cameras in turn after them."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from time import monotonic
from typing import Protocol

from dycoke_edge.errors import BusyError, EngineError, InputError, UsageError
from dycoke_edge.runtime.camera.clock import Clock
from dycoke_edge.runtime.reply import Piece

IDLE_S = 0.02  # how often cameras are looked after when nothing is to do
CAMERAS_SHARE = 0.5  # of the time of a question, for cameras before the next
PIECES = 1024  # pieces that may wait for whoever reads an answer


class Worker(Protocol):
    """A camera's lane."""

    def work(self) -> bool:
        """One unit of work; False if there was none."""
        ...


class Question:
    """A generator of pieces that the model thread runs for another thread, which reads them here."""

    def __init__(self, start: Callable[[], Iterator[Piece]]) -> None:
        self._start = start
        self._read: queue.Queue[Piece | BaseException | None] = queue.Queue(PIECES + 1)  # one for the end
        self.cancelled = False

    def run(self, stopping: Callable[[], bool]) -> BaseException | None:
        """In the model thread: from the first piece to the last, or until nobody wants more. Returns what it raised."""
        error: BaseException | None = None
        try:
            self._pass_on(stopping)
        except Exception as caught:  # belongs to who asked
            error = caught
        self.end(error)
        return error

    def end(self, error: BaseException | None) -> None:
        """Nothing more will come."""
        try:
            self._read.put_nowait(error)
        except queue.Full:  # a reader that far behind has been cancelled, and told so by its last piece
            self.cancelled = True

    def pieces(self, timeout: float | None = None) -> Iterator[Piece]:
        """For the other thread: pieces as they come. Raises what the model raised, and BusyError when the last has
        not come after `timeout` seconds. A reader that leaves early ends the answer."""
        end = None if timeout is None else monotonic() + timeout
        try:
            while True:
                try:
                    piece = self._read.get(timeout=end and max(0.0, end - monotonic()))
                except queue.Empty:
                    raise BusyError(
                        f"no whole answer within {timeout:g} s; the model is busy, allow it more", 1.0
                    ) from None
                if piece is None:
                    return
                if isinstance(piece, BaseException):
                    raise piece
                yield piece
        finally:
            self.cancelled = True

    def _pass_on(self, stopping: Callable[[], bool]) -> None:
        pieces = self._start()
        try:
            for piece in pieces:
                if self.cancelled:
                    return
                if stopping():
                    raise EngineError("the watcher was stopped; start it and ask again")
                if self._read.qsize() >= PIECES:
                    raise BusyError("the answer is read too slowly; read it as it comes", 1.0)
                self._read.put_nowait(piece)
        finally:
            close = getattr(pieces, "close", None)
            if close is not None:
                close()


class Turns:
    """A bounded line of questions and a ring of cameras, a unit of work each. A question goes first, but after it the
    cameras are owed half the time that it took, so that a line that never empties does not starve them."""

    def __init__(self, workers: Callable[[], Sequence[Worker]], waiting: int, clock: Clock) -> None:
        self._workers, self._most, self._clock = workers, waiting, clock
        self._line: deque[Question] = deque()
        self._changed = threading.Condition()
        self._next = 0  # whose turn it is among the cameras
        self._owed = 0.0  # seconds that the cameras have before the next question
        self._stopping = False
        self._thread: threading.Thread | None = None
        self._seconds = 1.0  # that a question takes, about
        self.busy_since: float | None = None  # the unit of work that runs now
        self.answered = self.refused = self.failed = 0
        self.on_failure: Callable[[BaseException], object] = lambda error: None

    def submit(self, question: Question) -> Question:
        """Stand in line; BusyError when it is full, EngineError when nobody will answer."""
        with self._changed:
            if self._stopping:
                raise EngineError("the watcher was stopped; start it and ask again")
            if len(self._line) >= self._most:
                self.refused += 1
                seconds = max(1.0, self._seconds * (len(self._line) + 1))
                raise BusyError(f"{len(self._line)} questions are waiting; ask again in {seconds:.0f} s", seconds)
            self._line.append(question)
            self._changed.notify_all()
        return question

    def step(self) -> bool:
        """One question or one camera's unit of work, False if nothing was to do. In the model's thread."""
        self.busy_since = began = self._clock.monotonic()
        try:
            if self._owed <= 0 and self._answer():
                self._owed = CAMERAS_SHARE * (self._clock.monotonic() - began)
                return True
            if self._work():
                self._owed -= self._clock.monotonic() - began
                return True
            self._owed = 0.0
            return self._answer()
        finally:
            self.busy_since = None

    @property
    def waiting(self) -> int:
        """Questions in line."""
        return len(self._line)

    @property
    def stopping(self) -> bool:
        """No more work is begun."""
        return self._stopping

    @property
    def alive(self) -> bool:
        """The model's thread runs."""
        return self._thread is not None and self._thread.is_alive()

    def hurry(self, again: bool) -> bool:
        """A camera's answer should be cut short: for the end, or for a question, but for that not twice in a row."""
        return self._stopping or (bool(self._line) and not again)

    def start(self) -> None:
        """Begin, in a thread of its own."""
        self._thread = threading.Thread(target=self._run, name="dycoke model", daemon=True)
        self._thread.start()

    def stop(self, timeout: float) -> None:
        """Finish the unit that runs, for at most `timeout` seconds; who waits in line gets an error."""
        with self._changed:
            self._stopping = True
            left, self._line = self._line, deque()
            self._changed.notify_all()
        for question in left:
            question.end(EngineError("the watcher was stopped; start it and ask again"))
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout)

    def _run(self) -> None:
        while not self._stopping:
            if not self.step():
                with self._changed:
                    self._changed.wait_for(lambda: self._line or self._stopping, IDLE_S)

    def _answer(self) -> bool:
        with self._changed:
            while self._line and self._line[0].cancelled:
                self._line.popleft()
            if not self._line:
                return False
            question = self._line.popleft()
        began = self._clock.monotonic()
        error = question.run(lambda: self._stopping)
        self._seconds += 0.3 * (self._clock.monotonic() - began - self._seconds)
        if error is None:
            self.answered += 1
        else:
            self.failed += 1
            if not isinstance(error, UsageError | InputError | BusyError):  # these are the asker's doing
                self.on_failure(error)
        return True

    def _work(self) -> bool:
        workers = self._workers()
        for _ in workers:
            self._next = (self._next + 1) % len(workers)
            if workers[self._next].work():
                return True
        return False
