"""Fetching URLs: everything has a deadline, whatever the other side sends, and goes where it was checked to go."""

from __future__ import annotations

import io
from collections.abc import Iterator
from time import sleep

import pytest

from dycoke_edge import InputError
from dycoke_edge.runtime.serve import fetch
from dycoke_edge.runtime.serve.fetch import Fetcher
from dycoke_edge.runtime.serve.hosts import AllowedHosts
from tests.talker import SLOW, flood, talking

HOSTS = AllowedHosts("fetch_hosts", ("127.0.0.2/32",))


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "TIMEOUT_S", 0.5)


@pytest.mark.parametrize("kind", SLOW)
def test_an_answer_that_drips_is_cut(kind: str) -> None:
    with talking(SLOW[kind], "127.0.0.2") as site:
        with pytest.raises(InputError, match=r"took more than 0.5 s|broken one"):
            Fetcher(HOSTS, 1000).fetch(f"http://127.0.0.2:{site.port}/x", io.BytesIO())
        assert site.gone.wait(20) and len(site.asked) == 1


def test_a_handshake_that_drips_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "STEP_S", 0.5)
    record = b"\x16\x03\x03\x40\x00\x02\x00\x3f\xfc"  # a ServerHello of 16 kB begins

    def script(asked: bytes) -> Iterator[bytes]:
        yield record
        while True:
            sleep(0.02)
            yield b"\0"

    with talking(script, "127.0.0.2") as site:
        with pytest.raises(InputError, match=r"took more than 0.5 s|broken one"):
            Fetcher(HOSTS, 1000).fetch(f"https://127.0.0.2:{site.port}/x", io.BytesIO())
        assert site.gone.wait(20)


@pytest.mark.parametrize(
    "head",
    [b"HTTP/1.1 200 OK\r\n\r\n", b"HTTP/1.1 200 OK\r\nX: ", b"HTTP/1.1 500 No\r\n\r\n", b"HTTP/1.1 200 OK\r\nA: b\r\n"],
)
def test_an_answer_without_an_end_is_cut(head: bytes) -> None:
    into = io.BytesIO()
    with talking(flood(head), "127.0.0.2") as site:
        with pytest.raises(InputError):
            Fetcher(HOSTS, 100_000).fetch(f"http://127.0.0.2:{site.port}/x", into)
        assert site.gone.wait(20)
    assert len(into.getvalue()) <= 100_000


@pytest.mark.parametrize("path", ["/a b", "/\u00e9?x=\u00e9", "/%20", "/?a=b&c=d#e", ""])
def test_what_is_asked_for_is_one_line(path: str) -> None:
    with talking(lambda asked: iter([b"HTTP/1.1 200 OK\r\n\r\nall"]), "127.0.0.2") as site:
        into = io.BytesIO()
        Fetcher(HOSTS, 1000).fetch(f"http://127.0.0.2:{site.port}{path}", into)
        assert into.getvalue() == b"all"
        line, host, *_ = site.asked[0].decode("ascii").split("\r\n")
        assert line.count(" ") == 2 and host == f"Host: 127.0.0.2:{site.port}"
