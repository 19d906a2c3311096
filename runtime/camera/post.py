"""A camera's post: its reader in one hand, its lane in the other; switched on and off from any thread."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from dycoke_edge.config import Compression, LiveSpec
from dycoke_edge.config_camera import Camera, ReaderSpec, Rule
from dycoke_edge.runtime.camera.frame import Frame
from dycoke_edge.runtime.camera.hub import Hub
from dycoke_edge.runtime.camera.lane import Lane
from dycoke_edge.runtime.camera.reader import CameraReader
from dycoke_edge.runtime.camera.redact import redact
from dycoke_edge.runtime.camera.status import CameraStatus
from dycoke_edge.runtime.camera.uri import parse_uri
from dycoke_edge.runtime.pipeline import VideoLLM

MOST_WAITING = 64  # frames that wait for the model, however long a window is


class Post:
    """One camera of a watcher. `work` and the lane belong to the model's thread."""

    def __init__(
        self,
        camera: Camera,
        llm: VideoLLM,
        hub: Hub,
        rules: Callable[[], Sequence[Rule]],
        compression: Compression,
        hurry: Callable[[bool], bool],
        reading: ReaderSpec,
        live: LiveSpec,
        make_reader: Callable[..., CameraReader] = CameraReader,
    ) -> None:
        spec = reader_spec(camera, llm, reading)
        self.camera, self._hub = camera, hub
        self.reader = make_reader(camera.id, camera.uri, spec, self._changed, hub.clock)
        self.lane = Lane(camera, self.reader, llm, hub, rules, is_lossless(camera), compression, live, hurry)
        self.enabled = True  # not paused, nor about to be read on
        self._state = ""
        self._lock = threading.RLock()  # over the wish and what is said of it
        self._wish = 0  # counts changes of mind
        self._wanted, self._begun, self._closed = True, False, False
        self._switching = threading.Lock()  # held by whoever carries wishes out
        self._done = 0  # the wish that was carried out last
        self._reading = False  # the reader was started
        self._ended: CameraStatus | None = None  # of a file that was read to its end and not looked at to it

    def work(self) -> bool:
        """The lane's next unit of work, unless switched off."""
        worked = self.enabled and self.lane.work()
        if self.lane.finished:
            self._say_end()
        return worked

    @property
    def _extent(self) -> str:
        """How much of a file was looked at."""
        counts, extent = self.lane.counts, self.lane.recent.extent
        numbers = f"frames: {counts.frames}, windows: {counts.windows}"
        return f"looked at {extent.looked:.1f} of {extent.seconds:.1f} s; {numbers}"

    @property
    def finished(self) -> bool:
        """Its video has ended, all of it was looked at, and that was said."""
        return self.lane.finished and self._state not in ("connecting", "online", "offline")

    def open(self) -> None:
        """Take the lane's memory, in the thread of the model, unless this was closed meanwhile."""
        if not self._closed:
            self.lane.recent.open()

    def begin(self) -> None:
        """Read, unless paused or closed already."""
        with self._lock:
            self._begun, self._wish = True, self._wish + 1
        self._follow()

    def pause(self) -> None:
        """Let the camera go; open alerts end. Does not wait for it."""
        with self._lock:
            if not self._wanted or self._closed:
                return
            self.enabled, self._wanted, self._wish = False, False, self._wish + 1
            self.lane.alerts.close("the camera was paused", shut=True)
            self._say("disabled", None)
        threading.Thread(target=self._follow, daemon=True).start()

    def resume(self) -> None:
        """Read on, from an empty window. Waits for a pause that is not over yet."""
        with self._lock:
            if self._wanted or self._closed:
                return
            self._wanted, self._wish = True, self._wish + 1
        self._follow()

    def close(self, reason: str) -> None:
        """End open alerts for good, and read no more; `let_go` does the rest."""
        with self._lock:
            self._closed, self._wish = True, self._wish + 1
            self.lane.alerts.close(reason, shut=True)

    def let_go(self, timeout: float | None = None) -> None:
        """Stop the reader of a post that was closed. Whoever is about to start it sees that, and does not."""
        self.reader.stop(timeout)
        self._follow()

    def snapshot(self) -> Frame | None:
        """The newest frame that was given to the model."""
        newest = self.lane.recent.view.newest
        return newest.frame if newest else None

    def status(self) -> dict[str, Any]:
        """This camera's part of `CameraWatcher.status`."""
        reader, now = self.reader.status(), self._hub.clock.monotonic()
        last, recent = reader.last_frame_monotonic, self.lane.recent
        return {
            "state": reader.state if self.enabled else "disabled",
            "since": reader.since,
            "uri": redact(str(self.camera.uri)),
            "error": reader.error,
            "fps": self.camera.fps,
            "width": reader.info.width if reader.info else None,
            "height": reader.info.height if reader.info else None,
            "decoded_frames": reader.frames,
            "dropped_frames": dict(reader.dropped),
            "reconnects": dict(reader.reconnects),
            "last_frame_age_s": None if last is None else now - last,
            **self.lane.counts.as_dict(),
            "video_s": recent.extent.seconds,
            "video_s_looked_at": recent.extent.looked,
            "memory_frames": len(recent.view),
            "kv_bytes": recent.nbytes,
            "last_frame_time": newest.utc if (newest := recent.view.newest) else None,
            "alerts": self.lane.alerts.status(),
        }

    def _follow(self) -> None:
        """Carry out what was wished for last. Of many that come at once one does it, whoever overtakes whom."""
        with self._switching:
            while self._done != (wish := self._wish):
                if self._reading:
                    self.reader.stop()
                    self._reading = False
                if self._may_read(wish):
                    self.reader.start()
                    self._reading = True
                self._done = wish

    def _may_read(self, wish: int) -> bool:
        """Make ready for the reader, unless it is not wanted, or something else is by now."""
        with self._lock:
            if self._wish != wish or self._closed or not (self._wanted and self._begun):
                return False
            if not self.enabled:
                self.lane.forget()
                self.lane.finished = False
                self.lane.alerts.open()
                self.enabled = True
            return True

    def _changed(self, status: CameraStatus) -> None:
        with self._lock:
            if not self.enabled:
                return
            self._ended = status if self.lane.lossless and status.state == "ended" else None
            if self._ended is None:
                self._say(status.state, status.error)

    def _say_end(self) -> None:
        """Say that a file ended, once all of it was looked at."""
        with self._lock:
            status, self._ended = self._ended, None
            if status is not None and self.enabled:
                self._say(status.state, "; ".join(filter(None, (status.error, self._extent))))

    def _say(self, state: str, reason: str | None) -> None:
        if state != self._state:
            self._state = state
            self._hub.emit("status", "new", self.camera.id, state=state, reason=reason)


def reader_spec(camera: Camera, llm: VideoLLM, reading: ReaderSpec) -> ReaderSpec:
    """How a camera is read for this model."""
    size, buffer = llm.bundle.model.image_size, min(camera.num_frames, MOST_WAITING)
    own = replace(reading, fps=camera.fps, realtime=camera.realtime, hosts=camera.hosts)
    return replace(own, size=size, buffer=buffer)


def is_lossless(camera: Camera) -> bool:
    """Files and test pictures wait for the model, unless they play a camera."""
    return not camera.realtime and parse_uri(camera.uri).kind in ("file", "test")
