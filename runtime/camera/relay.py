"""RTSP through a socket of ours, to an address that was checked: FFmpeg itself goes wherever a redirect sends it."""

from __future__ import annotations

import re
import selectors
import socket
import ssl
import threading
from contextlib import suppress

from dycoke_edge.errors import UsageError
from dycoke_edge.runtime.camera.failure import SourceError
from dycoke_edge.runtime.hosts import AllowedHosts
from dycoke_edge.runtime.place import Place, place

PORTS = {"rtsp": 554, "rtsps": 322}
HEADER_BYTES = 1 << 16  # of one message
BODY_BYTES = 1 << 20
BLOCK = 1 << 16
FAREWELL_S = 0.5  # that FFmpeg's last request has to get through
NO_RTSP = "sent no RTSP; check the URL"
_ANSWER = re.compile(rb"RTSP/\d\.\d +(\d{3})( [^\r\n\0]*)?")
_REQUEST = re.compile(rb"([A-Z_]+) [!-~]+ RTSP/\d\.\d")
_LENGTH = re.compile(rb"content-length:[ \t]*(\d{1,7})[ \t]*", re.I)
_END = re.compile(rb"\n\r?\n")


class Unfit(Exception):
    """What a camera sent is not handed on."""


class Relay:
    """One connection to a camera, and a port on loopback that leads to it, once.

    Requests pass as they are. Of what the camera sends, packets pass as they are; messages are taken apart and put
    together again, so that FFmpeg reads what was read here. A redirect, or what is no RTSP, ends the connection.
    `open` blocks; `close` may come from any thread, more than once.
    """

    def __init__(self, url: str, hosts: AllowedHosts, shown: str, timeout: float) -> None:
        self.failure: SourceError | None = None  # why it ended the connection, if it did
        self._url, self._hosts, self._shown, self._timeout = url, hosts, shown, timeout
        self._sockets = list[socket.socket]()  # the thread's, which closes them
        self._thread: threading.Thread | None = None

    def open(self) -> str:
        """Look the host up, check it and connect; returns the URL for FFmpeg, with its login. Raises SourceError."""
        try:
            at = place(self._url, PORTS)
            addresses = self._hosts.addresses(at.host, at.port)
        except UsageError as error:
            raise SourceError("refused", f"{self._shown}: {error}") from None
        except ValueError:
            raise SourceError("refused", f"{self._shown} is malformed; give rtsp://host/path") from None
        camera = self._connected(at, addresses)
        listening = socket.create_server(("127.0.0.1", 0), backlog=1)
        listening.settimeout(self._timeout)
        self._sockets += [camera, listening]
        port: int = listening.getsockname()[1]
        self._thread = threading.Thread(target=self._run, args=(camera, listening), name="relay", daemon=True)
        self._thread.start()
        return str(Place("rtsp", at.login, "127.0.0.1", port, at.rest, PORTS["rtsp"]))

    def close(self) -> None:
        """End the connection, unless FFmpeg, which says goodbye, does so itself."""
        if self._thread is not None:
            self._thread.join(FAREWELL_S)
            for each in list(self._sockets):
                with suppress(OSError):  # it has ended
                    socket.socket.shutdown(each, socket.SHUT_RDWR)  # wakes the thread

    def _connected(self, at: Place, addresses: list[str]) -> socket.socket:
        error: OSError | None = None
        for address in addresses:
            try:
                plain = socket.create_connection((address, at.port), self._timeout)
                return _secured(plain, at.host) if at.scheme == "rtsps" else plain
            except OSError as failed:
                error = failed
        if isinstance(error, ssl.SSLError):
            raise SourceError("tls", f"{self._shown} speaks no TLS; check host and port, or use rtsp://")
        if isinstance(error, TimeoutError):
            raise SourceError("timeout", f"{self._shown} sent nothing in time; check the camera and the network")
        raise SourceError("refused", f"{self._shown} cannot be reached; check host, port and network")

    def _run(self, camera: socket.socket, listening: socket.socket) -> None:
        try:
            player, _ = listening.accept()
            player.settimeout(self._timeout)
            self._sockets.append(player)
            listening.close()
            self._pass(camera, player)
        except Unfit as unfit:
            self.failure = SourceError("refused", f"{self._shown} {unfit}")
        except (OSError, ValueError):
            pass  # one of the two has gone
        finally:
            for each in self._sockets:
                each.close()

    def _pass(self, camera: socket.socket, player: socket.socket) -> None:
        """Hand on what comes, until one of them ends. One thread does both ways, for TLS's sake."""
        messages = Messages()
        with selectors.DefaultSelector() as selector:
            selector.register(camera, selectors.EVENT_READ)
            selector.register(player, selectors.EVENT_READ)
            while True:
                held = isinstance(camera, ssl.SSLSocket) and camera.pending() > 0
                ready = {key.fileobj for key, _ in selector.select(0 if held else None)}
                if player in ready:
                    request = player.recv(BLOCK)
                    if not request:
                        return
                    camera.settimeout(self._timeout)
                    camera.sendall(request)
                if camera in ready or held:
                    camera.settimeout(0)
                    try:
                        sent = camera.recv(BLOCK)
                    except (BlockingIOError, ssl.SSLWantReadError):
                        continue  # half a record
                    if not sent:
                        return
                    player.sendall(messages.fit(sent))


class Messages:
    """What a camera sends, in pieces: packets and messages."""

    def __init__(self) -> None:
        self._held = bytearray()

    def fit(self, sent: bytes) -> bytes:
        """What may be handed on by now. Raises Unfit."""
        self._held += sent
        pieces = list[bytes]()
        while piece := self._packet() if self._held.startswith(b"$") else self._message():
            pieces.append(piece)
        return b"".join(pieces)

    def _packet(self) -> bytes:
        return self._taken(4 + int.from_bytes(self._held[2:4], "big")) if len(self._held) >= 4 else b""

    def _message(self) -> bytes:
        while self._held.startswith((b"\r", b"\n")):  # between messages
            del self._held[:1]
        found = _END.search(self._held)
        if self._held.startswith(b"$"):
            return self._packet()
        if found is None or found.start() > HEADER_BYTES:
            if len(self._held) > HEADER_BYTES:
                raise Unfit(NO_RTSP)
            return b""
        lines = [line.removesuffix(b"\r") for line in bytes(self._held[: found.start()]).split(b"\n")]
        _check(lines)
        length = _length(lines)
        if len(self._held) < found.end() + length:
            return b""
        body = self._taken(found.end() + length)[found.end() :]
        kept = [line for line in lines if not line.lower().startswith(b"content-length")]
        return b"\r\n".join([*kept, b"Content-Length: %d" % length, b"", body])

    def _taken(self, size: int) -> bytes:
        if len(self._held) < size:
            return b""
        taken = bytes(self._held[:size])
        del self._held[:size]
        return taken


def _check(lines: list[bytes]) -> None:
    """Raises Unfit for a redirect, in an answer or as a request, and for what could be read in two ways."""
    answer, request = _ANSWER.fullmatch(lines[0]), _REQUEST.fullmatch(lines[0])
    if any(line.startswith(b"$") or b"\r" in line or b"\0" in line for line in lines) or not (answer or request):
        raise Unfit(NO_RTSP)
    if (answer and answer[1].startswith(b"3")) or (request and request[1] == b"REDIRECT"):
        raise Unfit("redirects to another address, which is not followed; add that one")


def _length(lines: list[bytes]) -> int:
    """Bytes after the header."""
    found = [_LENGTH.fullmatch(line) for line in lines if line.lower().startswith(b"content-length")]
    lengths = {int(match[1]) if match else BODY_BYTES + 1 for match in found} or {0}
    if len(lengths) > 1 or max(lengths) > BODY_BYTES:
        raise Unfit(NO_RTSP)
    return lengths.pop()


def _secured(plain: socket.socket, host: str) -> ssl.SSLSocket:
    """TLS as FFmpeg does it: cameras sign their certificates themselves, so nobody checks them."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    try:
        return context.wrap_socket(plain, server_hostname=host)
    except BaseException:
        plain.close()
        raise
