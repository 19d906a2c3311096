"""Whose turn it is: one thread makes every call of the model; questions first, cameras in turn after them."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from time import monotonic
from typing import Protocol

from dycoke_edge.errors import BusyError, InputError, UnavailableError, UsageError
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
        try:
            self._pass_on(stopping)
        except Exception as error:  # belongs to who asked
            self.end(error)
            return error
        except BaseException as error:  # a panic of a Rust library is no Exception, and its text is for nobody
            self.end(UnavailableError(f"the model's library failed ({type(error).__name__}); ask again"))
            return error
        self.end(None)
        return None

    def end(self, error: BaseException | None) -> None:
        """Nothing more will come."""
        try:
            self._read.put_nowait(error)
        except queue.Full:  # a reader that far behind has been cancelled, and told so by its last piece
            self.cancelled = True

    def take(self, timeout: float | None) -> Piece | BaseException | None:
        """For the other thread: the next piece, how it failed, or None at the end. queue.Empty after `timeout`."""
        return self._read.get(timeout=timeout)

    def cancel(self) -> None:
        """Nobody reads any more. Wakes who waits for a piece all the same."""
        self.cancelled = True
        self.end(None)

    def pieces(self, timeout: float | None = None) -> Pieces:
        """For the other thread: pieces as they come, the last within `timeout` seconds."""
        return Pieces(self, timeout)

    def _pass_on(self, stopping: Callable[[], bool]) -> None:
        pieces = self._start()
        try:
            for piece in pieces:
                if self.cancelled:
                    return
                if stopping():
                    raise stopped()
                if self._read.qsize() >= PIECES:
                    raise BusyError("the answer is read too slowly; read it as it comes", 1.0)
                self._read.put_nowait(piece)
        finally:
            close = getattr(pieces, "close", None)
            if close is not None:
                close()


class Pieces(Iterator[Piece]):
    """The reader's end of a question. Raises what the model raised, and BusyError when the last piece has not come in
    time. A reader that leaves early ends the answer: `close` may be called from any thread, also while another waits
    for a piece, which then finds no more."""

    def __init__(self, question: Question, timeout: float | None) -> None:
        self._question, self._timeout = question, timeout
        self._end = None if timeout is None else monotonic() + timeout
        self._began = False

    def __next__(self) -> Piece:
        self._began = True
        if self._question.cancelled:
            raise StopIteration
        try:
            piece = self._question.take(None if self._end is None else max(0.0, self._end - monotonic()))
        except queue.Empty:
            self.close()
            text = f"no whole answer within {self._timeout:g} s; the model is busy, allow it more"
            raise BusyError(text, 1.0) from None
        if isinstance(piece, Piece):
            return piece
        self.close()
        if piece is None:
            raise StopIteration
        raise piece

    def close(self) -> None:
        """Read no more. Legal twice."""
        if not self._question.cancelled:
            self._question.cancel()

    def __del__(self) -> None:
        if self._began:  # as a generator does
            self.close()


class Turns:
    """A bounded line of questions and a ring of cameras, a unit of work each. A question goes first, but after it the
    cameras are owed half the time that it took, so that a line that never empties does not starve them."""

    def __init__(self, workers: Callable[[], Sequence[Worker]], waiting: int, clock: Clock) -> None:
        self._workers, self._most, self._clock = workers, waiting, clock
        self._line: deque[Question] = deque()
        self._asked: Question | None = None  # what is answered now
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
        """Stand in line; BusyError when it is full, UnavailableError when nobody will answer."""
        with self._changed:
            if self._stopping:
                raise stopped()
            self._line = deque(waiting for waiting in self._line if not waiting.cancelled)
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

    def dismiss(self) -> None:
        """Begin no more work; who waits for an answer gets an error, also for one that is on its way."""
        with self._changed:
            self._stopping = True
            left, self._line = [*self._line, *([self._asked] if self._asked else [])], deque()
            self._changed.notify_all()
        for question in left:
            question.end(stopped())

    def stop(self, timeout: float) -> None:
        """As `dismiss`, and finish the unit that runs, for at most `timeout` seconds."""
        self.dismiss()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout)

    def _run(self) -> None:
        while not self._stopping:
            try:
                worked = self.step()
            except BaseException as error:  # whatever it is, this thread goes on: it has all questions and cameras
                self.on_failure(error)
                worked = False
            if not worked:
                with self._changed:
                    self._changed.wait_for(lambda: self._line or self._stopping, IDLE_S)

    def _answer(self) -> bool:
        with self._changed:
            while self._line and self._line[0].cancelled:
                self._line.popleft()
            if not self._line:
                return False
            self._asked = question = self._line.popleft()
        began = self._clock.monotonic()
        error = question.run(lambda: self._stopping)
        self._asked = None
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


def stopped() -> UnavailableError:
    """What is said to whoever asks, or waits, when nobody will answer."""
    return UnavailableError("the watcher was stopped; start it and ask again")
