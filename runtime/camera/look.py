"""A look at one window: what it spans and what was found, until its events are out."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from dycoke_edge.runtime.camera.answers import Window
from dycoke_edge.runtime.camera.frame import Frame


@dataclass(frozen=True)
class Seen:
    """A frame in the window, its time in the window's own seconds and what became of it."""

    frame: Frame
    time: float  # files: seconds of the file; live: the reader's clock
    utc: float
    came: float  # by the reader's clock; files: when it was taken
    gated: bool  # so like the one before that it was not encoded
    tokens_in: int
    tokens_kept: int


class View:
    """The frames that a question would be about: the last `seconds` of one segment, at most `size` of them."""

    def __init__(self, seconds: float, size: int) -> None:
        self._seconds = seconds
        self._seen: deque[Seen] = deque(maxlen=size)

    def add(self, seen: Seen) -> None:
        """Take the newest in; what is older than the window goes."""
        self._seen.append(seen)
        while seen.time - self._seen[0].time > self._seconds:
            self._seen.popleft()

    def clear(self) -> None:
        """Forget all."""
        self._seen.clear()

    def __len__(self) -> int:
        return len(self._seen)

    @property
    def newest(self) -> Seen | None:
        """The newest, None before the first."""
        return self._seen[-1] if self._seen else None

    @property
    def window(self) -> Window | None:
        """UTC of the oldest and newest."""
        seen = tuple(self._seen)
        return (seen[0].utc, seen[-1].utc) if seen else None

    def last(self, seconds: float) -> list[Seen]:
        """Those of the last `seconds`, oldest first."""
        seen = tuple(self._seen)
        return [one for one in seen if seen[-1].time - one.time <= seconds]


@dataclass
class Look:
    """What is known of a window while its rules are scored and its prompt is answered."""

    start: float
    end: float
    window: Window
    came: float  # the newest frame, by the reader's clock
    frames: int
    tokens_in: int
    tokens_kept: int
    dropped: int  # windows passed over since the one before
    scores: dict[str, float] = field(default_factory=dict)
    text: str = ""
    latency_ms: dict[str, float] = field(default_factory=dict)

    def took(self, stage: str, seconds: float) -> None:
        """Add up the time of a stage."""
        self.latency_ms[stage] = round(self.latency_ms.get(stage, 0.0) + seconds * 1e3, 1)


def look_at(view: View, tokens_kept: int, dropped: int) -> Look:
    """Begin a look; the view must hold a frame. `tokens_kept` are in the model's memory: those of a frame that many
    gated ones repeat may be older than the window."""
    seen = view.last(float("inf"))
    first, last = seen[0], seen[-1]
    return Look(
        first.time,
        last.time,
        (first.utc, last.utc),
        last.came,
        len(seen),
        sum(one.tokens_in for one in seen),
        tokens_kept,
        dropped,
    )
