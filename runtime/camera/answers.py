"""What a question gets back, and what a watched window gives."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from dycoke_edge.runtime.stats import Stats

Status = Literal["ok", "stale", "failed", "busy"]
Window = tuple[float, float]  # UTC of the oldest and the newest frame, seconds since 1970


@dataclass(frozen=True)
class Answer:
    """`text` is the model's and empty unless `status` is "ok"; why not is in `reason`. `stats` are those of the
    question alone: its frames were encoded as they came."""

    status: Status
    text: str = ""
    reason: str | None = None
    token_ids: list[int] = field(default_factory=list)
    stats: Stats = field(default_factory=Stats)
    window: Window | None = None

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"stats": self.stats.as_dict()}


@dataclass(frozen=True)
class WatchResult:
    """The answer about one window: what `VideoLLM.watch` gives. `start` and `end` are the times of the window's
    frames: seconds into a file, or UTC for what is live."""

    text: str
    start: float
    end: float
    frames: int
    vision_tokens_in: int
    vision_tokens_kept: int
    dropped_windows: int  # between the window before and this one
    scores: dict[str, float] = field(default_factory=dict)  # rule id -> probability of yes, where the model answers
    latency_ms: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)
