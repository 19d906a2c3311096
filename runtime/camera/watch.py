"""watch: one camera as a generator, in the caller's thread."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator

from dycoke_edge.config import Compression
from dycoke_edge.config_camera import Camera, ReaderSpec
from dycoke_edge.runtime.camera.answers import WatchResult
from dycoke_edge.runtime.camera.clock import SYSTEM, Clock
from dycoke_edge.runtime.camera.failure import SourceError
from dycoke_edge.runtime.camera.hub import Hub
from dycoke_edge.runtime.camera.lane import Lane
from dycoke_edge.runtime.camera.post import is_lossless, reader_spec
from dycoke_edge.runtime.camera.questions import check_camera
from dycoke_edge.runtime.camera.reader import CameraReader
from dycoke_edge.runtime.camera.status import CameraStatus
from dycoke_edge.runtime.camera.turns import IDLE_S
from dycoke_edge.runtime.pipeline import VideoLLM


def watch(
    llm: VideoLLM,
    camera: Camera,
    compression: Compression,
    reading: ReaderSpec = ReaderSpec(),  # noqa: B008 - frozen
    clock: Clock = SYSTEM,
    make_reader: Callable[..., CameraReader] = CameraReader,
) -> Iterator[WatchResult]:
    """A result a window, for ever or until a file ends. Leaving the generator lets the camera go.

    UsageError, at once, for a prompt or rule that cannot be asked. SourceError if the stream fails before its first
    frame (afterwards it is opened anew for ever), or a file before its end; raises what the model raises.
    """
    check_camera(llm.check_live, camera)
    hub = Hub(llm.bundle.path.name, llm.spec.provider, (), clock)
    reader = make_reader(camera.id, camera.uri, reader_spec(camera, llm, reading), lambda status: None, clock)
    results = deque[WatchResult]()
    lane = Lane(
        camera, reader, llm, hub, lambda: camera.rules, is_lossless(camera), compression, on_result=results.append
    )
    lane.recent.open()
    return _results(lane, reader, results, clock)


def _results(lane: Lane, reader: CameraReader, results: deque[WatchResult], clock: Clock) -> Iterator[WatchResult]:
    never = threading.Event()
    reader.start()
    try:
        while not lane.finished:
            if not lane.unit():
                if lane.counts.frames == 0:
                    check(reader.status())
                clock.sleep(IDLE_S, never)
            while results:
                yield results.popleft()
        check(reader.status())
    finally:
        reader.stop()
        lane.recent.forget()


def check(status: CameraStatus) -> None:
    """Raise the SourceError that a camera's state speaks of, if any."""
    if status.error is not None and status.state in ("offline", "ended"):
        raise SourceError(status.code or "unreadable", status.error)
