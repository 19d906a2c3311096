"""Starts and stops the RTSP server of `rtsp_server.py`, in Debian's own Python."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any

import av
import pytest

PYTHON = "/usr/bin/python3"
SCRIPT = Path(__file__).with_name("rtsp_server.py")
NEEDS = "import gi; gi.require_version('GstRtspServer', '1.0'); from gi.repository import GstRtspServer"


@functools.cache
def available() -> bool:
    """Whether the packages of `make services` are here."""
    if not Path(PYTHON).exists():
        return False
    return subprocess.run([PYTHON, "-c", NEEDS], capture_output=True).returncode == 0


def need() -> None:
    """Skips a test where the server is not installed; with CI=true it fails."""
    if not available():
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)("no gst-rtsp-server: make services")


class RtspServer:
    """A camera: rtsp://127.0.0.1:`port`/stream. A context manager; `kill` and `start` are a power cut, `freeze` and
    `thaw` a hang."""

    def __init__(self, *options: str, user: str = "", password: str = "") -> None:
        self._options = [*options, *(["--user", user, "--password", password] if user else [])]
        self._process: subprocess.Popen[str] | None = None
        self.port = 0

    @property
    def url(self) -> str:
        return f"rtsp://127.0.0.1:{self.port}/stream"

    def start(self, *options: str) -> None:
        """On the same port as before; with other options if any are given."""
        self._options = list(options) or self._options
        command = [PYTHON, str(SCRIPT), *self._options, "--port", str(self.port)]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert self._process.stdout is not None
        self.port = int(self._process.stdout.readline())

    def kill(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()

    def freeze(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def __enter__(self) -> RtspServer:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.kill()


def transcode(source: Path, target: Path, frames: int, size: tuple[int, int], rate: int = 10) -> Path:
    """The first frames of a video as H.264 in an .mp4, a key frame every two seconds, as cameras send it."""
    with av.open(str(source)) as video, av.open(str(target), "w") as out:
        stream: Any = out.add_stream(
            "libx264", rate=rate, options={"bf": "0", "g": str(2 * rate), "preset": "veryfast"}
        )
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for index, frame in zip(range(frames), video.decode(video=0), strict=False):
            scaled = frame.reformat(*size, "yuv420p")
            scaled.pts, scaled.time_base = index, Fraction(1, rate)
            out.mux(stream.encode(scaled))
        out.mux(stream.encode(None))
    return target
