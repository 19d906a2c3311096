"""Sees every request first: who may come in, from which page, with how much, for how long. Knows no routes' meaning."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
from collections.abc import Callable
from time import monotonic
from typing import Any
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dycoke_edge.config_serve import ServeSpec
from dycoke_edge.runtime.camera.redact import one_line
from dycoke_edge.runtime.serve.bodies import Room, Share
from dycoke_edge.runtime.serve.errors import ApiError, as_api_error, response

ACCESS = logging.getLogger("dycoke_edge.access")
OPEN = ("/", "/docs", "/favicon.ico", "/v1/health/live", "/v1/health/ready")  # without a key: nothing secret is on them
CHAT = "/v1/chat/completions"
BODIES = ("POST", "PUT", "PATCH")
HEADERS = {
    b"cache-control": b"no-store",
    b"content-security-policy": b"default-src 'none'; frame-ancestors 'none'",
    b"cross-origin-opener-policy": b"same-origin",
    b"cross-origin-resource-policy": b"same-origin",
    b"referrer-policy": b"no-referrer",
    b"x-content-type-options": b"nosniff",
    b"x-frame-options": b"DENY",
}


class Guard:
    """ASGI middleware around the whole application."""

    def __init__(self, app: ASGIApp, spec: ServeSpec, clock: Callable[[], float] = monotonic) -> None:
        self._app, self._spec, self._clock = app, spec, clock
        self._key = None if spec.api_key is None else _digest(spec.api_key.encode())
        self._names = {"localhost", "127.0.0.1", "[::1]", *(name.lower() for name in spec.host_names)}
        self._names.add(f"[{spec.host}]" if ":" in spec.host else spec.host.lower())
        self._chats = 0
        self._room = Room(spec.max_bodies_bytes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or have it answered."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return
        answer = _Answer(send)
        began = self._clock()
        try:
            await self._admitted(scope, receive, answer)
        except (asyncio.CancelledError, KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic of a Rust library is no Exception
            failed = as_api_error(error)
            if answer.status is None:  # else half an answer is out, and the listener closes the connection
                await response(failed)(scope, receive, answer)
            del failed  # which has this frame, which had it
        finally:
            method, path = one_line(str(scope["method"]), 20), one_line(str(scope["path"]), 200)
            took = (self._clock() - began) * 1e3
            ACCESS.info("%s %s %s %.0f ms", method, path, answer.status or "broken", took)

    async def _admitted(self, scope: Scope, receive: Receive, answer: _Answer) -> None:
        headers = _Headers(scope)
        self._check_host(headers)
        _check_origin(headers)
        authorized = self._check_key(scope, headers)
        scope.setdefault("state", {})["authorized"] = authorized
        if scope["path"] in OPEN:
            scope = _asking(scope)
        if scope["path"] != CHAT or scope["method"] != "POST":
            await self._pass_on(scope, headers, receive, answer)
            return
        if self._chats >= self._spec.max_chats:  # before the body takes memory
            raise ApiError(429, f"{self._chats} requests are being answered; try again", code="busy", retry_after=2.0)
        self._chats += 1
        try:
            await self._pass_on(scope, headers, receive, answer)
        finally:
            self._chats -= 1

    async def _pass_on(self, scope: Scope, headers: _Headers, receive: Receive, answer: _Answer) -> None:
        scope["state"]["share"] = share = self._room.share()
        body = bytearray()
        try:
            await self._fill(body, scope, headers, receive, share)
            await self._app(scope, _replay(body, receive), answer)
        finally:
            body.clear()  # an error may keep this frame
            share.release()

    def _check_host(self, headers: _Headers) -> None:
        """On loopback a page elsewhere may have a name that it points here (DNS rebinding); the name gives it away."""
        if not (self._spec.loopback or self._spec.host_names):
            return
        host = (headers.one(b"host") or "").lower()
        name = host if host.endswith("]") else host.rsplit(":", 1)[0] if ":" in host else host
        if name not in self._names:
            raise ApiError(421, "Host: not a name of this server; add it to server.host_names", code="wrong_host")

    def _check_key(self, scope: Scope, headers: _Headers) -> bool:
        if self._key is None:
            return True
        kind, _, given = (headers.one(b"authorization") or "").partition(" ")
        authorized = kind.lower() == "bearer" and hmac.compare_digest(_digest(given.strip().encode()), self._key)
        if not authorized and scope["path"] not in OPEN:
            raise ApiError(401, "send the server's key as 'Authorization: Bearer KEY'", code="invalid_api_key")
        return authorized

    def _most(self, scope: Scope) -> int:
        """Bytes that a body may have."""
        if scope["method"] not in BODIES:
            return 0
        large = scope["path"] == CHAT and scope["method"] == "POST"
        return self._spec.max_body_bytes if large else min(self._spec.max_small_body_bytes, self._spec.max_body_bytes)

    async def _fill(self, body: bytearray, scope: Scope, headers: _Headers, receive: Receive, share: Share) -> None:
        """Receive all of the body, at most so large, within so many seconds."""
        most = self._most(scope)
        length = headers.one(b"content-length") or "0"
        more = length != "0" or headers.one(b"transfer-encoding") is not None
        if more and scope["method"] in BODIES:
            _check_type(headers)
        if not (length.isascii() and length.isdigit()) or int(length[:19]) > most:
            raise ApiError(413, f"the body is too large; at most {most} bytes here", code="too_large")
        end = self._clock() + self._spec.body_timeout_s
        while more:
            try:
                message = await asyncio.wait_for(receive(), max(0.001, end - self._clock()))
            except asyncio.TimeoutError:
                raise ApiError(408, "the body came too slowly; send it again", code="timeout") from None
            if message["type"] == "http.disconnect":
                raise ApiError(400, "the body ended early", code="incomplete")
            piece, more = message.get("body", b""), message.get("more_body", False)
            if len(body) + len(piece) > most:
                raise ApiError(413, f"the body is too large; at most {most} bytes here", code="too_large")
            share.take(len(piece))
            body += piece


class _Headers:
    def __init__(self, scope: Scope) -> None:
        self._all: list[tuple[bytes, bytes]] = scope["headers"]

    def one(self, name: bytes) -> str | None:
        """A header's value; two of one kind are refused, for others may look at the other one."""
        found = [value for key, value in self._all if key == name]
        if len(found) > 1:
            raise ApiError(400, f"{name.decode()}: sent {len(found)} times; send it once")
        return found[0].decode("latin-1") if found else None


class _Answer:
    """Adds headers, and remembers the status."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.status: int | None = None

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers: list[tuple[bytes, bytes]] = list(message.get("headers", []))
            have = {name.lower() for name, _ in headers}
            more = [(name, value) for name, value in HEADERS.items() if name not in have]
            if self.status >= 400 and self.status != 404:
                more.append((b"connection", b"close"))
            message = {**message, "headers": headers + more}
        await self._send(message)


def _check_origin(headers: _Headers) -> None:
    """There is no CORS here: a page of another origin gets nothing, also not what needs no permission."""
    origin = headers.one(b"origin")
    if origin is not None:
        try:
            same = urlsplit(origin).netloc.lower() == (headers.one(b"host") or "").lower()
        except ValueError:
            same = False
        if not same:
            raise ApiError(403, "Origin: this server answers its own page only", code="cross_origin")
    site = headers.one(b"sec-fetch-site")
    if site not in (None, "same-origin", "none") and headers.one(b"sec-fetch-mode") != "navigate":
        raise ApiError(403, "Sec-Fetch-Site: this server answers its own page only", code="cross_origin")


def _check_type(headers: _Headers) -> None:
    kind = (headers.one(b"content-type") or "").split(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, "Content-Type: send application/json", code="unsupported_media_type")


def _asking(scope: Scope) -> Scope:
    """A request of a path that needs no key, which may only ask. HEAD is GET: the server leaves the body out."""
    if scope["method"] not in ("GET", "HEAD"):
        raise ApiError(405, "this path is for GET and HEAD", code="method_not_allowed")
    return {**scope, "method": "GET"}


def _replay(body: bytearray, receive: Receive) -> Receive:
    """The body at once, which who reads it may empty; then what the client does."""
    sent = False

    async def replay() -> Any:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


def _digest(key: bytes) -> bytes:
    """Equal lengths, so that comparing tells nothing."""
    return hashlib.sha256(key).digest()
