"""Events in a file, one JSON object a line."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

from dycoke_edge.errors import UsageError
from dycoke_edge.runtime.camera.events import Event
from dycoke_edge.runtime.sinks.bounded import FOR_EVER, BoundedSink, Transient


class JsonlSink(BoundedSink):
    """Appends to `path`; a file that would pass `max_bytes` becomes path.1, that path.2, and so on up to `keep`.

    A full disk costs nothing but counted failures: a line that was not written whole is taken back and tried again.
    The file is opened for every event, so whatever renames or removes it meanwhile does no harm.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        max_bytes: int = 10_000_000,
        keep: int = 5,
        fsync: bool = False,
        capacity: int = 1000,
        backoff: tuple[float, float] = (1.0, 60.0),
    ) -> None:
        self.path = Path(path)
        super().__init__(f"jsonl {self.path.name}", capacity, FOR_EVER, backoff)
        self._max_bytes, self._keep, self._fsync = max_bytes, keep, fsync
        if max_bytes < 1 or keep < 1:
            raise UsageError(
                f"max_bytes={max_bytes} and keep={keep} must be 1 or more, e.g. max_bytes=10000000, keep=5"
            )
        try:
            self.path.open("ab").close()
        except OSError as error:
            raise UsageError(f"{self.path}: {error.strerror}; use a file in a folder that can be written") from None

    def deliver(self, event: Event) -> None:
        """Append one line, or leave the file as it was."""
        line = event.to_json().encode() + b"\n"
        try:
            self._rotate(len(line))
            with self.path.open("ab", buffering=0) as file:
                before = file.seek(0, os.SEEK_END)
                try:
                    self._write(file.fileno(), line)
                except OSError:
                    os.ftruncate(file.fileno(), before)
                    raise
        except OSError as error:
            raise Transient(f"{self.path.name}: {error.strerror}") from None

    def _write(self, file: int, line: bytes) -> None:
        written = 0
        while written < len(line):
            written += os.write(file, line[written:])
        if self._fsync:
            os.fsync(file)

    def _rotate(self, more: int) -> None:
        size = self.path.stat().st_size if self.path.exists() else 0
        if size == 0 or size + more <= self._max_bytes:
            return
        names = [self.path, *(self.path.with_name(f"{self.path.name}.{i}") for i in range(1, self._keep + 1))]
        for younger, older in reversed(list(itertools.pairwise(names))):
            if younger.exists():
                younger.replace(older)
