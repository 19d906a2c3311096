"""Every error a user can cause, in one tree.

DycokeEdgeError
├── UsageError       exit 2   an option or argument that cannot be used
│   └── KVOverflow   exit 2   the request does not fit the KV buffer
├── InputError       exit 3   a video, image or checkpoint that cannot be read
│   └── StaleError   exit 3   a camera without recent video
├── BundleError      exit 4   a bundle that is missing, damaged, foreign or newer
│   └── ReplacedError exit 4   a bundle that was replaced, changed or removed while it was in use
├── EngineError      exit 4   an inference engine that is not there or failed
│   └── UnavailableError exit 4   nobody who answers: a watcher that was stopped, or whose model's library fell over
└── BusyError        exit 4   more questions are waiting than the line holds, or an answer lies half read

Each text is one line that names the option or file and a value that works. Our own bugs are `assert`s.
"""

from __future__ import annotations


class DycokeEdgeError(Exception):
    """Base of all errors of this package; `exit_code` is what the command line returns."""

    exit_code = 1


class UsageError(DycokeEdgeError, ValueError):
    """An option or argument that cannot be used."""

    exit_code = 2


class KVOverflow(UsageError):
    """The KV buffer has no room for the rows asked for."""

    def __init__(self, needed: int, capacity: int) -> None:
        super().__init__(
            f"kv_capacity={capacity} rows (--kv-capacity) is too small: this request needs {needed}; "
            f"use --kv-capacity {needed}, fewer frames or a higher --merge-ratio"
        )
        self.needed = needed
        self.capacity = capacity


class InputError(DycokeEdgeError, ValueError):
    """A video, image or checkpoint that cannot be read."""

    exit_code = 3


class BundleError(DycokeEdgeError, RuntimeError):
    """A bundle that is missing, damaged, foreign, newer, or that could not be written."""

    exit_code = 4


class ReplacedError(BundleError):
    """A bundle that was replaced, changed or removed while it was in use. It stays so until it is loaded again."""

    brief = "the bundle was replaced; restart"  # for who must not see paths


class EngineError(DycokeEdgeError, RuntimeError):
    """An inference engine that is not available or that failed."""

    exit_code = 4


class UnavailableError(EngineError):
    """Nobody answers now: the watcher was stopped, or a library of its model fell over."""


class StaleError(InputError):
    """A camera without recent video; old frames are never used instead."""


class BusyError(DycokeEdgeError, RuntimeError):
    """More questions are waiting for the model than the line holds, or another thread has left an answer half read; try
    again in `retry_after_s` seconds."""

    exit_code = 4

    def __init__(self, text: str, retry_after_s: float) -> None:
        super().__init__(text)
        self.retry_after_s = retry_after_s
