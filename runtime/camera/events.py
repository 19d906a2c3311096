"""What a watcher reports: one event, the same for every sink, and the ring that keeps the latest."""

from __future__ import annotations

import json
import secrets
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from typing import Any, Literal, Protocol, runtime_checkable

EventType = Literal["alert", "description", "status", "error"]
Phase = Literal["new", "update", "end"]
Verdict = Literal["confirmed", "rejected", "unknown"]
TimeSource = Literal["receive", "pts"]
_CROCKFORD = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"


@dataclass(frozen=True)
class Event:
    """One thing that happened. `text` is what the model said and nothing else: why something failed or ended is in
    `reason`. `id` is a ULID: unique, sortable, what streams resume from. The new, update and end of one alert share
    their `alert_id`. Times are UTC, seconds since 1970 here and RFC 3339 in JSON."""

    type: EventType
    phase: Phase
    camera: str
    id: str
    time: float  # UTC when it was made
    alert_id: str | None = None
    rule_id: str | None = None
    alert_type: str | None = None
    severity: str | None = None
    verdict: Verdict | None = None  # None where no rule was asked
    score: float | None = None  # probability of yes among yes and no; None where the model would say neither
    mass: float | None = None  # probability of yes and no together
    state: str | None = None  # status events: online, offline, connecting, ended, stopped, disabled
    start_time: float | None = None
    end_time: float | None = None
    time_source: TimeSource = "receive"
    text: str = ""
    reason: str | None = None
    frames: int = 0
    vision_tokens_in: int = 0
    vision_tokens_kept: int = 0
    latency_ms: dict[str, float] = field(default_factory=dict)
    dropped_windows: int = 0  # of this camera, since its last event of a window
    model: str = ""
    backend: str = ""

    def __str__(self) -> str:
        """One line for people: when, which camera, what."""
        said = [rfc3339(self.time), self.camera, *(self._alert() if self.type == "alert" else self._other())]
        if self.reason:
            said.append(f"({self.reason})")
        return " ".join(" ".join(part for part in said if part).split())

    def _alert(self) -> list[str]:
        score = "" if self.score is None else f"{self.score:.2f}"
        return [self.severity or "", self.type, self.rule_id or "", self.phase, self.verdict or "", score]

    def _other(self) -> list[str]:
        return [self.type, self.state or "", self.text]

    def to_dict(self) -> dict[str, Any]:
        """For JSON: every key, always, `v` first."""
        times = {key: rfc3339(getattr(self, key)) for key in ("time", "start_time", "end_time")}
        return {"v": 1, **asdict(self), **times}

    def to_json(self) -> str:
        """One line."""
        return json.dumps(self.to_dict(), ensure_ascii=False, allow_nan=False)


@runtime_checkable
class Sink(Protocol):
    """Takes events without ever blocking; `close` hands on what is left, for at most `timeout` seconds."""

    def __call__(self, event: Event) -> None: ...

    def close(self, timeout: float) -> None: ...


def rfc3339(seconds: float | None) -> str | None:
    """UTC with milliseconds, e.g. 2026-11-24T09:30:00.250Z."""
    if seconds is None:
        return None
    return datetime.fromtimestamp(seconds, timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")


class Ulids:
    """Sortable ids: 48 bits of milliseconds, 80 random ones. They only grow, also when the clock is set back."""

    def __init__(self, utc: Callable[[], float]) -> None:
        self._utc = utc
        self._last = 0
        self._lock = threading.Lock()

    def __call__(self) -> str:
        """The next id: 26 letters and digits."""
        with self._lock:
            fresh = int(max(0.0, self._utc()) * 1000) << 80 | secrets.randbits(80)
            self._last = fresh if fresh >> 80 > self._last >> 80 else self._last + 1
            return "".join(_CROCKFORD[self._last >> shift & 31] for shift in range(125, -1, -5))


class EventRing:
    """The latest events, for readers that come and go. Safe for any thread."""

    def __init__(self, size: int = 1000) -> None:
        self._events: deque[Event] = deque(maxlen=size)
        self._changed = threading.Condition()

    def add(self, event: Event) -> None:
        """Take one in; the oldest goes when the ring is full."""
        with self._changed:
            self._events.append(event)
            self._changed.notify_all()

    def since(self, last_id: str | None = None, timeout: float = 0.0) -> list[Event]:
        """Events after `last_id` (None: all that are kept), oldest first; waits up to `timeout` seconds for one."""
        with self._changed:
            self._changed.wait_for(lambda: bool(self._after(last_id)), timeout)
            return self._after(last_id)

    def latest(self, count: int) -> list[Event]:
        """The newest events, oldest of them first."""
        with self._changed:
            return list(self._events)[-count:] if count > 0 else []

    def _after(self, last_id: str | None) -> list[Event]:
        return [event for event in self._events if last_id is None or event.id > last_id]
