"""What an answer cost and what compression really did: part of every reply."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from dycoke_edge.config import Compression
from dycoke_edge.runtime.step import Step


@dataclass
class Stats:
    """Counts are taken from the arrays that were bound; times are seconds by the wall clock, on a GPU those of vision
    and merge by its own.

    `time_to_first_token` runs from the decoded frames to the first token: vision, merge and prefill, which is the rest.
    """

    frames: int = 0
    visual_tokens_in: int = 0  # F * N
    visual_tokens_kept: int = 0  # M, after merge
    text_tokens: int = 0
    new_tokens: int = 0
    merge_applied: bool = False
    keep_applied: bool = False
    why_not: list[str] = field(default_factory=list)  # where compression could not apply or was off; what is not done
    mean_active_rows: float = 0.0  # visual rows that deep layers attended to, mean over decode steps
    refreshes: int = 0  # times the kept set was chosen anew and changed
    kv_bytes: int = 0  # rows in use at the end
    kv_bytes_reserved: int = 0
    video_latency: float = 0.0  # decode and resize
    vision_latency: float = 0.0
    merge_latency: float = 0.0
    prefill_latency: float = 0.0
    kv_compaction_latency: float | None = 0.0  # all refreshes together; None where one launch does all of a step
    time_to_first_token: float = 0.0
    inter_token_latencies: list[float] = field(default_factory=list)

    def count(self, step: Step) -> None:
        """Take one token in. The first comes from prefill, where deep layers see everything."""
        if self.new_tokens:
            self.mean_active_rows += (step.active - self.mean_active_rows) / self.new_tokens
        else:
            self.mean_active_rows = float(step.active)
        self.new_tokens += 1
        self.refreshes += step.refreshed
        self.keep_applied |= step.active < self.visual_tokens_kept
        if step.compaction is None or self.kv_compaction_latency is None:
            self.kv_compaction_latency = None
        else:
            self.kv_compaction_latency += step.compaction

    @property
    def compression_applied(self) -> bool:
        """True if merge dropped a token or keep set one aside."""
        return self.merge_applied or self.keep_applied

    def percentile(self, share: float) -> float | None:
        """A percentile of the inter-token latency in seconds, None before the second token."""
        if not self.inter_token_latencies:
            return None
        return float(np.percentile(self.inter_token_latencies, share))

    def as_dict(self) -> dict[str, Any]:
        """For JSON: latencies summed up to p50 and p90."""
        data = asdict(self)
        del data["inter_token_latencies"]
        return data | {
            "compression_applied": self.compression_applied,
            "inter_token_latency_p50": self.percentile(50),
            "inter_token_latency_p90": self.percentile(90),
        }


def untiled(tokens: int) -> str:
    """What is lost of an image, in words; `tokens` are those of a frame."""
    return (
        f"the image is one frame of {tokens} visual tokens, where the model's own processor also cuts it into tiles: "
        "small things in it are lost"
    )


def why_not(num_frames: int, compression: Compression) -> list[str]:
    """Where compression does not apply to this request, in words."""
    if num_frames == 0:
        return ["no video: text only"]
    reasons = []
    if compression.mode == "coverage":
        if num_frames == 1 and compression.budget == 1:
            return ["nothing to merge: one frame"]  # nor anything to set aside
        if compression.budget == 1:
            reasons.append("merge is off: budget is 1")
    elif compression.merge_ratio == 0:
        reasons.append("merge is off: merge_ratio is 0")
    elif num_frames == 1:
        reasons.append("nothing to merge: one frame")
    if compression.prune_ratio == 0 and not (compression.mode == "coverage" and num_frames == 1):
        reasons.append("keep is off: prune_ratio is 0")
    return reasons
