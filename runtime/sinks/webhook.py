"""Events as signed HTTP POSTs, with CloudEvents headers."""

from __future__ import annotations

import base64
import hashlib
import hmac
from collections.abc import Callable
from http.client import HTTPException
from time import time

from dycoke_edge.errors import UsageError
from dycoke_edge.runtime.camera.events import Event, rfc3339
from dycoke_edge.runtime.deadline import within
from dycoke_edge.runtime.sinks.bounded import BoundedSink, Transient

PREFIX = "whsec_"
TIMEOUT_S = 10.0  # that an event may take, from connecting to the answer's last byte
ANSWER_BYTES = 1 << 16  # of an answer that are read; nothing in it matters


class Refused(Exception):
    """The receiver will not take this event, now or later."""


class WebhookSink(BoundedSink):
    """POSTs every event to `url` as JSON.

    The CloudEvents attributes are `ce-` headers; `Idempotency-Key` is the event's id. With a `secret`,
    `X-Dycoke-Signature` is "sha256=" and the HMAC-SHA256 in hex of "<X-Dycoke-Timestamp>.<body>", and `webhook-id`,
    `webhook-timestamp` and `webhook-signature` are those of standardwebhooks.com, whose secrets begin with "whsec_".
    Tried again after 429, 5xx and when there is no connection; any other status loses the event. Redirects are not
    followed.
    """

    def __init__(
        self,
        url: str,
        secret: str | None = None,
        verify_tls: bool = True,
        capacity: int = 1000,
        attempts: int = 10,
        backoff: tuple[float, float] = (1.0, 60.0),
        utc: Callable[[], float] = time,
    ) -> None:
        try:
            from urllib3.connection import HTTPConnection, HTTPSConnection
            from urllib3.exceptions import HTTPError
            from urllib3.util import parse_url
        except ImportError:
            raise UsageError("webhooks need urllib3: pip install 'dycoke-edge[serve]'") from None
        try:
            parts = parse_url(url)
        except HTTPError:
            parts = parse_url("")
        if parts.scheme not in ("http", "https") or not parts.host:
            raise UsageError("url of a webhook must be http:// or https:// with a host, e.g. https://host/hook")
        host, self._target = parts.host.strip("[]"), parts.request_uri
        super().__init__(f"webhook {host}", capacity, attempts, backoff)
        self._secret, self._utc = secret, utc
        self._key = signing_key(secret) if secret else b""
        self._connection: HTTPConnection = (
            HTTPConnection(host, parts.port or 80, timeout=TIMEOUT_S)
            if parts.scheme == "http"
            else HTTPSConnection(
                host,
                parts.port or 443,
                timeout=TIMEOUT_S,
                cert_reqs="CERT_REQUIRED" if verify_tls else "CERT_NONE",
            )
        )
        self._errors = (HTTPError, HTTPException, OSError)

    def deliver(self, event: Event) -> None:
        """One POST; Transient on 429, 5xx and without a whole answer in time, Refused on any other status that is not
        2xx."""
        try:
            status, after = self._posted(event)
        except self._errors as error:
            self._connection.close()
            raise Transient(f"no answer ({type(error).__name__})") from None  # its text has the URL
        if status == 429 or status >= 500:
            raise Transient(f"HTTP {status}", _seconds(after))
        if not 200 <= status < 300:
            raise Refused(f"HTTP {status}")

    def finish(self) -> None:
        """Close the connection."""
        self._connection.close()

    def _posted(self, event: Event) -> tuple[int, str | None]:
        """The answer's status and its Retry-After."""
        body, connection = event.to_json().encode(), self._connection
        if not connection.is_connected:  # the receiver closed it meanwhile
            connection.close()
        with within(connection, TIMEOUT_S):
            connection.request("POST", self._target, body, self._headers(event, body), preload_content=False)
            answer = connection.getresponse()
            if len(answer.read(ANSWER_BYTES, decode_content=False)) == ANSWER_BYTES:
                connection.close()
            return answer.status, answer.headers.get("Retry-After")

    def _headers(self, event: Event, body: bytes) -> dict[str, str]:
        now = self._utc()
        headers = {
            "Content-Type": "application/json",
            "User-Agent": "dycoke-edge",
            "Idempotency-Key": event.id,
            "ce-specversion": "1.0",
            "ce-id": event.id,
            "ce-source": f"/dycoke/{event.camera}",
            "ce-type": f"dycoke.{event.type}.{event.phase}",
            "ce-time": str(rfc3339(event.time)),
        }
        if self._secret:
            stamp = str(int(now))
            headers |= {"X-Dycoke-Timestamp": stamp, "X-Dycoke-Signature": sign(self._secret, stamp, body)}
            headers |= {"webhook-id": event.id, "webhook-timestamp": stamp}
            headers["webhook-signature"] = sign_standard(self._key, event.id, stamp, body)
        return headers


def sign(secret: str, timestamp: str, body: bytes) -> str:
    """What a receiver computes to check a request, and compares in constant time."""
    return "sha256=" + hmac.new(secret.encode(), timestamp.encode() + b"." + body, hashlib.sha256).hexdigest()


def sign_standard(key: bytes, id: str, timestamp: str, body: bytes) -> str:
    """The same as standardwebhooks.com has it."""
    digest = hmac.new(key, f"{id}.{timestamp}.".encode() + body, hashlib.sha256).digest()
    return f"v1,{base64.b64encode(digest).decode()}"


def signing_key(secret: str) -> bytes:
    """What "whsec_" and base64 stand for; the bytes of any other secret are the key themselves. UsageError for base64
    that is none."""
    if not secret.startswith(PREFIX):
        return secret.encode()
    try:
        key = base64.b64decode(secret.removeprefix(PREFIX), validate=True)
    except ValueError:
        key = b""
    if not key:
        raise UsageError(
            f"a secret that begins with {PREFIX} goes on in base64, e.g. the output of openssl rand -base64 24"
        )
    return key


def _seconds(retry_after: str | None) -> float | None:
    """Retry-After in seconds; the date form is left to the backoff."""
    return float(retry_after) if retry_after and retry_after.isascii() and retry_after.isdigit() else None
