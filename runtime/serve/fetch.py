"""Fetches http(s) URLs of allowed hosts: from the address that was checked, without redirects, with a ceiling."""

from __future__ import annotations

import ssl
from collections.abc import Callable, Iterator
from contextlib import closing
from time import monotonic
from typing import IO
from urllib.parse import urlsplit

import urllib3

from dycoke_edge.errors import InputError, UsageError
from dycoke_edge.runtime.serve.hosts import AllowedHosts

TIMEOUT_S = 30.0
BLOCK = 1 << 16


class Fetcher:
    """Connects to the address that the allow-list was asked about, so a second look-up cannot change it."""

    def __init__(self, hosts: AllowedHosts, max_bytes: int, clock: Callable[[], float] = monotonic) -> None:
        self._hosts, self._max_bytes, self._clock = hosts, max_bytes, clock

    def fetch(self, url: str, into: IO[bytes]) -> None:
        """Write what a URL holds. UsageError for a URL that is not allowed, InputError if it cannot be had."""
        try:
            parts = urlsplit(url)
            host, port = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
        except ValueError:
            raise UsageError("this URL is malformed; give e.g. https://host/clip.mp4") from None
        if "@" in parts.netloc:
            raise UsageError("this URL holds a login; a URL to fetch must not")
        address = self._hosts.addresses(host, port)[0]
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        try:
            with closing(self._pool(parts.scheme, address, host, port)) as pool:
                self._read(pool, path, parts.netloc, into)
        except InputError:
            raise
        except (urllib3.exceptions.HTTPError, OSError, ValueError):
            raise InputError("the URL cannot be fetched: no answer, or a broken one") from None

    def _pool(self, scheme: str, address: str, host: str, port: int) -> urllib3.HTTPConnectionPool:
        timeout = urllib3.Timeout(connect=5.0, read=10.0)
        if scheme == "http":
            return urllib3.HTTPConnectionPool(address, port, timeout=timeout)
        return urllib3.HTTPSConnectionPool(
            address,
            port,
            timeout=timeout,
            server_hostname=host,
            assert_hostname=host,
            cert_reqs="CERT_REQUIRED",
            ssl_context=ssl.create_default_context(),
        )

    def _read(self, pool: urllib3.HTTPConnectionPool, path: str, host: str, into: IO[bytes]) -> None:
        headers = {"Host": host, "User-Agent": "dycoke-edge", "Accept-Encoding": "identity"}
        answer = pool.request(
            "GET", path, headers=headers, redirect=False, retries=False, preload_content=False, decode_content=False
        )
        with closing(answer):
            if answer.status != 200:
                raise InputError(f"the URL answered with HTTP {answer.status}; redirects are not followed")
            for block in self._blocks(answer):
                into.write(block)

    def _blocks(self, answer: urllib3.BaseHTTPResponse) -> Iterator[bytes]:
        end, total = self._clock() + TIMEOUT_S, 0
        while block := answer.read1(BLOCK):
            total += len(block)
            if total > self._max_bytes:
                raise InputError(f"the URL holds more than {self._max_bytes} bytes; give a smaller file")
            if self._clock() > end:
                raise InputError(f"the URL took more than {TIMEOUT_S:g} s; give it as a data URL")
            yield block
