"""A folder that is written beside its target and takes its place when all of it is there."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dycoke_edge.errors import BundleError, UsageError

ALMOST_FULL = 1 << 20  # bytes


@contextmanager
def partial(target: Path, work: str, remedy: str) -> Iterator[Path]:
    """A temporary folder beside the target: gone after any failure, even the leftover of a killed run.

    Folders above the target are made, and on failure removed again. `work` names what is done ("export"), `remedy`
    says what to do where the target cannot be written ("choose another BUNDLE"). UsageError if another process writes
    the same target, BundleError if the disk is full or refuses.
    """
    folder = target.with_name(f".{target.name}.partial")
    made = [parent for parent in folder.parents if not os.path.lexists(parent)]
    lock = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = _lock(folder, target, work, remedy)
        _empty(folder)
        yield folder
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT) or (error.errno is None and _full(folder)):
            raise BundleError(f"disk full while writing {target}; free some space or {remedy}") from None
        raise BundleError(f"cannot write {target}: {error.strerror or error}; {remedy}") from None
    finally:
        if lock is not None:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)
        with suppress(OSError):  # the first that is not empty ends it, after a success the nearest
            for parent in made:
                parent.rmdir()


def _lock(folder: Path, target: Path, work: str, remedy: str) -> int:
    """Hold the folder for this process; the system lets go of it when the process ends, however it ends."""
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise UsageError(f"another {work} is writing {target}; wait for it or {remedy}") from None
    return lock


def _empty(folder: Path) -> None:
    """Remove what a killed run left."""
    for leftover in folder.iterdir():
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


def _full(folder: Path) -> bool:
    """For errors without a number, such as those of numpy's writer."""
    return shutil.disk_usage(folder).free < ALMOST_FULL
