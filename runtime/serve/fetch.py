"""Fetches http(s) URLs of allowed hosts: from the address that was checked, without redirects, with ceilings."""

from __future__ import annotations

import ssl
import string
from contextlib import closing
from http.client import HTTPException
from typing import IO
from urllib.parse import quote

import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection

from dycoke_edge.errors import InputError, UsageError
from dycoke_edge.runtime.deadline import within
from dycoke_edge.runtime.place import Place, place
from dycoke_edge.runtime.serve.hosts import AllowedHosts

PORTS = {"http": 80, "https": 443}
TIMEOUT_S = 30.0  # from connecting to the last byte
STEP_S = 5.0  # that connecting, TLS and each read may take
BLOCK = 1 << 16


class Fetcher:
    """Connects to the address that the allow-list was asked about, so a second look-up cannot change it."""

    def __init__(self, hosts: AllowedHosts, max_bytes: int) -> None:
        self._hosts, self._max_bytes = hosts, max_bytes

    def fetch(self, url: str, into: IO[bytes]) -> None:
        """Write what a URL holds. UsageError for a URL that is not allowed, InputError if it cannot be had, all of it,
        within TIMEOUT_S."""
        try:
            parts = place(url, PORTS)
        except ValueError:
            raise UsageError("this URL is malformed; give e.g. https://host/clip.mp4") from None
        if parts.login:
            raise UsageError("this URL holds a login; a URL to fetch must not")
        address = self._hosts.addresses(parts.host, parts.port)[0]
        try:
            connection = _connection(parts, address)
            with closing(connection), within(connection, TIMEOUT_S):
                self._read(connection, parts, into)
        except InputError:
            raise
        except TimeoutError:
            raise InputError(f"the URL took more than {TIMEOUT_S:g} s; give it as a data URL") from None
        except (urllib3.exceptions.HTTPError, HTTPException, OSError, ValueError):
            raise InputError("the URL cannot be fetched: no answer, or a broken one") from None

    def _read(self, connection: HTTPConnection, parts: Place, into: IO[bytes]) -> None:
        headers = {"Host": parts.netloc, "User-Agent": "dycoke-edge", "Accept-Encoding": "identity"}
        target = "/" + parts.rest.partition("#")[0].removeprefix("/")
        connection.request(
            "GET", quote(target, safe=string.punctuation), headers=headers, preload_content=False, decode_content=False
        )
        with closing(connection.getresponse()) as answer:
            if answer.status != 200:
                raise InputError(f"the URL answered with HTTP {answer.status}; redirects are not followed")
            total = 0
            while block := answer.read1(BLOCK):
                total += len(block)
                if total > self._max_bytes:
                    raise InputError(f"the URL holds more than {self._max_bytes} bytes; give a smaller file")
                into.write(block)


def _connection(parts: Place, address: str) -> HTTPConnection:
    if parts.scheme == "http":
        return HTTPConnection(address, parts.port, timeout=STEP_S)
    return HTTPSConnection(
        address,
        parts.port,
        timeout=STEP_S,
        server_hostname=parts.host,
        assert_hostname=parts.host,
        cert_reqs="CERT_REQUIRED",
        ssl_context=ssl.create_default_context(),
    )
