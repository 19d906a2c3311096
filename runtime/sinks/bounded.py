"""A sink with a thread and a bounded queue of its own: slow or broken receivers cost events, counted, never time."""

from __future__ import annotations

import random
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from time import monotonic
from typing import Any

from dycoke_edge.runtime.camera.events import Event
from dycoke_edge.runtime.camera.redact import redact

FOR_EVER = 2**31  # attempts: an event waits until newer ones push it out


class Transient(Exception):
    """The receiver cannot take an event now; `after` says when to try again, None leaves it to the backoff."""

    def __init__(self, text: str, after: float | None = None) -> None:
        super().__init__(text)
        self.after = after


class BoundedSink(ABC):
    """Delivers events in order from a thread of its own. When `capacity` events wait, the oldest is dropped.

    A transient failure is tried again, 1 to 60 seconds apart, at most `attempts` times; any other loses the event.
    """

    def __init__(
        self, name: str, capacity: int = 1000, attempts: int = 10, backoff: tuple[float, float] = (1.0, 60.0)
    ) -> None:
        self.name = name
        self.delivered = 0
        self.dropped = 0  # by a full queue, a failure for good, or the end
        self.failures = 0  # attempts that failed
        self.error: str | None = None  # of the last attempt, if it failed
        self._attempts, self._backoff, self._capacity = attempts, backoff, capacity
        self._waiting: deque[Event] = deque()
        self._busy = 0  # events out of the queue and not yet delivered or lost
        self._changed = threading.Condition()
        self._closing = False
        self._errand: Callable[[], None] | None = None
        self._thread: threading.Thread | None = None

    @abstractmethod
    def deliver(self, event: Event) -> None:
        """Hand one event on; raises Transient where trying again can help."""

    def finish(self) -> None:  # noqa: B027 - most need not
        """Let go of connections and files; in the sink's thread, after the last event."""

    def __call__(self, event: Event) -> None:
        """Take an event in; never blocks, never raises."""
        with self._changed:
            if self._closing:
                self.dropped += 1
                return
            if len(self._waiting) >= self._capacity:
                self._waiting.popleft()
                self.dropped += 1
            self._waiting.append(event)
            self._start()
            self._changed.notify_all()

    def flush(self, timeout: float) -> bool:
        """Wait until nothing waits; False when `timeout` seconds came first."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._waiting and not self._busy, timeout)

    def close(self, timeout: float = 2.0) -> None:
        """Hand on what waits, each event tried once more, then stop. Also twice."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            thread = self._thread
        if thread is None:
            self.finish()
        elif not self.inside():
            thread.join(timeout)
            with self._changed:
                self.dropped += len(self._waiting)
                self._waiting.clear()
                self._changed.notify_all()

    def inside(self) -> bool:
        """True in the sink's own thread, which cannot wait for itself."""
        return threading.current_thread() is self._thread

    def status(self) -> dict[str, Any]:
        """Numbers, and the last error without credentials."""
        with self._changed:
            queued = len(self._waiting) + self._busy
        counts = {"delivered": self.delivered, "dropped": self.dropped, "failures": self.failures}
        return {"name": self.name, "queued": queued, **counts, "error": self.error}

    def _start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name=f"sink {self.name}", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        try:
            while (event := self._next()) is not None:
                delivered = self._tried(event)
                with self._changed:
                    self._busy = 0
                    self.delivered += delivered
                    self.dropped += not delivered
                    self._changed.notify_all()
        finally:
            self.finish()

    def _next(self) -> Event | None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closing or self._errand)
                if self._errand is None:
                    if not self._waiting:
                        return None
                    self._busy = 1
                    return self._waiting.popleft()
            self._run_errand()

    def _run_errand(self) -> None:
        """Do what is to be done in this thread besides events, if anything is."""
        with self._changed:
            errand, self._errand = self._errand, None
        if errand is not None:
            errand()

    def _tried(self, event: Event) -> bool:
        """Deliver, again and again where that can help."""
        for attempt in range(self._attempts):
            try:
                self.deliver(event)
                self.error = None
                return True
            except Exception as error:  # whatever a receiver does, the others and the cameras go on
                self.failures += 1
                self.error = redact(str(error) if isinstance(error, Transient) else f"{type(error).__name__}: {error}")
                if not isinstance(error, Transient) or self._closing:
                    return False
                self._pause(attempt, error.after)
        return False

    def _pause(self, attempt: int, after: float | None) -> None:
        first, longest = self._backoff
        seconds = min(longest, first * 2.0 ** min(attempt, 30)) * random.uniform(0.8, 1.2)
        with self._changed:
            self._changed.wait_for(lambda: self._closing, seconds if after is None else min(after, longest))


class CallbackSink(BoundedSink):
    """Calls a function with every event, in a thread of its own."""

    def __init__(self, function: Callable[[Event], None], capacity: int = 1000) -> None:
        super().__init__(getattr(function, "__name__", type(function).__name__), capacity, attempts=1)
        self._function = function

    def deliver(self, event: Event) -> None:
        """What it raises is counted, and shown in `status`."""
        self._function(event)


def deadline(timeout: float, clock: Callable[[], float] = monotonic) -> Callable[[], float]:
    """Seconds left of `timeout`, never below 0."""
    end = clock() + timeout
    return lambda: max(0.0, end - clock())
