"""Timeline: the stream's own clock, which may be missing, leap or run backwards, made into times and segments."""

from __future__ import annotations

from typing import NamedTuple


class Place(NamedTuple):
    """Where a picture is: seconds from the first stamp, made up where it has none, and its segment."""

    time: float
    segment: int


class Timeline:
    """Within a segment times never fall and pictures have one shape. Another segment begins where the clock runs
    backwards and, of what comes as it happens (`live`), where it leaps more than `jump` seconds ahead of the time that
    went by meanwhile. A file may show one picture for hours."""

    def __init__(self, jump: float, live: bool) -> None:
        self._jump, self._live = jump, live
        self._zero: float | None = None
        self._last = Place(0.0, 0)
        self._length = 0.0
        self._shape: tuple[int, int] | None = None
        self._now = 0.0

    def place(self, stamp: float | None, length: float, shape: tuple[int, int], now: float) -> Place:
        """The place of the next picture: its stamp and how long it is shown, in seconds of the stream, its height and
        width, and when it came."""
        passed = now - self._now if self._live else 0.0
        if stamp is not None:
            self._zero = stamp if self._zero is None else self._zero
            time = stamp - self._zero
        elif self._shape is None:
            time = 0.0
        else:
            time = self._last.time + (passed if self._live else self._length)
        leaps = self._live and time - self._last.time > self._jump + passed
        apart = self._shape is not None and (shape != self._shape or time < self._last.time or leaps)
        self._last = Place(time, self._last.segment + apart)
        self._length, self._shape, self._now = length, shape, now
        return self._last
