"""What a long-lived process does about glibc's arenas."""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# 8 threads that allocate and free 30 MiB each in small pieces, one after another; then what the process holds.
SCRIPT = """
import ctypes, json, sys, threading, time
from dycoke_edge.runtime.allocator import keep_small
if sys.argv[1] == "small":
    assert keep_small(0.1)
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
pages = lambda: int(open("/proc/self/statm").read().split()[1])
ready, go = threading.Barrier(9), threading.Event()
def work():
    held = [libc.malloc(4000) for _ in range(8000)]
    for address in held: ctypes.memset(address, 1, 4000)
    for address in held[:-1]: libc.free(address)
    ready.wait()
    go.wait()
before = pages()
threads = [threading.Thread(target=work, daemon=True) for _ in range(8)]
for thread in threads: thread.start()
ready.wait()
for _ in range(50):
    held = pages() - before
    if held * 4096 < 60 << 20 or sys.argv[1] != "small": break
    time.sleep(0.1)
print(json.dumps(held * 4096 / 2**20))
go.set()
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="the C library is not glibc")
def test_free_memory_goes_back_to_the_system() -> None:
    plain, small = (
        json.loads(
            subprocess.run([sys.executable, "-c", SCRIPT, how], capture_output=True, check=True, cwd=ROOT).stdout
        )
        for how in ("plain", "small")
    )
    assert plain > 150 and small < 60  # MiB, of 240 that were freed
