"""Ledger: the state and the counts of one camera, over all its connections."""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections import Counter
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from dycoke_edge.runtime.camera.clock import Clock
from dycoke_edge.runtime.camera.failure import SourceError
from dycoke_edge.runtime.camera.frame import SourceInfo, Tally
from dycoke_edge.runtime.camera.status import CameraStatus, State

logger = logging.getLogger(__name__)
OnStatus = Callable[[CameraStatus], None]


class Ledger:
    """Written by the thread that keeps a camera, read by any."""

    def __init__(self, camera: str, on_status: OnStatus, clock: Clock) -> None:
        self._on_status, self._clock = on_status, clock
        self._lock = threading.Lock()
        self._status = CameraStatus(camera, "stopped", clock.time())
        self._past, self._tally = Tally(), Tally()  # of connections that are over, and of the present one
        self._reconnects: Counter[str] = Counter()

    def turn(self, state: State, failure: SourceError | None = None, info: SourceInfo | None = None) -> None:
        """Notes a state, and tells `on_status` if it is another one: not of every reason why a camera stays offline.
        Without `info` the last known stays."""
        with self._lock:
            old = self._status
            text, code = (None, None) if failure is None else (str(failure), failure.code)
            since = old.since if state == old.state else self._clock.time()
            new = dataclasses.replace(old, state=state, since=since, error=text, code=code, info=info or old.info)
            self._status = new
        if state != old.state:
            try:
                self._on_status(self.status())
            except Exception:  # of the application: its camera goes on
                logger.exception("on_status of camera %s failed", new.camera)

    def begin(self, tally: Tally) -> None:
        """The counts of a new connection."""
        with self._lock:
            self._settle()
            self._tally = tally

    def end(self, lost: int = 0) -> None:
        """Keeps what the connection counted so far, and nothing that it counts from now on. `lost` frames were
        waiting to be taken and never will be."""
        with self._lock:
            self._settle()
            if lost:
                self._past.drop("stopped", lost)

    def reconnect(self, code: str) -> None:
        with self._lock:
            self._reconnects[code] += 1

    def status(self) -> CameraStatus:
        with self._lock:
            past, now = self._past, self._tally
            dropped = past.dropped + now.dropped.copy()
            return dataclasses.replace(
                self._status,
                frames=past.decoded + now.decoded,
                thinned=past.thinned + now.thinned,
                dropped=dict(dropped),
                reconnects=dict(self._reconnects),
                last_frame_monotonic=past.last_picture if now.last_picture is None else now.last_picture,
            )

    def picture(self, width: int) -> NDArray[np.uint8] | None:
        """The last picture that was handed out, uint8 [H, W, 3] and at most so wide, None before the first."""
        with self._lock:
            draw = self._tally.draw or self._past.draw
        return None if draw is None else draw(width)

    def _settle(self) -> None:
        past, now = self._past, self._tally
        past.decoded += now.decoded
        past.thinned += now.thinned
        past.dropped += now.dropped
        past.draw = now.draw or past.draw
        past.last_picture = past.last_picture if now.last_picture is None else now.last_picture
        self._tally = Tally()
