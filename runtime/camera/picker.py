"""Picker: which of the decoded pictures become frames, and when. The same rules for every source."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dycoke_edge.config_camera import ReaderSpec
from dycoke_edge.runtime.camera.clock import Clock
from dycoke_edge.runtime.camera.frame import Draw, Frame, Tally
from dycoke_edge.runtime.camera.timeline import Place, Timeline
from dycoke_edge.runtime.video import ROUNDING

EARLY = 0.25  # of 1/fps: cameras do not keep step; so much too soon is better than one picture too late


@dataclass(frozen=True)
class Picture:
    """A decoded picture. `develop` makes its image, uint8 [H, W, 3], and is called only if it is wanted; `draw` makes
    one in its own shape. `stamp`, if it has one, and `length` are seconds of the stream's clock."""

    develop: Callable[[], NDArray[np.uint8]]
    stamp: float | None
    length: float
    shape: tuple[int, int]
    draw: Draw | None = None


@dataclass(frozen=True)
class _Held:
    picture: Picture
    place: Place
    index: int
    came: tuple[float, float]  # monotonic, UTC


class Picker:
    """Live pictures are picked by when they come, for their stamps may lie; those of a file by what is on the screen
    at every tick of 1/fps, as `read_video` picks them. With `spec.realtime` pictures of a file are held back until
    their time has come, or `stop` is set, and are live from then on."""

    def __init__(
        self, spec: ReaderSpec, source_id: str, finite: bool, tally: Tally, clock: Clock, stop: threading.Event
    ) -> None:
        self._spec, self._source_id = spec, source_id
        self._live, self._paced = spec.realtime or not finite, spec.realtime and finite
        self._tally, self._clock, self._stop = tally, clock, stop
        self._timeline = Timeline(spec.jump, not finite)
        self._segment = -1
        self._start = 0.0  # where the ticks of this segment begin, in its time
        self._origin = 0.0  # and on the clock
        self._due = -math.inf
        self._held: _Held | None = None

    def offer(self, picture: Picture) -> Iterator[Frame]:
        """Takes the next picture; yields the frames that it decides."""
        now = self._clock.monotonic()
        place = self._timeline.place(picture.stamp, picture.length, picture.shape, now)
        fresh, self._segment = place.segment != self._segment, place.segment
        if self._paced:
            self._origin = now - place.time if fresh else self._origin
            self._clock.sleep(self._origin + place.time - now, self._stop)
        held = _Held(picture, place, self._tally.decoded, (self._clock.monotonic(), self._clock.time()))
        self._tally.decoded += 1
        self._tally.last_picture = held.came[0]
        if self._spec.fps is None or self._live:
            yield from self._give(held, self._is_due(held.came[0]))
            return
        if fresh:
            yield from self.finish()
            self._start = place.time
        elif self._held is not None:
            yield from self._give(self._held, self._tick(place.time) > self._tick(self._held.place.time))
        self._held = held

    def finish(self) -> Iterator[Frame]:
        """The last picture of a segment, if it is on the screen at a tick."""
        if self._held is not None:
            last, self._held = self._held, None
            end = self._tick(last.place.time + last.picture.length)
            yield from self._give(last, max(end, 1) > self._tick(last.place.time))

    def _tick(self, time: float) -> int:
        """How many ticks are over at `time`. A picture is on the screen from its own time to the next one's."""
        assert self._spec.fps is not None
        return max(0, math.ceil((time - ROUNDING - self._start) * self._spec.fps))

    def _is_due(self, now: float) -> bool:
        if self._spec.fps is None:
            return True
        step = 1 / self._spec.fps
        if now < self._due - EARLY * step:
            return False
        self._due = now + step if now >= self._due + step else self._due + step
        return True

    def _give(self, held: _Held, wanted: bool) -> Iterator[Frame]:
        if not wanted:
            self._tally.thinned += 1
            return
        missing = held.picture.stamp is None and self._live
        self._tally.draw = held.picture.draw
        yield Frame(
            image=held.picture.develop(),
            index=held.index,
            pts_s=None if missing else held.place.time,
            time_utc=held.came[1],
            monotonic_s=held.came[0],
            segment=held.place.segment,
            source_id=self._source_id,
        )
