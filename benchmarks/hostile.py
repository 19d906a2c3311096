"""What attackers send to a server: requests that are cheap to make and dear to answer."""

from __future__ import annotations

import base64
import itertools
import socket
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from time import sleep

from tests.clips import write_clip
from tests.hostile import large_png, scans_jpeg, slow_video, wide_gif

CHAT = "/v1/chat/completions"
DRIP_S = 3.0  # less than the server waits for a read


def get(path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n".encode()


def post(path: str, body: bytes) -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nConnection: close\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def asked(model: str, *parts: str) -> bytes:
    content = ",".join(parts)
    return post(CHAT, f'{{"model": "{model}", "messages": [{{"role": "user", "content": [{content}]}}]}}'.encode())


def shown(model: str, kind: str, url: str) -> bytes:
    part = f'{{"type": "{kind}_url", "{kind}_url": {{"url": "{url}"}}}}'
    return asked(model, part, '{"type": "text", "text": "What?"}')


def patterns(model: str) -> list[bytes]:
    """What makes a careless regular expression slow: in a path, and where an error might repeat it."""
    pieces = ["pw-", "a-a-", "pw_", "user-", ",a:", "a://"]
    paths = [get("/" + piece * (15_000 // len(piece))) for piece in pieces]
    return paths + [asked(model, f'{{"type": "{piece * (64_000 // len(piece))}"}}') for piece in pieces]


def bodies(model: str) -> list[bytes]:
    """As much as may be sent, to paths that take it and to some that do not."""
    large = b'{"model": "' + b"x" * 31_000_000 + b'"}'
    return [post(path, large) for path in ("/", "/v1/health/live", "/v1/alerts", CHAT, CHAT, CHAT)]


def lines(model: str) -> list[bytes]:
    """Line ends and escapes of terminals in paths."""
    return [get("/x%0a2026-01-01%20INFO%20forged%1b[2J" + "%0a%1b" * 2000)]


def parts(model: str) -> list[bytes]:
    """Many small values, which take much more memory read than written."""
    small = '{"type":"text","text":""}'
    return [
        asked(model, *[small] * 150_000),
        asked(model, *[small] * 500_000),
        asked(model, *["{}"] * 4_000_000),
        asked(model, "[" * 9_000_000),
        post(CHAT, b'{"metadata": {' + b",".join(b'"%d":0' % i for i in range(27_000)) + b"}}"),
        post(CHAT, b"{" + b",".join(b'"%d":0' % i for i in range(27_000)) + b"}"),
    ]


def media(model: str) -> list[bytes]:
    """Pictures and films that cost far more than they weigh: some beyond the server's ceilings, some just below."""
    return [
        shown(model, "image", _data(scans_jpeg())),
        shown(model, "image", _data(scans_jpeg(times=6))),
        shown(model, "image", _data(wide_gif())),
        shown(model, "image", _data(wide_gif(2990, 2990))),
        shown(model, "image", _data(large_png())),
        shown(model, "video", _data(_growing(4000))),
        shown(model, "video", _data(_growing(2990))),
        shown(model, "video", slow_video(2400, 20)),
    ]


def drips(model: str) -> list[bytes]:
    """URLs of a web server that sends a byte now and then, for ever: of its header, and of what it holds."""
    port = _dripping()
    names = itertools.product(("image", "video"), ("header", "content"))
    return [shown(model, kind, f"http://127.0.0.1:{port}/{name}") for kind, name in names]


ATTACKS: dict[str, Callable[[str], list[bytes]]] = {
    "patterns": patterns,
    "bodies": bodies,
    "lines": lines,
    "parts": parts,
    "media": media,
    "drips": drips,
}


def _data(content: bytes) -> str:
    return f"data:application/octet-stream;base64,{base64.b64encode(content).decode()}"


def _growing(side: int) -> bytes:
    """An H.264 whose first pictures are small, and the rest `side` x `side`."""
    with tempfile.TemporaryDirectory() as folder:
        files = [write_clip(Path(folder, f"{size}.h264"), size=(size, size), frames=4) for size in (64, side)]
        return b"".join(file.read_bytes() for file in files)


def _dripping() -> int:
    """The port of that web server, which runs in threads of this process."""
    listening = socket.create_server(("127.0.0.1", 0))

    def drip(connection: socket.socket) -> None:
        with connection, suppress(OSError):
            end = b"\r\n" if b"content" in connection.recv(4096) else b""
            connection.sendall(b"HTTP/1.1 200 OK\r\nX: y" + end * 2)
            while True:
                connection.sendall(b"x")
                sleep(DRIP_S)

    def accept() -> None:
        while True:
            threading.Thread(target=drip, args=(listening.accept()[0],), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    return int(listening.getsockname()[1])
