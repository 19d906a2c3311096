"""A reading process that finds no room, in each of the ways that a full disk shows."""

from __future__ import annotations

import errno
from contextlib import suppress
from typing import Any

from dycoke_edge.errors import InputError
from dycoke_edge.runtime.serve import child, media


class Full:
    """A temporary file on a full disk: it can be made, and takes nothing."""

    def __init__(self, prefix: str) -> None:
        self.name = "/dev/full"
        self._file = open("/dev/full", "wb")  # noqa: SIM115

    def __enter__(self) -> Any:
        return self._file

    def __exit__(self, *exception: object) -> None:
        with suppress(OSError):
            self._file.close()


def no_folder(prefix: str) -> Any:
    raise FileNotFoundError(2, "No usable temporary directory found in ['/tmp']")


def no_quota(*arguments: Any) -> Any:
    """What a decoder makes of it."""
    try:
        raise OSError(errno.EDQUOT, "Disk quota exceeded")
    except OSError as error:
        raise InputError("it cannot be read; copy it again") from error


def main(descriptor: int, name: str, instead: str) -> None:
    """Read with a function of `media` replaced by one from here."""
    setattr(media, name, globals()[instead])
    child.main(descriptor)
