"""When a window of a stream is due, and which were missed. Knows only the times of frames."""

from __future__ import annotations

import math

TOLERANCE = 1e-3  # of a frame's distance: times from containers are rounded


class Schedule:
    """Windows of the last `window_s` seconds, every `every_s`, the first when it is full."""

    def __init__(self, window_s: float, every_s: float, fps: float) -> None:
        self._first = max(0.0, window_s - 1 / fps) - TOLERANCE / fps
        self._every = every_s
        self._step = 1 / fps
        self._next = math.nan
        self.waiting = 0  # windows due and not yet looked at
        self.fresh = 0  # frames since the last window

    def reset(self) -> int:
        """Begin anew with the next frame; returns how many windows were waiting."""
        lost, self.waiting, self.fresh, self._next = self.waiting, 0, 0, math.nan
        return lost

    def frame(self, time: float) -> int:
        """Take a frame's time; returns how many windows fell due with it, of which only the last has new frames."""
        self.fresh += 1
        if math.isnan(self._next):
            self._next = time + self._first
        if time < self._next:
            return 0
        due = math.floor((time - self._next) / self._every) + 1
        self._next += due * self._every
        self.waiting += 1
        return due

    def due_before(self, time: float) -> float | None:
        """When the next window falls due, if no frame will come for it: the next one is at `time`."""
        return self._next if self._next + self._step < time else None

    def take(self) -> int:
        """The newest window is looked at now; returns how many older ones were passed over."""
        passed, self.waiting, self.fresh = max(0, self.waiting - 1), 0, 0
        return passed
