"""How much room a live video needs: checked once, before the first frame, so that none ever fails for want of it."""

from __future__ import annotations

from dataclasses import dataclass

from dycoke_edge.config import Compression, LiveSpec
from dycoke_edge.contract import ModelSpec
from dycoke_edge.dycoke import count_kept
from dycoke_edge.errors import UsageError

SPARE = 4  # a fourth more positions than frames take: no row is re-based more than five times before it goes


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
    per_frame = model.tokens_per_frame
    text = prefix + spec.max_question_tokens + spec.max_answer_tokens
    merged, whole = count_kept(spec.memory_frames, per_frame, compression), spec.memory_frames * per_frame
    span = whole if compression.positions == "keep" else merged
    most_span = max(0, model.max_positions - text) * SPARE // (SPARE + 1)
    share = (
        f"budget={compression.budget:g}"
        if compression.mode == "coverage"
        else f"merge_ratio={compression.merge_ratio:g}"
    )
    asked = f"memory_frames={spec.memory_frames} (--memory-frames) at {share} and {text} tokens of text"
    fewer = "fewer --memory-frames, --max-question-tokens or --max-answer-tokens"
    if span > most_span:
        needed = text + -(-span * (SPARE + 1) // SPARE)
        less = ", or --positions reassign" if span > merged else ""
        raise UsageError(f"{asked} need {needed} positions, the model has {model.max_positions}; use {fewer}{less}")
    if text + merged > kv_capacity:
        raise UsageError(
            f"{asked} need {text + merged} KV rows, there are {kv_capacity} (--kv-capacity); "
            f"use --kv-capacity {text + merged} or {fewer}"
        )
    if compression.mode == "coverage":  # every frame takes as many rows
        return Room(text, text + merged)
    rows = whole if compression.positions == "keep" else min(whole, most_span)
    return Room(text, min(text + rows, kv_capacity))


def _check(compression: Compression) -> None:
    if compression.mode == "official":
        raise UsageError(
            "mode='official' (--mode) looks at frames that have not come yet, so it cannot merge a live video; "
            "use --mode paper or coverage"
        )
    if compression.free_parked:
        raise UsageError(
            "free_parked (--free-parked) gives rows back for good, and the next question about a live video needs "
            "them again; leave it out"
        )
