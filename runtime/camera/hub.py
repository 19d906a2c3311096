"""Where events are made and handed out, and where a watcher's numbers are kept."""

from __future__ import annotations

import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from dycoke_edge.errors import ReplacedError
from dycoke_edge.runtime.camera.clock import Clock
from dycoke_edge.runtime.camera.events import Event, EventRing, EventType, Phase, Sink, Ulids
from dycoke_edge.runtime.camera.redact import redact

UNREADY_AFTER = 3  # failures of the model in a row


class Hub:
    """Stamps events and gives them to every sink in the same order. Safe for any thread."""

    def __init__(self, model: str, backend: str, sinks: Sequence[Sink], clock: Clock, ring: int = 1000) -> None:
        self.model, self.backend, self.clock = model, backend, clock
        self.sinks = tuple(sinks)
        self.events = EventRing(ring)
        self.new_id = Ulids(clock.time)
        self.failures = 0
        self.failures_in_a_row = 0
        self._failed_stage = ""
        self.last_failure: str | None = None
        self.replaced = False  # the bundle was, and nothing more will be answered
        self.on_panic: Callable[[BaseException], object] = lambda error: None  # a library of the model fell over
        self.on_replaced: Callable[[str], object] = lambda reason: None
        self._counts: Counter[str] = Counter()
        self._seconds: defaultdict[str, list[float]] = defaultdict(lambda: [0, 0.0])  # stage -> count, sum
        self._lock = threading.Lock()
        self._closed = False
        self._raised: dict[int, str] = {}  # by sinks that should not, their last

    def emit(self, type: EventType, phase: Phase, camera: str, **fields: Any) -> None:
        """Make an event of `fields` of Event; after `close` nothing happens."""
        with self._lock:
            if self._closed:
                return
            event = Event(
                type, phase, camera, self.new_id(), self.clock.time(), model=self.model, backend=self.backend, **fields
            )
            self._counts[f"{type}/{event.verdict or event.state or 'none'}"] += 1
            self.events.add(event)
            for sink in self.sinks:
                self._give(sink, event)

    def _give(self, sink: Sink, event: Event) -> None:
        try:
            sink(event)
        except Exception as error:  # it promised not to; the model's thread goes on all the same
            self._raised[id(sink)] = line(error)

    def took(self, stage: str, seconds: float) -> None:
        """Count the time that a stage took."""
        with self._lock:
            entry = self._seconds[stage]
            entry[0] += 1
            entry[1] += seconds

    def worked(self, stage: str) -> None:
        """The model did what it was asked. That it can still take frames says nothing about its answers."""
        if stage != "push" or self._failed_stage == "push":
            self.failures_in_a_row = 0

    def failed(self, error: BaseException, stage: str = "answer") -> str:
        """The model failed; returns a line that says why. That its bundle was replaced is counted and told once,
        whoever finds out how often."""
        if isinstance(error, ReplacedError):
            return self._lost(error)
        self._failed_stage = stage
        self.failures += 1
        self.failures_in_a_row += 1
        self.last_failure = line(error)
        if not isinstance(error, Exception):
            self.on_panic(error)
        return self.last_failure

    def _lost(self, error: ReplacedError) -> str:
        with self._lock:
            first, self.replaced = not self.replaced, True
        if first:
            self.failures += 1
            self.failures_in_a_row += 1
            self.last_failure = line(error)
            self.on_replaced(self.last_failure)
        return line(error)

    @property
    def failing(self) -> bool:
        """The model failed again and again."""
        return self.failures_in_a_row >= UNREADY_AFTER

    def close(self, timeout: float) -> None:
        """No event after this one; sinks hand on what they hold, all of them at once, for `timeout` seconds."""
        with self._lock:
            self._closed = True
        closing = list[threading.Thread]()
        for sink in self.sinks:
            if getattr(sink, "inside", bool)():  # a handler of events stops its own watcher
                sink.close(0.0)
            else:
                closing.append(threading.Thread(target=sink.close, args=(timeout,), daemon=True))
        for thread in closing:
            thread.start()
        end = self.clock.monotonic() + timeout
        for thread in closing:
            thread.join(max(0.0, end - self.clock.monotonic()))

    def numbers(self) -> dict[str, Any]:
        """Counts for `status`."""
        with self._lock:
            counts = dict(self._counts)
            seconds = {stage: {"count": int(n), "sum": total} for stage, (n, total) in self._seconds.items()}
        return {"events": counts, "seconds": seconds, "sinks": [self._status(sink) for sink in self.sinks]}

    def _status(self, sink: Sink) -> dict[str, Any]:
        own = getattr(sink, "status", None)
        status = dict(own()) if callable(own) else {"name": type(sink).__name__}
        return status | ({"error": self._raised[id(sink)]} if id(sink) in self._raised else {})


def line(error: BaseException) -> str:
    """An error as one short line without credentials."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return redact(text)[:500]
