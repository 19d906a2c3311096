"""FrameBuffer: the few frames between the thread that decodes and the one that looks."""

from __future__ import annotations

import threading
from collections import deque

from dycoke_edge.runtime.camera.frame import Frame


class FrameBuffer:
    """Holds `size` frames. A live stream never waits: its oldest frame goes. Anything else waits for room, and loses
    nothing. One thread puts, any thread takes."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._frames: deque[Frame] = deque()
        self._changed = threading.Condition()
        self._over = False
        self.overrun = 0  # frames lost because nobody took them in time

    def put(self, frame: Frame, live: bool) -> bool:
        """False if the buffer is closed; then the frame is not kept."""
        with self._changed:
            while not live and len(self._frames) >= self._size and not self._over:
                self._changed.wait()
            if self._over:
                return False
            if len(self._frames) >= self._size:
                self._frames.popleft()
                self.overrun += 1
            self._frames.append(frame)
            self._changed.notify_all()
            return True

    def take(self, timeout: float) -> Frame | None:
        """The oldest frame; None if there is none for `timeout` seconds, or will be none."""
        with self._changed:
            self._changed.wait_for(lambda: self._frames or self._over, timeout)
            if not self._frames:
                return None
            self._changed.notify_all()
            return self._frames.popleft()

    def finish(self) -> None:
        """No frame will be put any more; those inside can still be taken."""
        with self._changed:
            self._over = True
            self._changed.notify_all()

    def close(self) -> int:
        """Nor taken; the number of frames that are lost by this."""
        with self._changed:
            lost = len(self._frames)
            self._over = True
            self._frames.clear()
            self._changed.notify_all()
            return lost

    @property
    def drained(self) -> bool:
        with self._changed:
            return self._over and not self._frames
