"""Keeper: one camera from start to stop, connection after connection."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable

from dycoke_edge.config_camera import ReaderSpec
from dycoke_edge.runtime.camera.backoff import Backoff
from dycoke_edge.runtime.camera.buffer import FrameBuffer
from dycoke_edge.runtime.camera.clock import Clock
from dycoke_edge.runtime.camera.connection import Connection
from dycoke_edge.runtime.camera.failure import SourceError
from dycoke_edge.runtime.camera.frame import Frame, Tally
from dycoke_edge.runtime.camera.ledger import Ledger
from dycoke_edge.runtime.camera.source import Source

TICK = 1.0  # seconds between two looks at the stall clock


@dataclasses.dataclass
class Numbers:
    """Where the next connection goes on counting, so that segments and indices only grow."""

    segment: int = 0
    index: int = 0


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to read and how. `finite` is what is known before it is open."""

    camera: str
    shown: str
    make: Callable[[], Source]
    finite: bool
    spec: ReaderSpec
    clock: Clock


class Keeper:
    """Its thread opens, watches, waits and opens again. It never reads itself, so that nothing holds it up."""

    def __init__(self, plan: Plan, ledger: Ledger, numbers: Numbers) -> None:
        self.buffer = FrameBuffer(plan.spec.buffer)
        self._plan, self._ledger, self._numbers = plan, ledger, numbers
        self._backoff = Backoff(plan.spec)
        self._stop, self._wake = threading.Event(), threading.Event()
        self._connection: Connection | None = None
        self.thread = threading.Thread(target=self._run, name=f"camera-{plan.camera}", daemon=True)

    def stop(self, timeout: float) -> bool:
        """False if a thread was still held by the operating system after so many seconds."""
        clock = self._plan.clock
        late = clock.monotonic() + timeout
        self._stop.set()
        self._wake.set()
        lost = self.buffer.close()
        if threading.current_thread() is not self.thread:
            self.thread.join(timeout)
        connection = self._connection
        if connection is not None:
            connection.cut()
        done = connection is None or connection.done.wait(max(0.0, late - clock.monotonic()))
        self._ledger.end(lost)
        return done

    def _run(self) -> None:
        self._ledger.turn("connecting")
        failure: SourceError | None = None
        finite = False
        while not self._stop.is_set() and not finite:
            failure, online, finite = self._connect()
            if failure is None or finite:
                continue
            if not self._plan.clock.sleep(self._backoff.after(failure, online), self._stop):
                self._ledger.reconnect(failure.code)
        self.buffer.finish()
        self._ledger.turn(*(("stopped", None) if self._stop.is_set() else ("ended", failure)))

    def _connect(self) -> tuple[SourceError | None, float, bool]:
        """One connection, from opening to its end. The failure that ended it, the seconds it was online, and whether
        that was all there is to read."""
        connection = self._connection = self._new()
        online: float | None = None
        failure: SourceError | None = None
        done = False
        while failure is None and not done and not self._stop.is_set():
            self._doze()
            done = connection.done.is_set()  # before the look at `showing`, or a short life would go unseen
            if online is None and connection.showing:
                online = self._plan.clock.monotonic()
                self._ledger.turn("online", info=connection.info)
            failure = connection.failure if done else connection.stalled(self._plan.spec)
        finite = self._plan.finite if connection.info is None else connection.info.finite
        if failure is not None and not finite and not self._stop.is_set():
            self._ledger.turn("offline", failure)
        connection.cut()
        while not connection.done.is_set() and not self._stop.is_set():
            self._doze()  # never a second one while the first is still held: a dead device would eat all threads
        self._numbers.index += connection.tally.decoded
        return failure, 0.0 if online is None else self._plan.clock.monotonic() - online, finite

    def _new(self) -> Connection:
        plan, base, segment = self._plan, self._numbers.index, self._numbers.segment
        connection = Connection(plan.camera, plan.shown, plan.make, plan.clock)

        def put(frame: Frame, live: bool) -> bool:
            self._numbers.segment = segment + frame.segment + 1
            frame = dataclasses.replace(frame, index=base + frame.index, segment=segment + frame.segment)
            return self._put(frame, live, connection.tally)

        connection.start(put, self._wake.set)
        self._ledger.begin(connection.tally)
        return connection

    def _put(self, frame: Frame, live: bool, tally: Tally) -> bool:
        before = self.buffer.overrun
        kept = self.buffer.put(frame, live)
        if self.buffer.overrun > before:
            tally.drop("overrun")
        if not kept:
            tally.drop("stopped")
        return kept

    def _doze(self) -> None:
        self._wake.wait(min(TICK, self._plan.spec.read_timeout / 4))
        self._wake.clear()
