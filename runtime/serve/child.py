"""What runs in a process of its own: decoding of what strangers sent, with little to break and nothing to keep."""

from __future__ import annotations

import gc
import json
import math
import os
import re
import resource
import tempfile
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dycoke_edge.errors import InputError, UsageError
from dycoke_edge.runtime import allocator
from dycoke_edge.runtime.serve.media import Frames, Media
from dycoke_edge.runtime.serve.room import full_disk

READY = b"ready"


def main(descriptor: int) -> None:
    """Answer calls of Media's methods until the server hangs up. Calls come pickled; answers, which whoever broke a
    decoder might forge, are JSON and bytes."""
    connection = Connection(descriptor)
    spec, size, tempfile.tempdir = connection.recv()
    media = Media(spec, size)
    Image.init()
    allocator.return_pictures()
    _limit(spec.read_memory_mb)
    connection.send_bytes(READY)
    while True:
        try:
            name, arguments, seconds = connection.recv()
        except EOFError:
            return
        _limit_time(seconds)
        facts, frames = _answer(media, name, arguments)
        connection.send_bytes(json.dumps(facts).encode())
        if frames is not None:
            connection.send_bytes(frames.data.cast("B"))
        del frames
        gc.collect()  # decoders lie in cycles; left there, they would count as memory that the next call takes


def _answer(media: Media, name: str, arguments: tuple[Any, ...]) -> tuple[dict[str, Any], Frames | None]:
    try:
        frames = np.ascontiguousarray(getattr(media, name)(*arguments))
        return {"shape": frames.shape}, frames
    except MemoryError:
        return {"memory": True}, None
    except Exception as error:
        return _told(error), None


def _told(error: Exception) -> dict[str, Any]:
    """An error in the server's words."""
    if (full := full_disk(error)) is not None:
        return {"full": full.strerror}
    if isinstance(error, UsageError | InputError):
        return {"usage": isinstance(error, UsageError), "says": str(error)}
    return {"bug": "".join(traceback.format_exception(error))}


def _limit(megabytes: int) -> None:
    """Let this process have so much more memory than now. When the machine runs out of it, this is the first to go."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if os.path.exists("/proc/self/status"):
        found = re.search(r"VmData:\s+(\d+) kB", Path("/proc/self/status").read_text())
        most = (int(found[1]) << 10 if found else 0) + (megabytes << 20)
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))
        Path("/proc/self/oom_score_adj").write_text("1000")


def _limit_time(seconds: float) -> None:
    """Let this process compute for so long at most, should nobody be left to end it."""
    spent = resource.getrusage(resource.RUSAGE_SELF)
    most = spent.ru_utime + spent.ru_stime + seconds * (os.cpu_count() or 1)
    resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(most) + 1, resource.RLIM_INFINITY))
