"""Starts the server of `dycoke-edge serve` on a free port, in this process, and talks to it."""

from __future__ import annotations

import base64
import io
import json
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import httpx
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dycoke_edge import CameraWatcher, VideoLLM
from dycoke_edge.cli_serve import listen
from dycoke_edge.config import Compression
from dycoke_edge.config_camera import Camera, Rule
from dycoke_edge.config_serve import ServeSpec
from dycoke_edge.runtime.serve.app import make_app
from dycoke_edge.runtime.serve.listener import make_server

CHAT = "/v1/chat/completions"


@dataclass
class Served:
    """A running server."""

    url: str
    port: int
    http: httpx.Client
    watcher: CameraWatcher
    model: str
    spec: ServeSpec
    stop: Callable[[], object]  # as SIGTERM does
    running: Callable[[], bool]

    def ask(self, *parts: dict[str, Any], **more: Any) -> httpx.Response:
        """Post a chat request: these parts, and options that go before the usual ones."""
        content = list(parts) or [text()]
        body = {"model": self.model, "messages": [{"role": "user", "content": content}], "max_tokens": 4, **more}
        return self.http.post(CHAT, json=body)

    def send(self, data: bytes, seconds: float = 20.0) -> bytes:
        """Send raw bytes, and read until the server closes the connection."""
        with socket.create_connection(("127.0.0.1", self.port), seconds) as connection:
            connection.sendall(data)
            return drain(connection)


def drain(connection: socket.socket) -> bytes:
    """All that comes until the other side closes."""
    received = bytearray()
    try:
        while block := connection.recv(1 << 16):
            received += block
    except ConnectionResetError:
        pass  # closed while we were sending
    return bytes(received)


@contextmanager
def serving(
    llm: VideoLLM,
    cameras: Sequence[Camera] = (),
    rules: Sequence[Rule] = (),
    compression: Compression = Compression(),  # noqa: B008 - frozen
    told: Callable[[BaseException], object] = lambda panic: None,
    **options: Any,
) -> Iterator[Served]:
    """A server with these cameras; `options` are fields of ServeSpec. `told` hears of panics."""
    spec = ServeSpec(port=0, **options)
    watcher = CameraWatcher(llm, cameras, rules, compression=compression, on_panic=told)
    with watcher, listen(spec.host, 0) as listening:
        port = listening.getsockname()[1]
        server = make_server(make_app(watcher, llm, spec), spec)
        thread = threading.Thread(target=lambda: server.run(sockets=[listening]), name="server")
        thread.start()
        try:
            wait_for(lambda: server.started)
            url = f"http://127.0.0.1:{port}"
            with httpx.Client(base_url=url, timeout=30, trust_env=False) as http:
                yield Served(url, port, http, watcher, llm.bundle.path.name, spec, server.stop, thread.is_alive)
        finally:
            server.stop()
            thread.join(20)
            assert not thread.is_alive()


def wait_for(happened: Any, seconds: float = 30.0) -> Any:
    """Wait until a function gives something true, and return that."""
    end = monotonic() + seconds
    while not (found := happened()):
        assert monotonic() < end, f"not within {seconds:g} s"
        sleep(0.02)
    return found


def error(response: httpx.Response, status: int) -> dict[str, Any]:
    """The error of a response, in OpenAI's form and on one line."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    found: dict[str, Any] = response.json()["error"]
    assert set(found) == {"message", "type", "param", "code"}
    assert found["message"] and "\n" not in found["message"]
    return found


def text(content: str = "What?") -> dict[str, Any]:
    return {"type": "text", "text": content}


def video(url: str) -> dict[str, Any]:
    return {"type": "video_url", "video_url": {"url": url}}


def image(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def stream(camera: str, **more: Any) -> dict[str, Any]:
    return {"type": "stream", "stream": {"stream_id": camera, **more}}


def data_url(content: bytes | Path, kind: str = "video/mp4") -> str:
    content = content.read_bytes() if isinstance(content, Path) else content
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def jpeg(pixels: NDArray[np.uint8]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()


def messages(body: str) -> list[dict[str, Any]]:
    """The data of server-sent events, which end with [DONE]."""
    data = [line.removeprefix("data: ") for line in body.split("\n\n") if line]
    assert data[-1] == "[DONE]"
    return [json.loads(line) for line in data[:-1]]
