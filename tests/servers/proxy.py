"""A TCP proxy that does to a connection what networks and cameras do: falls silent, breaks off, loses data."""

from __future__ import annotations

import random
import selectors
import socket
import struct
import threading
from collections.abc import Callable
from types import TracebackType

Filter = Callable[[bytes], bytes]


class Proxy:
    """Listens on `port` of 127.0.0.1 and passes on to `target`. A context manager; faults are switched on and off
    while it runs: `silent` keeps connections open and passes nothing, `filter()` makes the function that every
    connection's data from the server go through."""

    def __init__(self, target: int) -> None:
        self.target = target
        self.silent = False
        self.filter: Callable[[], Filter] | None = None
        self.accepted = 0
        self._pairs: dict[socket.socket, tuple[socket.socket, Filter | None]] = {}
        self._lock = threading.RLock()
        self._selector = selectors.DefaultSelector()
        self._listener = self._listen(0)
        self.port: int = self._listener.getsockname()[1]
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="proxy", daemon=True)

    def __enter__(self) -> Proxy:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._over.set()
        self._thread.join()
        self.refuse()
        self._selector.close()

    def refuse(self) -> None:
        """Breaks all connections off and takes no new ones, until `accept`."""
        with self._lock:
            self.reset()
            if self._listener.fileno() >= 0:
                self._selector.unregister(self._listener)
                self._listener.close()

    def accept(self) -> None:
        """Takes connections again, on the same port."""
        with self._lock:
            self._listener = self._listen(self.port)

    def reset(self) -> None:
        """Breaks all connections off, as a camera that loses power and comes back does (RST)."""
        with self._lock:
            for end in self._pairs:
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            while self._pairs:
                self._drop(next(iter(self._pairs)))

    def _listen(self, port: int) -> socket.socket:
        listener = socket.create_server(("127.0.0.1", port), reuse_port=False)
        self._selector.register(listener, selectors.EVENT_READ)
        return listener

    def _run(self) -> None:
        while not self._over.is_set():
            ready = self._selector.select(0.02)
            with self._lock:
                for key, _ in ready:
                    end = key.fileobj
                    if end is self._listener:
                        self._meet()
                    elif isinstance(end, socket.socket) and end in self._pairs:
                        self._pass(end)
            if self.silent:
                self._over.wait(0.02)  # what nobody reads stays ready

    def _meet(self) -> None:
        near, _ = self._listener.accept()
        self.accepted += 1
        try:
            far = socket.create_connection(("127.0.0.1", self.target), 5)
        except OSError:
            near.close()
            return
        self._pairs[near] = far, None
        self._pairs[far] = near, self.filter() if self.filter is not None else None
        for end in (near, far):
            self._selector.register(end, selectors.EVENT_READ)

    def _pass(self, end: socket.socket) -> None:
        if self.silent:
            return
        other, change = self._pairs[end]
        try:
            data = end.recv(65536)
            if data:
                other.sendall(change(data) if change is not None else data)
        except OSError:
            data = b""
        if not data:
            self._drop(end)

    def _drop(self, end: socket.socket) -> None:
        if end not in self._pairs:
            return
        other, _ = self._pairs.pop(end)
        self._pairs.pop(other, None)
        for one in (end, other):
            self._selector.unregister(one)
            one.close()


def lose_bytes(every: int, length: int) -> Filter:
    """Of every so many bytes the last `length` are missing: framing and pictures break."""
    passed = 0

    def change(data: bytes) -> bytes:
        nonlocal passed
        kept = bytes(byte for at, byte in enumerate(data, passed) if at % every < every - length)
        passed += len(data)
        return kept

    return change


def lose_packets(share: float, seed: int = 0) -> Filter:
    """A share of the RTP packets of an RTSP connection over TCP is missing, the framing stays: lossy radio behind a
    camera that speaks TCP."""
    draw = random.Random(seed)
    waiting = b""

    def change(data: bytes) -> bytes:
        nonlocal waiting
        waiting += data
        kept = b""
        while waiting:
            if waiting[0] != 0x24:  # an RTSP answer, up to the next packet
                end = waiting.find(b"$")
                end = len(waiting) if end < 0 else end
            else:
                end = 4 + int.from_bytes(waiting[2:4], "big") if len(waiting) >= 4 else 4
                if end > len(waiting):
                    break
            piece, waiting = waiting[:end], waiting[end:]
            video = piece[0] == 0x24 and piece[1] == 0
            if not (video and draw.random() < share):
                kept += piece
        return kept

    return change


def cut_off(after: int) -> Filter:
    """Nothing comes through after so many bytes, and the connection stays open."""
    left = after

    def change(data: bytes) -> bytes:
        nonlocal left
        data, left = data[:left], max(0, left - len(data))
        return data

    return change
