"""Whose turn it is: one thread makes every call of the model, questions first, cameras in turn after them."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import TypeVar

from dycoke_edge.errors import BusyError, DycokeEdgeError, EngineError

T = TypeVar("T")
Work = Callable[[], bool]  # one unit of a camera's work; False if there was none
PIECES = 1024  # pieces that may wait for whoever reads an answer


class Question:
    """A generator that the model thread runs for another thread, piece by piece."""

    def __init__(self, start: Callable[[], Iterator[object]]) -> None:
        self._start = start
        self._pieces: queue.Queue[object] = queue.Queue(PIECES)
        self._cancelled = threading.Event()
        self._over = threading.Event()

    def cancel(self) -> None:
        """Nobody reads on: the model thread closes the generator at the next piece."""
        self._cancelled.set()

    @property
    def over(self) -> bool:
        """True once answered, failed or given up."""
        return self._over.is_set()
