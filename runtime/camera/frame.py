"""What a source hands out: frames, what the stream says of itself, and the count of what became of every picture."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Draw = Callable[[int], NDArray[np.uint8]]  # a picture in its own shape, uint8 [H, W, 3], at most so many pixels wide


@dataclass(frozen=True, eq=False)
class Frame:
    """One picture. `image` is uint8 [H, W, 3] RGB, already size x size when a size was asked for.

    Frames of different `segment` have nothing to do with each other (reconnected, a jump in time, another resolution):
    they never share a window. Segments and indices only grow while a reader lives."""

    image: NDArray[np.uint8]
    index: int  # of the decoded pictures, thinned out and dropped ones included
    pts_s: float | None  # the stream's own clock, seconds from the first picture of this connection; may be missing
    time_utc: float  # when it was decoded, seconds since 1970
    monotonic_s: float  # the same moment on the reader's clock, which never steps
    segment: int
    source_id: str


@dataclass(frozen=True)
class SourceInfo:
    """What is known once a source is open. `live`: frames that nobody takes are lost, else the source waits.
    `finite`: its end is the end; for any other source the end is a failure."""

    uri: str  # redacted
    live: bool
    finite: bool
    codec: str | None = None
    width: int | None = None
    height: int | None = None
    fps: float | None = None  # as announced; cameras often lie


@dataclass
class Tally:
    """What became of the pictures of a source. Written by one thread; others may read it at any time."""

    decoded: int = 0  # pictures that could have been shown, whether or not they were asked for
    thinned: int = 0  # of these, not asked for: there are more a second than `fps`
    dropped: Counter[str] = field(default_factory=Counter)  # lost, by reason: corrupt, no_key, overrun
    last_packet: float | None = None  # clock.monotonic() of the last sign of life
    last_picture: float | None = None  # and of the last picture decoded whole
    draw: Draw | None = field(default=None, compare=False)  # the last picture that was handed out; for any thread

    def drop(self, reason: str, count: int = 1) -> None:
        self.dropped[reason] += count
