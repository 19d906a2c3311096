"""A camera that loses power again and again: does its reader come back each time, and does anything grow?

    python -m benchmarks.reconnect [--cycles 50] [--file CLIP]

Needs the RTSP server of `make services`. Prints a line of JSON for every tenth cycle and one at the end; fails if
threads or file descriptors grow, or memory by more than 16 MiB after the first ten cycles.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from dycoke_edge.config_camera import ReaderSpec
from dycoke_edge.runtime.camera.reader import CameraReader
from tests.clips import write_clip
from tests.servers.rtsp import RtspServer

PATIENCE = 60.0
GROWTH = 16.0  # MiB


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cycles", type=int, default=50)
    parser.add_argument("--file", type=Path, help="an .mp4 of H.264; a made-up one if left out")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        size = (640, 480)
        clip = args.file or write_clip(Path(folder) / "clip.mp4", frames=600, rate=10, size=size, options={"g": "10"})
        return run(clip, args.cycles)


def run(clip: Path, cycles: int) -> int:
    spec = ReaderSpec(size=384, read_timeout=2, stall_timeout=5, retry_first=0.1, retry_most=0.5)
    rows: list[dict[str, float]] = []
    with RtspServer("--file", str(clip)) as server:
        reader = CameraReader("front", server.url, spec).start()
        try:
            for cycle in range(cycles + 1):
                frames = reader.status().frames
                wait_for(reader, "online")
                wait(lambda: reader.status().frames > frames + 10)  # noqa: B023
                rows.append({"cycle": cycle, **resources()})
                if cycle % 10 == 0:
                    print(json.dumps(rows[-1]), flush=True)
                server.kill()
                wait_for(reader, "offline")
                server.start()
        finally:
            reader.stop()
    status = reader.status()
    base, last = rows[min(10, len(rows) - 1)], rows[-1]
    grown = {key: round(last[key] - base[key], 1) for key in ("threads", "descriptors", "rss_mib")}
    verdict = {"cycles": cycles, "frames": status.frames, "reconnects": status.reconnects, "grown": grown}
    print(json.dumps(verdict))
    return int(grown["threads"] > 0 or grown["descriptors"] > 0 or grown["rss_mib"] > GROWTH)


def wait_for(reader: CameraReader, state: str) -> None:
    wait(lambda: reader.status().state == state)


def wait(happened: Callable[[], bool]) -> None:
    late = time.monotonic() + PATIENCE
    while not happened():
        if time.monotonic() > late:
            raise SystemExit("the camera did not come back")
        time.sleep(0.02)


def resources() -> dict[str, float]:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    rss = pages * os.sysconf("SC_PAGE_SIZE") / 2**20
    return {
        "threads": threading.active_count(),
        "descriptors": len(os.listdir("/proc/self/fd")),
        "rss_mib": round(rss, 1),
    }


if __name__ == "__main__":
    sys.exit(main())
