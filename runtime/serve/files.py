"""Files that requests may name: regular ones below the allowed folders, whatever links lead to them."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote, urlsplit

from dycoke_edge.errors import InputError, UsageError

REFUSED = "this file:// URL is not allowed; server.file_dirs names the folders whose files may be asked about"


class AllowedFiles:
    """The folders out of the configuration."""

    def __init__(self, folders: Sequence[str], max_bytes: int) -> None:
        self._folders = [Path(folder).resolve() for folder in folders]
        self._max_bytes = max_bytes

    @contextmanager
    def opened(self, url: str) -> Iterator[Path]:
        """A path that leads to the file of a file:// URL and to no other, also when names are changed meanwhile: it is
        opened first and then asked where it is. UsageError for one outside, InputError for one that cannot be read."""
        parts = urlsplit(url)
        if parts.netloc not in ("", "localhost") or not self._folders:
            raise UsageError(REFUSED)
        try:
            name = os.path.realpath(unquote(parts.path))
            if not self._inside(Path(name)):  # not even opened: a device may act on that
                raise UsageError(REFUSED)
            file = os.open(name, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
        except (OSError, ValueError):
            raise InputError("the file of this URL cannot be read; check its path and permissions") from None
        try:
            link = f"/proc/self/fd/{file}"
            facts = os.fstat(file)
            if not self._inside(Path(os.path.realpath(link))):
                raise UsageError(REFUSED)
            if not stat.S_ISREG(facts.st_mode):
                raise InputError("the file of this URL is no regular file; give a video or picture")
            if facts.st_size > self._max_bytes:
                raise InputError(f"the file of this URL has {facts.st_size} bytes; at most {self._max_bytes}")
            yield Path(link)
        finally:
            os.close(file)

    def _inside(self, path: Path) -> bool:
        return any(path.is_relative_to(folder) and path != folder for folder in self._folders)
