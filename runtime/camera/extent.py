"""How much of a video there was, and how much of it was looked at, in its own seconds."""

from __future__ import annotations


class Extent:
    """Counts `seconds` and `looked`. A frame counts for as long as it is on the screen, to the next one; how long that
    is for the last one of a segment nobody knows."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.looked = 0.0
        self._newest: float | None = None  # time of the newest frame
        self._seen = False  # it was looked at
        self._waiting = 0.0  # seconds since the last look

    def frame(self, time: float) -> None:
        """Take the time of the next frame."""
        step = 0.0 if self._newest is None else time - self._newest
        self.seconds += step
        if self._seen:
            self.looked += step
        else:
            self._waiting += step
        self._newest, self._seen = time, False

    def look(self, start: float) -> None:
        """All from `start` to the newest frame was looked at."""
        if self._newest is not None:
            self.looked += min(self._waiting, self._newest - start)
        self._waiting, self._seen = 0.0, True

    def part(self) -> None:
        """What comes next has nothing to do with what came; what was not looked at never will be."""
        self._newest, self._waiting, self._seen = None, 0.0, False
