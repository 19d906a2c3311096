"""What a live video cost and what gate and merge saved: counters that run for years."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from time import perf_counter
from typing import Any, Literal

Stage = Literal["resize", "gate", "vision", "merge", "evict", "rebase", "prefill", "answer"]


@dataclass(frozen=True)
class Pushed:
    """What became of one frame. `tokens_in` are those of the whole frame, also when it was gated."""

    gated: bool  # it repeats the last encoded frame and was not encoded
    scene_cut: bool  # it was too different from its anchor, and begins a window
    similarity: float | None  # mean cosine with its anchor, None where there was none to compare with
    tokens_in: int
    tokens_kept: int  # prefilled
    evicted_frames: int
    latency: float  # seconds


@dataclass
class LiveStats:
    """Counted since the live video was made; `clear` does not reset them.

    tokens_in = tokens_gated + what merge dropped + tokens_kept.
    """

    frames: int = 0
    encoded: int = 0
    gated: int = 0
    cuts: int = 0
    tokens_in: int = 0
    tokens_gated: int = 0
    tokens_kept: int = 0
    evicted_frames: int = 0
    evicted_tokens: int = 0
    rebases: int = 0
    questions: int = 0
    similarity: float | None = None  # of the last frame that was compared
    similarity_mean: float | None = None  # of all frames that were compared
    compared: int = 0
    seconds: dict[Stage, float] = field(
        default_factory=lambda: dict.fromkeys(
            ("resize", "gate", "vision", "merge", "evict", "rebase", "prefill", "answer"), 0.0
        )
    )

    @contextmanager
    def timed(self, stage: Stage) -> Iterator[None]:
        """Add what happens inside to a stage's seconds."""
        began = perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] += perf_counter() - began

    def count(self, pushed: Pushed) -> None:
        """Take one frame in."""
        self.frames += 1
        self.gated += pushed.gated
        self.encoded += not pushed.gated
        self.cuts += pushed.scene_cut
        self.tokens_in += pushed.tokens_in
        self.tokens_gated += pushed.tokens_in * pushed.gated
        self.tokens_kept += pushed.tokens_kept
        self.evicted_frames += pushed.evicted_frames
        if pushed.similarity is not None:
            self.compared += 1
            self.similarity = pushed.similarity
            mean = self.similarity_mean or 0.0
            self.similarity_mean = mean + (pushed.similarity - mean) / self.compared

    @property
    def seconds_saved(self) -> float:
        """Vision, merge and prefill time that gated frames would have taken, at the mean of those encoded."""
        spent = sum(self.seconds[stage] for stage in ("vision", "merge", "prefill"))
        return self.gated * spent / self.encoded - self.seconds["gate"] if self.encoded else 0.0

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"seconds_saved": self.seconds_saved}
