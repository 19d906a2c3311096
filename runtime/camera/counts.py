"""What a camera's lane did so far, in numbers."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Counts:
    """What a lane did so far."""

    frames: int = 0  # given to the model
    gated: int = 0  # of these, not encoded because nothing had changed
    windows: int = 0  # looked at
    failures: int = 0
    dropped: Counter[str] = field(default_factory=Counter)  # windows: slow, asked, failed, segment, no_frames
    tokens_in: int = 0
    tokens_kept: int = 0
    text: str = ""
    text_time: float | None = None  # UTC
    answer_age: float | None = None  # seconds from a window's newest frame to the last of its answers

    def as_dict(self) -> dict[str, Any]:
        """For `CameraWatcher.status`."""
        return {
            "frames": self.frames,
            "frames_gated": self.gated,
            "windows": self.windows,
            "dropped_windows": {reason: count for reason, count in self.dropped.items() if count},
            "failures": self.failures,
            "vision_tokens_in": self.tokens_in,
            "vision_tokens_kept": self.tokens_kept,
            "answer_age_s": self.answer_age,
            "text": self.text,
            "text_time": self.text_time,
        }
