"""How much room a live video needs: checked once, before the first frame, so that none ever fails for want of it."""

from __future__ import annotations

from dataclasses import dataclass

from dycoke_edge.config import Compression, LiveSpec
from dycoke_edge.contract import ModelSpec
from dycoke_edge.dycoke import count_merged
from dycoke_edge.errors import UsageError


@dataclass(frozen=True)
class Room:
    """Rows of the KV buffer: `text` for prefix, question and answer, `capacity` in all."""

    text: int
    capacity: int


def room(model: ModelSpec, compression: Compression, spec: LiveSpec, prefix: int, kv_capacity: int) -> Room:
    """Rows for `memory_frames` frames, at most `kv_capacity`; UsageError with the numbers if they do not fit.

    Frames that begin a window early take more rows than counted here; the oldest then go before `memory_frames` is
    reached. Rows that no frame needs cost no memory.
    """
    _check(compression)
    per_frame, ratio = model.tokens_per_frame, compression.merge_ratio
    text = prefix + spec.max_question_tokens + spec.max_answer_tokens
    needed = text + count_merged(spec.memory_frames, per_frame, ratio)
    most = text + spec.memory_frames * per_frame
    positions = most if compression.positions == "keep" else needed
    asked = f"memory_frames={spec.memory_frames} (--memory-frames) at merge_ratio={ratio:g}"
    fewer = "fewer --memory-frames, --max-question-tokens or --max-answer-tokens"
    if positions > model.max_positions:
        raise UsageError(
            f"{asked} and {text} tokens of text need {positions} positions, the model has {model.max_positions}; "
            f"use {fewer}"
        )
    if needed > kv_capacity:
        raise UsageError(
            f"{asked} and {text} rows of text need {needed} KV rows, there are {kv_capacity} (--kv-capacity); "
            f"use --kv-capacity {needed} or {fewer}"
        )
    rows = min(most, kv_capacity)
    return Room(text, rows if compression.positions == "keep" else min(rows, model.max_positions))


def _check(compression: Compression) -> None:
    if compression.mode == "official":
        raise UsageError(
            "mode='official' (--mode) looks at frames that have not come yet, so it cannot merge a live video; "
            "use --mode paper"
        )
    if compression.free_parked:
        raise UsageError(
            "free_parked (--free-parked) gives rows back for good, and the next question about a live video needs "
            "them again; leave it out"
        )
