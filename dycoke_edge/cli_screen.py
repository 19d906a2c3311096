"""Screen: a sink that keeps events for the main thread, which prints them: only there a closed pipe is noticed."""

from __future__ import annotations

import threading
from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dycoke_edge.runtime.camera.events import Event

CAPACITY = 1000


class Screen:
    """When nobody prints in time, a `patient` screen makes the model wait, for a file; any other drops the oldest."""

    def __init__(self, patient: bool) -> None:
        self.dropped = 0
        self._patient = patient
        self._events: deque[Event] = deque()
        self._changed = threading.Condition()

    def __call__(self, event: Event) -> None:
        """Take an event in."""
        with self._changed:
            self._changed.wait_for(lambda: len(self._events) < CAPACITY or not self._patient)
            if len(self._events) >= CAPACITY:
                self._events.popleft()
                self.dropped += 1
            self._events.append(event)
            self._changed.notify_all()

    def take(self, timeout: float) -> list[Event]:
        """What waits to be printed; waits up to `timeout` seconds for it."""
        with self._changed:
            self._changed.wait_for(lambda: bool(self._events), timeout)
            taken, self._events = list(self._events), deque()
            self._changed.notify_all()
        return taken

    def hurry(self) -> None:
        """Wait for nobody any more."""
        with self._changed:
            self._patient = False
            self._changed.notify_all()

    def close(self, timeout: float) -> None:
        """What is left is for `take`."""
        self.hurry()
