"""CameraReader: keeps one camera running in threads of its own."""

from __future__ import annotations

from collections.abc import Callable
from os import PathLike

from dycoke_edge.config import ReaderSpec
from dycoke_edge.runtime.camera.clock import SYSTEM, Clock
from dycoke_edge.runtime.camera.frame import Frame
from dycoke_edge.runtime.camera.source import Source
from dycoke_edge.runtime.camera.status import CameraStatus


class CameraReader:
    """Reads a camera until stopped: reconnects for ever, keeps the newest `spec.buffer` frames, counts every drop.
    A file is read once and whole: it waits for the consumer, and ends.

    `uri` is what `open_source` takes, or a function that makes a Source. `on_status` is called at every change of
    state, from the reader's threads, never while a lock is held; it must not block for long."""

    def __init__(
        self,
        camera: str,
        uri: str | int | PathLike[str] | Callable[[], Source],
        spec: ReaderSpec = ReaderSpec(),
        on_status: Callable[[CameraStatus], None] = lambda status: None,
        clock: Clock = SYSTEM,
    ) -> None:
        """Raises UsageError for a URI that no source understands."""
        raise NotImplementedError

    def start(self) -> CameraReader:
        """Legal once; again after `stop` it starts anew."""
        raise NotImplementedError

    def stop(self, timeout: float | None = None) -> bool:
        """Legal in every state, more than once, from any thread. Returns within `timeout` seconds, or one read
        timeout; False if the operating system still held a thread then, which ends by itself."""
        raise NotImplementedError

    def take(self, timeout: float = 0.0) -> Frame | None:
        """The oldest frame that waits, None if none came within `timeout` seconds or none will come."""
        raise NotImplementedError

    @property
    def ended(self) -> bool:
        """No frame will come any more: a file was read to its end (or failed: see `status().error`) and every frame
        of it was taken, or the reader was stopped."""
        raise NotImplementedError

    def status(self) -> CameraStatus:
        raise NotImplementedError
