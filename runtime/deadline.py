"""A deadline over a whole HTTP exchange, however slowly the other side sends."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.client import HTTPConnection


@contextmanager
def within(connection: HTTPConnection, seconds: float) -> Iterator[None]:
    """Connect, unless that is done, and cut the connection off if the block takes longer than `seconds` altogether. A
    socket's own timeout holds for each read, so one byte now and then keeps it waiting for ever. Raises TimeoutError
    when it was cut off, and what connecting raises."""
    late = threading.Event()
    sockets = list[socket.socket]()

    def cut() -> None:
        late.set()
        for each in sockets:
            with suppress(OSError):  # closed meanwhile
                socket.socket.shutdown(each, socket.SHUT_RDWR)  # TLS's own would not stop another thread's read

    timer = threading.Timer(seconds, cut)
    timer.daemon = True
    timer.start()
    try:
        if connection.sock is None:
            connection.connect()  # each of its steps is held by the connection's timeout
        sockets.append(connection.sock)  # an answer may take it out of the connection
        if not late.is_set():
            yield
    except Exception:
        if not late.is_set():
            raise
    finally:
        timer.cancel()
    if late.is_set():
        connection.close()
        raise TimeoutError(f"not done within {seconds:g} s")
