"""Watches cameras for a long time and says what grew, what was lost and what was dropped, as one line of JSON.

    python -m benchmarks.soak BUNDLE --minutes 30                    # test pictures, and a clip over and over
    python -m benchmarks.soak BUNDLE --minutes 600 --uri rtsp://...  # real cameras instead

Every event goes to a JSONL file and, where mosquitto is installed, over MQTT to a listener, and both are counted
against what the watcher made. Every few seconds a question is asked, and each minute a camera is paused and resumed.

Slopes by the hour are straight lines through each minute's least, after the first third, with their standard error.
`rss` is what the process holds, kept close to what it uses as `watch` and `serve` do it (runtime/allocator.py); `heap`
is what native code and arrays use of it (glibc's mallinfo2), and `blocks` are Python's own objects: a leak makes one of
these two grow. Of the blocks this script's own notes are one an event and six a sample. Linux only.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dycoke_edge import Camera, CameraWatcher, Rule, VideoLLM
from dycoke_edge.runtime.allocator import keep_small
from dycoke_edge.runtime.sinks.jsonl import JsonlSink
from dycoke_edge.runtime.sinks.mqtt import MqttSink

URIS = ["test://?fps=10&motion=3&noise=2", "test://?fps=10&motion=0", "test://?fps=10&cut=7", "examples/clip.mp4"]
RULES = [
    Rule("moving", "Is anything moving?", threshold=0.5, clear_threshold=0.5, cooldown_s=10, update_s=10, min_mass=0),
    Rule("person", "Is a person in view?", consecutive=1, cooldown_s=5, min_mass=0),
]
MALLINFO = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"  # glibc's struct mallinfo2
SAMPLE_S, QUESTION_S, PAUSE_S = 2.0, 7.0, 60.0


@dataclass
class Samples:
    """What the process held, over time."""

    at: list[float] = field(default_factory=list)
    rss_mib: list[float] = field(default_factory=list)
    heap_mib: list[float] = field(default_factory=list)
    blocks: list[float] = field(default_factory=list)
    fds: list[int] = field(default_factory=list)
    threads: list[int] = field(default_factory=list)

    def take(self, now: float) -> None:
        """One more."""
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        self.at.append(now)
        self.rss_mib.append(pages * os.sysconf("SC_PAGE_SIZE") / 2**20)
        self.heap_mib.append(heap_bytes() / 2**20)
        self.blocks.append(float(sys.getallocatedblocks()))
        self.fds.append(len(os.listdir("/proc/self/fd")))
        self.threads.append(threading.active_count())

    def summary(self) -> dict[str, Any]:
        """Without the first third, in which buffers and arenas fill."""
        start = len(self.at) // 3
        rss = self.rss_mib[start:]
        return {
            "rss_mib": {"first": round(rss[0], 1), "last": round(rss[-1], 1), "most": round(max(rss), 1)},
            "rss_mib_per_hour": self._slope(self.rss_mib, start),
            "heap_mib_per_hour": self._slope(self.heap_mib, start),
            "blocks_per_hour": self._slope(self.blocks, start),
            "fds": _span(self.fds[start:]),
            "threads": _span(self.threads[start:]),
        }

    def _slope(self, values: list[float], start: int) -> dict[str, float] | None:
        """By the hour, through the least of each minute: what stays when nothing is open for a moment."""
        minutes = dict[int, float]()
        for at, value in zip(self.at[start:], values[start:], strict=True):
            minutes[int(at // 60)] = min(value, minutes.get(int(at // 60), value))
        if len(minutes) < 4:
            return None
        (slope, _), covariance = np.polyfit(np.array(list(minutes)) / 60, list(minutes.values()), 1, cov=True)
        return {"slope": round(float(slope), 2), "error": round(float(covariance[0, 0]) ** 0.5, 2)}


class Heap(ctypes.Structure):
    """What mallinfo2 returns."""

    _fields_ = [(name, ctypes.c_size_t) for name in MALLINFO.split()]


def heap_bytes() -> int:
    """In use, of all arenas and of what malloc mapped."""
    libc = ctypes.CDLL(None)
    libc.mallinfo2.restype = Heap
    heap = libc.mallinfo2()
    return int(heap.uordblks + heap.hblkhd)


def _span(values: list[int]) -> dict[str, int]:
    return {"least": min(values), "most": max(values), "last": values[-1]}


class Heard:
    """Listens to every event on a broker."""

    def __init__(self, port: int) -> None:
        from paho.mqtt import client as mqtt
        from paho.mqtt.enums import CallbackAPIVersion

        self.ids = set[str]()
        self._ready = threading.Event()
        self._client = mqtt.Client(CallbackAPIVersion.VERSION2)
        self._client.on_connect = lambda client, *rest: client.subscribe("dycoke/events", qos=1)
        self._client.on_subscribe = lambda *arguments: self._ready.set()
        self._client.on_message = lambda client, data, message: self.ids.add(json.loads(message.payload)["id"])
        self._client.connect("127.0.0.1", port)
        self._client.loop_start()
        assert self._ready.wait(30), "the broker does not answer"

    def close(self) -> None:
        """Leave, when nothing more comes."""
        count = -1
        while count != len(self.ids):
            count = len(self.ids)
            time.sleep(0.5)
        self._client.disconnect()
        self._client.loop_stop()


@contextmanager
def broker(mosquitto: str) -> Iterator[int]:
    """Run one on a free port of loopback."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    process = subprocess.Popen([mosquitto, "-p", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(100):
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                time.sleep(0.05)
        yield port
    finally:
        process.terminate()
        process.wait()


def soak(bundle: Path, seconds: float, uris: list[str], port: int | None, folder: Path) -> dict[str, Any]:
    """Watch for so long; returns what is printed."""
    cameras = [
        Camera(f"camera{i}", uri, fps=2, window_s=4, every_s=2, prompt="What happens?", max_new_tokens=8, realtime=True)
        for i, uri in enumerate(uris)
    ]
    log = JsonlSink(folder / "events.jsonl", max_bytes=2**20, keep=1000)
    sinks: list[Any] = [log] + ([MqttSink("127.0.0.1", port, qos=1)] if port else [])
    heard = Heard(port) if port else None
    watcher = CameraWatcher(VideoLLM.load(bundle), cameras, RULES, sinks)
    samples, answers, oldest = Samples(), Counter[str](), 0.0
    began = time.monotonic()
    next_question, next_pause = QUESTION_S, PAUSE_S
    with watcher:
        while (now := time.monotonic() - began) < seconds:
            samples.take(now)
            status = watcher.status()
            oldest = max([oldest, *(camera["answer_age_s"] or 0.0 for camera in status["cameras"].values())])
            if now >= next_question:
                next_question += QUESTION_S
                answers[watcher.ask(cameras[int(now) % len(cameras)].id, "What is it?", timeout=60).status] += 1
            restart = [name for name, camera in status["cameras"].items() if camera["state"] == "ended"]
            if now >= next_pause:
                next_pause += PAUSE_S
                restart.append(cameras[int(now) % len(cameras)].id)
            for name in restart:
                watcher.pause(name)
                watcher.resume(name)
            time.sleep(SAMPLE_S)
    if heard:
        heard.close()
    status = watcher.status()
    made = sum(status["events"].values())
    written = {json.loads(line)["id"] for file in folder.iterdir() for line in file.read_text().splitlines()}
    total = Counter[str]()
    dropped, frames = Counter[str](), Counter[str]()
    for camera in status["cameras"].values():
        total.update({key: camera[key] for key in ("windows", "frames", "failures")})
        dropped.update(camera["dropped_windows"])
        frames.update(camera["dropped_frames"])
    return {
        "minutes": round((time.monotonic() - began) / 60, 2),
        "cameras": len(cameras),
        **samples.summary(),
        "events": made,
        "events_lost": {"jsonl": made - len(written), "mqtt": made - len(heard.ids) if heard else None},
        "sinks": status["sinks"],
        "windows": total["windows"],
        "windows_dropped": dict(dropped),
        "frames": total["frames"],
        "frames_dropped": dict(frames),
        "failures": total["failures"],
        "answers": dict(answers),
        "answer_age_s_most": round(oldest, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--uri", action="append", help="a camera; may be given several times")
    args = parser.parse_args()
    mosquitto = shutil.which("mosquitto", path=os.environ["PATH"] + ":/usr/sbin")
    if mosquitto is None:
        print("no mosquitto, so MQTT is left out", file=sys.stderr)
    keep_small()
    with tempfile.TemporaryDirectory() as folder, broker(mosquitto) if mosquitto else nullcontext() as port:
        print(json.dumps(soak(args.bundle, args.minutes * 60, args.uri or URIS, port, Path(folder))))


if __name__ == "__main__":
    main()
