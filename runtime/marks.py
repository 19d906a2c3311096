"""When an engine passed points of its work, without waiting for any of them."""

from __future__ import annotations

from itertools import pairwise
from time import perf_counter

from dycoke_edge.runtime.engine import Engine, device_of
from dycoke_edge.runtime.gpu.device import Event


class Marks:
    """Points in the work that an engine was given: on a GPU by its clock, on the CPU by the wall clock."""

    def __init__(self, engine: Engine) -> None:
        self._device = device_of(engine)
        self._events: list[Event] = []

    def mark(self) -> None:
        """A point is now: after all that was asked for so far."""
        event = _Now() if self._device is None else self._device.event(timed=True)
        event.record()
        self._events.append(event)

    def seconds(self) -> list[float]:
        """Between each point and the next; waits until the last is passed."""
        self._events[-1].wait()
        return [later.since(earlier) for earlier, later in pairwise(self._events)]


class _Now:
    """Event on the CPU, where everything is done when a call returns."""

    _at: float

    def record(self) -> None:
        """As in Event."""
        self._at = perf_counter()

    def wait(self) -> None:
        """As in Event."""

    def since(self, earlier: _Now) -> float:
        """As in Event."""
        return self._at - earlier._at
