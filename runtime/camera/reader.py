"""CameraReader: the frames of one camera or file, whatever happens to it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from os import PathLike

import numpy as np
from numpy.typing import NDArray

from dycoke_edge.config_camera import ReaderSpec
from dycoke_edge.runtime.camera.clock import SYSTEM, Clock
from dycoke_edge.runtime.camera.frame import Frame
from dycoke_edge.runtime.camera.keeper import Keeper, Numbers, Plan
from dycoke_edge.runtime.camera.ledger import Ledger, OnStatus
from dycoke_edge.runtime.camera.source import SPEC, Source, open_source
from dycoke_edge.runtime.camera.status import CameraStatus
from dycoke_edge.runtime.camera.uri import parse_uri


def _nobody(status: CameraStatus) -> None:
    """The on_status of who does not care."""


class CameraReader:
    """Reads a camera until stopped: reconnects for ever, keeps the newest `spec.buffer` frames, counts every drop.
    A file is read once and whole: it waits for the consumer, and ends.

    `uri` is what `open_source` takes, or a function that makes a Source. `on_status` is called at every change of
    state, from a thread of the reader and never while a lock is held; it must not block for long."""

    def __init__(
        self,
        camera: str,
        uri: str | int | PathLike[str] | Callable[[], Source],
        spec: ReaderSpec = SPEC,
        on_status: OnStatus = _nobody,
        clock: Clock = SYSTEM,
    ) -> None:
        """Raises UsageError for a URI that no source understands. Opens nothing."""
        self._plan = _plan(camera, uri, spec, clock)
        self._ledger = Ledger(camera, on_status, clock)
        self._numbers = Numbers()
        self._lock = threading.Lock()
        self._keeper: Keeper | None = None
        self._stopped = False

    def start(self) -> CameraReader:
        """Begins to read; changes nothing if it does so already. After `stop` it starts anew."""
        with self._lock:
            if self._keeper is None:
                self._stopped = False
                self._keeper = Keeper(self._plan, self._ledger, self._numbers)
                self._keeper.thread.start()
        return self

    def stop(self, timeout: float | None = None) -> bool:
        """Legal in every state, more than once, from any thread. Returns within `timeout` seconds, or one read
        timeout; False if the operating system still held a thread then, which will end by itself."""
        with self._lock:
            keeper, self._keeper, self._stopped = self._keeper, None, True
        return keeper is None or keeper.stop(self._plan.spec.read_timeout if timeout is None else timeout)

    def take(self, timeout: float = 0.0) -> Frame | None:
        """The oldest frame that waits, None if none came within `timeout` seconds or none will come."""
        keeper = self._keeper
        return None if keeper is None else keeper.buffer.take(timeout)

    @property
    def ended(self) -> bool:
        """No frame will come any more: a file was read to its end (or failed: see `status().error`) and all of it was
        taken, or the reader was stopped."""
        keeper = self._keeper
        return self._stopped if keeper is None else keeper.buffer.drained

    def picture(self, width: int) -> NDArray[np.uint8] | None:
        """The newest picture that was asked for by `fps`, taken or not, in its own shape: uint8 [H, W, 3] and at most
        `width` pixels wide; None before the first."""
        return self._ledger.picture(width)

    def status(self) -> CameraStatus:
        """The state and the counts of now."""
        return self._ledger.status()


def _plan(camera: str, uri: str | int | PathLike[str] | Callable[[], Source], spec: ReaderSpec, clock: Clock) -> Plan:
    if callable(uri):
        return Plan(camera, camera, uri, False, spec, clock)
    address = parse_uri(uri)
    open_source(uri, spec, camera, clock)  # complains now, not in a thread, of what cannot work

    return Plan(
        camera,
        address.shown,
        partial(open_source, uri, spec, camera, clock),
        address.kind in ("file", "test"),
        spec,
        clock,
    )
