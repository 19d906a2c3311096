"""Keeps what a process holds of the system's memory close to what it uses. glibc only."""

from __future__ import annotations

import ctypes
import threading

M_MMAP_THRESHOLD, M_ARENA_MAX = -3, -8  # of malloc.h
ARENAS = 2
LARGE = 1 << 20  # bytes
EVERY_S = 60.0


def keep_small(every_s: float = EVERY_S) -> bool:
    """For the owner of a process, at its start: few arenas, and free pages handed back every minute by a thread.

    glibc gives every thread an arena that grows and is hardly ever given back: with four cameras a process grew by 54
    to 116 MiB an hour while what it used stayed the same (benchmarks/NOTES.md). False where the C library is another.
    """
    library = ctypes.CDLL(None)
    if not hasattr(library, "malloc_trim") or not library.mallopt(M_ARENA_MAX, ARENAS):
        return False

    def trim() -> None:
        while not stop.wait(every_s):
            library.malloc_trim(0)

    stop = threading.Event()
    threading.Thread(target=trim, name="dycoke trim", daemon=True).start()
    return True


def trim() -> None:
    """Hand free pages back now, after something large. Nothing where the C library is another."""
    if hasattr(library := ctypes.CDLL(None), "malloc_trim"):
        library.malloc_trim(0)


def return_pictures() -> bool:
    """For a process that reads one picture or film after another: blocks of LARGE and more go back to the system once
    they are freed. glibc would take those of up to 32 MiB from its heap, once it has seen one freed, and there smaller
    ones in use hold them. False where the C library is another."""
    library = ctypes.CDLL(None)
    return bool(hasattr(library, "malloc_trim") and library.mallopt(M_MMAP_THRESHOLD, LARGE))
