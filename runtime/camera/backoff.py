"""Backoff: how long to wait before the next try."""

from __future__ import annotations

import random

from dycoke_edge.config_camera import ReaderSpec
from dycoke_edge.runtime.camera.failure import SourceError

JITTER = 0.2  # cameras that went down together do not come back together


class Backoff:
    """Doubles from `retry_first` to `retry_most`; begins there after a failure that haste would not mend, such as a
    wrong password; begins anew after a healthy stretch."""

    def __init__(self, spec: ReaderSpec, draw: random.Random | None = None) -> None:
        self._spec = spec
        self._draw = draw if draw is not None else random.Random()
        self._next = spec.retry_first

    def after(self, failure: SourceError, online: float) -> float:
        """Seconds to wait after a failure that followed so many seconds online."""
        if online >= self._spec.healthy:
            self._next = self._spec.retry_first
        most = self._spec.retry_most
        if failure.patient:
            return most * (1 + self._draw.uniform(0, JITTER))  # never more often, for accounts get locked
        delay = min(self._next, most)
        self._next = min(delay * 2, most)
        return delay * (1 + self._draw.uniform(-JITTER, JITTER))
