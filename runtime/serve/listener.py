"""uvicorn, with time limits on connections that send nothing, a ceiling on their number, ends that lose no answer, and
answers that end when the server is told to stop."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from types import FrameType
from typing import Any

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from dycoke_edge.config_serve import ServeSpec
from dycoke_edge.runtime.serve.errors import body

GRACE_S = 1  # that answers on their way have once the server is told to stop
LINGER_S = 2.0  # that a client may still send after its answer


class Lingering:
    """A connection that closes as RFC 9112 section 9.6 wants: first its own half, then, once the client has gone or
    after LINGER_S, the whole. Closed at once, with bytes of the client unread (the body of a request that was refused
    by its headers), the system resets it, and the answer is lost on its way."""

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport, self._loop = transport, loop
        self._closing: asyncio.TimerHandle | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def close(self) -> None:
        """End the answers; called again, end the connection."""
        if self._closing is not None or self._transport.is_closing():
            self._transport.close()
            return
        self._closing = self._loop.call_later(LINGER_S, self._transport.abort)
        self._transport.write_eof()
        self._transport.resume_reading()

    def is_closing(self) -> bool:
        """No request is taken any more."""
        return self._closing is not None or self._transport.is_closing()

    def gone(self) -> None:
        """The connection has ended."""
        if self._closing is not None:
            self._closing.cancel()


def _protocol(spec: ServeSpec) -> type[H11Protocol]:
    class Limited(H11Protocol):
        """uvicorn's own waits for ever: for a header, and for a client to read."""

        _timer: asyncio.TimerHandle | None = None
        _unread: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            self._lingering = Lingering(transport, self.loop)
            super().connection_made(self._lingering)  # type: ignore[arg-type]
            if len(self.connections) > spec.max_connections:
                transport.abort()
                return
            self._wait()

        def data_received(self, data: bytes) -> None:
            if self.transport.is_closing():
                return  # nobody will read it
            if self._between():
                self._wait()
            super().data_received(data)
            if not self._between():
                self._done()

        def connection_lost(self, exc: Exception | None) -> None:
            self._lingering.gone()
            self._done()
            self._read()
            super().connection_lost(exc)

        def shutdown(self) -> None:
            if not self.transport.is_closing():
                super().shutdown()
            if self.transport.is_closing():
                self.transport.close()  # a server that stops waits for nobody

        def pause_writing(self) -> None:
            super().pause_writing()
            self._read()
            self._unread = self.loop.call_later(spec.send_timeout_s, self.transport.abort)

        def resume_writing(self) -> None:
            super().resume_writing()
            self._read()

        def send_400_response(self, msg: str) -> None:
            content = json.dumps(body(400, "not HTTP/1.1; check the request line and headers")).encode()
            headers = [("Content-Type", "application/json"), ("Connection", "close")]
            headers.append(("Content-Length", str(len(content))))
            try:
                for event in (
                    h11.Response(status_code=400, headers=headers),
                    h11.Data(data=content),
                    h11.EndOfMessage(),
                ):
                    self.transport.write(self.conn.send(event) or b"")
            except h11.LocalProtocolError:
                pass  # an answer is under way; all that is left is to go
            if not self._between():  # whoever answers is told, for nothing more can be sent
                self.cycle.disconnected = True
                self.cycle.message_event.set()
            self.transport.close()

        def _between(self) -> bool:
            """No request is being answered."""
            return self.cycle is None or self.cycle.response_complete

        def _wait(self) -> None:
            if self._timer is None:
                self._timer = self.loop.call_later(spec.header_timeout_s, self.transport.abort)

        def _done(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

        def _read(self) -> None:
            if self._unread is not None:
                self._unread.cancel()
                self._unread = None

    return Limited


class Server(uvicorn.Server):
    """Ends on SIGINT and SIGTERM without raising them again, and tells whoever waits."""

    def __init__(self, config: uvicorn.Config, on_exit: Callable[[], object]) -> None:
        super().__init__(config)
        self._on_exit = on_exit

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.stop()

    def stop(self) -> None:
        """From any thread: finish what is being answered, for GRACE_S at most, and return from `run`."""
        self.should_exit = True
        self._on_exit()


def make_server(app: FastAPI, spec: ServeSpec) -> Server:
    """A server that is ready to `run(sockets=[...])`, or to be run without."""
    settings: dict[str, Any] = {
        "http": _protocol(spec),
        "ws": "none",
        "lifespan": "on",
        "log_config": None,
        "access_log": False,
        "server_header": False,
        "proxy_headers": False,
        "timeout_keep_alive": 5,
        "timeout_graceful_shutdown": GRACE_S,
        "h11_max_incomplete_event_size": 1 << 14,
    }
    return Server(uvicorn.Config(app, spec.host, spec.port, **settings), app.state.stop)
