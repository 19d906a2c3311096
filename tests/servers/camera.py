"""A small RTSP camera: H.264 over TCP in the connection itself, enough for FFmpeg. Tests put their own answers in."""

from __future__ import annotations

import base64
import socket
import ssl
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from time import sleep

import av
import numpy as np

RATE = 10
Answer = Callable[[str, str], bytes | None]  # method and sequence number to an answer of the test's own


def pictures(size: tuple[int, int] = (64, 48), frames: int = 40) -> list[list[bytes]]:
    """H.264: the units of each frame."""
    context = av.CodecContext.create("libx264", "w")
    context.width, context.height = size
    context.pix_fmt, context.time_base = "yuv420p", Fraction(1, RATE)
    context.options = {"bf": "0", "g": "5", "tune": "zerolatency", "x264-params": "sliced-threads=0:slices=1"}
    made = list[list[bytes]]()
    for number in range(frames + 1):
        image = np.full((size[1], size[0], 3), number * 5 % 256, np.uint8)
        frame = av.VideoFrame.from_ndarray(image, "rgb24").reformat(format="yuv420p") if number < frames else None
        if frame is not None:
            frame.pts = number
        for packet in context.encode(frame):
            units = bytes(packet).replace(b"\0\0\0\1", b"\0\0\1").split(b"\0\0\1")
            made.append([unit for unit in units if unit and unit[0] & 31 in (1, 5, 7, 8)])
    return made


class Camera:
    """Accepts connections on `host`; `asked` are the requests of all of them, in full."""

    def __init__(self, answer: Answer, host: str, context: ssl.SSLContext | None) -> None:
        self.asked = list[str]()
        self.connections = 0
        self._answer, self._context = answer, context
        self._pictures = pictures()
        self._listening = socket.create_server((host, 0))
        self.port: int = self._listening.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Listen no more."""
        self._listening.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listening.accept()
            except OSError:
                return
            self.connections += 1
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        try:
            if self._context is not None:
                connection = self._context.wrap_socket(connection, server_side=True)
            with connection, connection.makefile("rb") as requests:
                while request := _request(requests):
                    self.asked.append(request)
                    connection.sendall(self._answered(request))
                    if request.startswith("PLAY"):
                        self._play(connection)
                        return
        except (OSError, ValueError):
            pass  # the client had enough, or speaks something else

    def _answered(self, request: str) -> bytes:
        method = request.split()[0]
        number = request.lower().partition("cseq: ")[2].split("\r\n")[0]
        given = self._answer(method, number)
        if given is not None:
            return given
        head = f"RTSP/1.0 200 OK\r\nCSeq: {number}\r\n"
        if method == "DESCRIBE":
            sets = ",".join(base64.b64encode(unit).decode() for unit in self._pictures[0] if unit[0] & 31 in (7, 8))
            sdp = (
                "v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\ns=x\r\nt=0 0\r\nm=video 0 RTP/AVP 96\r\na=rtpmap:96 H264/90000\r\n"
            )
            sdp += f"a=fmtp:96 packetization-mode=1;sprop-parameter-sets={sets}\r\na=control:track1\r\n"
            return f"{head}Content-Type: application/sdp\r\nContent-Length: {len(sdp)}\r\n\r\n{sdp}".encode()
        more = {"SETUP": "Transport: RTP/AVP/TCP;unicast;interleaved=0-1\r\nSession: 1\r\n"}
        return f"{head}{more.get(method, 'Session: 1')}\r\n\r\n".replace("\r\n\r\n\r\n", "\r\n\r\n").encode()

    def _play(self, connection: socket.socket) -> None:
        sequence = 0
        for number, units in enumerate(self._pictures):
            for place, unit in enumerate(units):
                last = place == len(units) - 1
                head = struct.pack(">BBHII", 0x80, 96 | last << 7, sequence, number * 90000 // RATE, 1)
                connection.sendall(struct.pack(">BBH", 36, 0, len(head) + len(unit)) + head + unit)
                sequence += 1
            sleep(0.02)
        if (mine := self._answer("END", "0")) is not None:
            connection.sendall(mine)
            sleep(5)


def _request(requests: object) -> str:
    lines = list[str]()
    while line := requests.readline().decode():  # type: ignore[attr-defined]
        lines.append(line)
        if line == "\r\n":
            return "".join(lines)
    return ""


@contextmanager
def camera(
    answer: Answer = lambda method, number: None, host: str = "127.0.0.1", context: ssl.SSLContext | None = None
) -> Iterator[Camera]:
    """A camera that is closed afterwards."""
    running = Camera(answer, host, context)
    try:
        yield running
    finally:
        running.close()
