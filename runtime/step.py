"""One token of an answer, and what producing it took."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Side = Literal["left", "right"]  # of the KV buffer: visual rows, text rows
FinishReason = Literal["stop", "length", "repetition"]


@dataclass(frozen=True)
class Step:
    """`active` counts visual rows that deep layers attended to. `finish_reason` is that of the answer, with its last
    token."""

    token: int
    active: int
    refreshed: bool = False
    returned: int = 0  # row pairs exchanged: parked rows that came back
    compaction: float | None = 0.0  # seconds; None where it is part of one launch with the rest
    finish_reason: FinishReason | None = None
