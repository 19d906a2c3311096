"""The clock that sources and readers go by; tests put their own in its place."""

from __future__ import annotations

import threading
import time
from typing import Protocol


class Clock(Protocol):
    def monotonic(self) -> float:
        """Seconds that only grow."""
        ...

    def time(self) -> float:
        """Seconds since 1970; may step."""
        ...

    def sleep(self, seconds: float, wake: threading.Event) -> bool:
        """Waits until `wake` is set or so many seconds are over; True if it is set."""
        ...


class SystemClock:
    def monotonic(self) -> float:
        return time.monotonic()

    def time(self) -> float:
        return time.time()

    def sleep(self, seconds: float, wake: threading.Event) -> bool:
        return wake.wait(max(seconds, 0.0))


SYSTEM = SystemClock()
