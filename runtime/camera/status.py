"""What a reader says of its camera."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from dycoke_edge.runtime.camera.failure import Code
from dycoke_edge.runtime.camera.frame import SourceInfo

State = Literal["online", "offline", "connecting", "ended", "stopped", "disabled"]


@dataclass(frozen=True)
class CameraStatus:
    """The state of a camera at one moment, counts since its reader was made. No text in it holds credentials.

    frames = taken by the consumer + waiting for it + thinned + those dropped for `overrun`: none is lost uncounted.
    The other reasons (`corrupt`, `no_key`: waits for a key frame) count pictures that were never whole."""

    camera: str
    state: State
    since: float  # when the state began, seconds since 1970
    frames: int = 0  # decoded whole
    thinned: int = 0  # more a second than `fps`
    dropped: dict[str, int] = field(default_factory=dict)  # by reason
    reconnects: dict[str, int] = field(default_factory=dict)  # by the reason for them, a Code
    last_frame_monotonic: float | None = None
    error: str | None = None  # why it is offline, or why a file could not be read to its end
    code: Code | None = None  # the same in a word
    info: SourceInfo | None = None
