"""A TCP server on loopback that says what a test makes up, and notices who hangs up."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import sleep

Script = Callable[[bytes], Iterator[bytes]]  # from what a client sent first to what it is told, piece by piece
PAUSE_S = 0.02  # between the bytes of those who drip


class Talker:
    """One script for every connection. `sent` counts bytes, `gone` is set when a client hung up before the end."""

    def __init__(self, script: Script, host: str = "127.0.0.1") -> None:
        self.sent = 0
        self.asked = list[bytes]()
        self.gone = threading.Event()
        self._script = script
        self._closing = threading.Event()
        self._listening = socket.create_server((host, 0))
        self.port: int = self._listening.getsockname()[1]
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def _accept(self) -> None:
        while not self._closing.is_set():
            try:
                connection, _ = self._listening.accept()
            except OSError:
                return
            threading.Thread(target=self._talk, args=(connection,), daemon=True).start()

    def _talk(self, connection: socket.socket) -> None:
        with connection:
            try:
                asked = connection.recv(1 << 16)
                self.asked.append(asked)
                for piece in self._script(asked):
                    if self._closing.is_set():
                        return
                    connection.sendall(piece)
                    self.sent += len(piece)
            except OSError:
                self.gone.set()

    def close(self) -> None:
        """Listen no more."""
        self._closing.set()
        self._listening.close()


@contextmanager
def talking(script: Script, host: str = "127.0.0.1") -> Iterator[Talker]:
    """A talker that is closed afterwards."""
    talker = Talker(script, host)
    try:
        yield talker
    finally:
        talker.close()


def drip(head: bytes, again: bytes = b"x") -> Script:
    """Say `head` at once and `again` for ever, now and then."""

    def script(asked: bytes) -> Iterator[bytes]:
        yield head
        while True:
            sleep(PAUSE_S)
            yield again

    return script


def flood(head: bytes, block: bytes = b"x" * (1 << 16)) -> Script:
    """Say `head` and then `block` for ever, as fast as the client reads."""

    def script(asked: bytes) -> Iterator[bytes]:
        yield head
        while True:
            yield block

    return script


SLOW = {  # answers that never end, though none keeps a reader waiting long
    "status": drip(b"HTTP/1.1 20"),
    "header": drip(b"HTTP/1.1 200 OK\r\nX-A: "),
    "headers": drip(b"HTTP/1.1 200 OK\r\n", b"A: b\r\n"),
    "continue": drip(b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "body": drip(b"HTTP/1.1 200 OK\r\n\r\n"),
    "counted body": drip(b"HTTP/1.1 200 OK\r\nContent-Length: 60000\r\n\r\n"),
    "chunk": drip(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n"),
    "chunk size": drip(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"0"),
    "trailer": drip(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n", b"A: b\r\n"),
}
