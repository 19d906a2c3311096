"""Connection: one opening of a source, in a thread of its own, for it may hang in the operating system."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from dycoke_edge.config_camera import ReaderSpec
from dycoke_edge.runtime.camera.clock import Clock
from dycoke_edge.runtime.camera.failure import SourceError
from dycoke_edge.runtime.camera.frame import Frame, SourceInfo, Tally
from dycoke_edge.runtime.camera.source import Source

logger = logging.getLogger(__name__)
Put = Callable[[Frame, bool], bool]  # the frame, whether it is live; False means stop


class Connection:
    """Makes the source, opens it and puts its frames until the end, a failure or `cut`. When `done` is set the source
    is closed and the thread all but gone. `shown` stands for the source in messages."""

    def __init__(self, name: str, shown: str, make: Callable[[], Source], clock: Clock) -> None:
        self.info: SourceInfo | None = None
        self.failure: SourceError | None = None
        self.showing = False  # a first frame is there
        self.done = threading.Event()
        self._name, self._shown, self._clock = name, shown, clock
        self._cut = False
        self._begun = self._opened = clock.monotonic()
        self._source = self._made(make)
        self.tally = Tally() if self._source is None else self._source.tally

    def _made(self, make: Callable[[], Source]) -> Source | None:
        try:
            return make()
        except Exception as error:
            self.failure = self._explained(error)
            return None

    def start(self, put: Put, wake: Callable[[], None]) -> None:
        """Begins; `wake` is called at every turn of events."""
        if self._source is None:
            self.done.set()
            wake()
            return
        arguments = self._source, put, wake
        threading.Thread(target=self._run, args=arguments, name=f"camera-{self._name}-read", daemon=True).start()

    def cut(self) -> None:
        """Ends it as soon as the source lets go."""
        self._cut = True
        if self._source is not None:
            self._source.interrupt()

    def stalled(self, spec: ReaderSpec) -> SourceError | None:
        """The failure to report if the source has been silent for too long, whatever it says itself."""
        now, tally, info = self._clock.monotonic(), self.tally, self.info
        if info is None:
            late = now - self._begun > spec.open_timeout
            return self._silent(f"did not open within {spec.open_timeout:g} s") if late else None
        if info.finite:
            return None
        if now - (tally.last_packet or self._opened) > spec.read_timeout:
            return self._silent(f"sent nothing for {spec.read_timeout:g} s")
        if now - (tally.last_picture or self._opened) > spec.stall_timeout:
            return self._silent(f"sent no whole picture for {spec.stall_timeout:g} s")
        return None

    def _silent(self, what: str) -> SourceError:
        return SourceError("timeout", f"{self._shown} {what}; check the camera and the network")

    def _run(self, source: Source, put: Put, wake: Callable[[], None]) -> None:
        try:
            self._read(source, put, wake)
        except Exception as error:
            self.failure = self._explained(error)
        finally:
            source.close()
            self.done.set()
            wake()

    def _read(self, source: Source, put: Put, wake: Callable[[], None]) -> None:
        info = source.open()
        self._opened = self._clock.monotonic()
        self.info = info
        for frame in source:
            if self._cut:
                self.tally.drop("stopped")
                return
            if not put(frame, info.live):
                return
            if not self.showing:
                self.showing = True
                wake()
        if not info.finite and not self._cut:
            raise SourceError("ended", f"{self._shown} ended")

    def _explained(self, error: Exception) -> SourceError:
        """A camera must not be lost for an exception that nobody foresaw."""
        if isinstance(error, SourceError):
            return error
        logger.error("reading camera %s failed: %s", self._name, type(error).__name__)  # its text may hold a password
        return SourceError("unreadable", f"{self._shown} cannot be read ({type(error).__name__}: {error})")
