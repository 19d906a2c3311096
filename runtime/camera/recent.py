"""The recent past of one camera: the frames of its window, and the model's memory of the same frames."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from dycoke_edge.config import Compression, LiveSpec, Sampling
from dycoke_edge.config_camera import Camera
from dycoke_edge.errors import StaleError
from dycoke_edge.runtime.camera.clock import Clock
from dycoke_edge.runtime.camera.extent import Extent
from dycoke_edge.runtime.camera.frame import Frame
from dycoke_edge.runtime.camera.look import Seen, View
from dycoke_edge.runtime.camera.model import Live, Model
from dycoke_edge.runtime.camera.schedule import Schedule
from dycoke_edge.runtime.conversation import Asked
from dycoke_edge.runtime.reply import Piece


class Recent:
    """Frames of different segments, and frames further apart than a window, never meet in it.

    Belongs to the thread of the model; `view` may be read by others.
    """

    def __init__(self, camera: Camera, llm: Model, compression: Compression, live: LiveSpec, clock: Clock) -> None:
        self.view = View(camera.window_s, camera.num_frames)
        self.schedule = Schedule(camera.window_s, camera.every_s, camera.fps)
        self.extent = Extent()
        self._camera, self._llm, self._compression, self._clock = camera, llm, compression, clock
        self._live: Live | None = None
        self._spec = live
        self._segment: int | None = None
        self._since = 0.0  # when the newest frame came to the screen, in the window's own seconds
        self._utc = 0.0  # of a file's second 0

    def open(self) -> Recent:
        """Take the memory; in the thread of the model. UsageError if the bundle or its KV buffer cannot hold it."""
        answer = max(self._spec.max_answer_tokens, self._camera.max_new_tokens)
        spec = replace(self._spec, memory_frames=self._camera.num_frames, max_answer_tokens=answer)
        self._live = self._llm.live(self._compression, spec)
        return self

    @property
    def live(self) -> Live:
        """The model's memory, once open."""
        assert self._live is not None
        return self._live

    @property
    def nbytes(self) -> int:
        """Memory held for it."""
        return self._live.nbytes if self._live is not None else 0

    def push(self, frame: Frame, lossless: bool) -> tuple[int, int]:
        """Take a frame in: (windows that fell due with it, windows that a new segment took away)."""
        lost = 0
        if frame.segment != self._segment:
            lost, self._segment = self.forget(), frame.segment
        time = self._time(frame, lossless)
        self.live.forget_before(time - self._camera.window_s)  # first, or the frame is merged with what goes
        pushed = self.live.push(frame.image, time)
        utc = self._utc + time if lossless else frame.time_utc
        came = self._clock.monotonic() if lossless else frame.monotonic_s
        newest = self.view.newest
        if newest is None or newest.frame.index != frame.index:
            self._since = time
        self.extent.frame(time)
        self.view.add(Seen(frame, time, utc, came, pushed.gated, pushed.tokens_in, pushed.tokens_kept))
        return self.schedule.frame(time), lost

    def parts(self, frame: Frame) -> bool:
        """The next frame begins another segment, and some of this one was not looked at."""
        return frame.segment != self._segment and self.schedule.fresh > 0 and len(self.view) > 0

    def held(self, frame: Frame) -> Frame | None:
        """Of a file whose next frame this is: the newest once more, as it still is on the screen when a window falls
        due before that. None if no window does, or the newest has been there for more than `stale_s`."""
        newest = self.view.newest
        if newest is None or frame.pts_s is None or frame.segment != self._segment:
            return None
        due = self.schedule.due_before(frame.pts_s)
        if due is None or due - self._since > self._camera.stale_s:
            return None
        return replace(newest.frame, pts_s=due)

    def forget(self) -> int:
        """Begin anew; returns how many windows were waiting to be looked at."""
        self.extent.part()
        self.view.clear()
        if self._live is not None:
            self._live.clear()
        return self.schedule.reset()

    def check_fresh(self, state: str) -> None:
        """Raise StaleError unless there is recent video."""
        newest = self.view.newest
        if newest is None:
            why = f"no frame has come yet, it is {state}"
        elif (age := self._clock.monotonic() - newest.came) > self._camera.stale_s:
            why = f"the newest frame is {age:.0f} s old, it is {state}"
        else:
            return
        raise StaleError(f"no recent video from {self._camera.id}: {why}; ask again when it is online")

    def ask(self, question: Asked, last_s: float | None, sampling: Sampling) -> Iterator[Piece]:
        """Ask about the window, or encode its last seconds anew for a question about less than all of it."""
        part = self.view.last(float("inf") if last_s is None else last_s)
        if len(part) == len(self.view):
            return self.live.ask(question, sampling)
        video = np.stack([seen.frame.image for seen in part])
        return self._llm.stream(question, video=video, compression=self._compression, sampling=sampling)

    def _time(self, frame: Frame, lossless: bool) -> float:
        """Live video goes by the clock it came by, a file by its own, guessed where a frame has none."""
        if not lossless:
            return frame.monotonic_s
        newest = self.view.newest
        time = frame.pts_s
        if time is None:
            time = newest.time + 1 / self._camera.fps if newest else 0.0
        if newest is None:
            self._utc = frame.time_utc - time
        return time
