"""Where a URL leads: hosts that programs read differently, and IPv6 addresses that lead to IPv4 ones."""

from __future__ import annotations

import itertools
import random
from urllib.parse import urlsplit

import pytest

from dycoke_edge import UsageError
from dycoke_edge.runtime.place import place
from dycoke_edge.runtime.serve.hosts import AllowedHosts

PORTS = {"rtsp": 554, "http": 80, "https": 443}
DIFFERENT = [
    "rtsp://127.0.0.1:8554[fd00::1]/x",
    "rtsp://127.0.0.1[fd00::1]/x",
    "rtsp://127.0.0.1:[fd00::1]/x",
    "rtsp://[fd00::1]127.0.0.1/x",
    "rtsp://[fd00::1].evil.example/x",
    "rtsp://[fd00::1]:8554.evil.example/x",
    "rtsp://a[fd00::1]/x",
    "rtsp://a:b[c@[fd00::1]/x",
    "rtsp://[fd00::1]@127.0.0.1/x",
    "rtsp://127.0.0.1@[fd00::1]@10.0.0.1/x",
    "rtsp://10.0.0.1@b@127.0.0.1/x",
    "rtsp://[[fd00::1]]/x",
    "rtsp://[fd00::1/x",
    "rtsp://fd00::1]/x",
    "rtsp://fd00::1/x",
    "rtsp://[fd00::1%25eth0]/x",
    "rtsp://[fe80::1%eth0]/x",
    "rtsp://[v1.fd00]/x",
    "rtsp://[]/x",
    "rtsp://%31%32%37.0.0.1/x",
    "rtsp://127.0.0.1%00.example/x",
    "rtsp://127.0.0.1\\@10.0.0.1/x",
    "rtsp://10.0.0.1\\.evil.example/x",
    "rtsp://10.0.0.1:80:90/x",
    "rtsp://10.0.0.1:/x",
    "rtsp://10.0.0.1:0/x",
    "rtsp://10.0.0.1:65536/x",
    "rtsp://10.0.0.1:+80/x",
    "rtsp://10.0.0.1: 80/x",
    "rtsp://10.0.0.1:8_0/x",
    "rtsp://10.0.0.1:\u0668\u0660/x",
    "rtsp://10.0.0.1\u3002evil/x",
    "rtsp://\uff11\uff10.0.0.1/x",
    "rtsp://10.0.0.1\uff0f@127.0.0.1/x",
    "rtsp://10.0.0.1\t/x",
    "rtsp://10.0.0.1/\n",
    "rtsp://10.0.0.1\n",
    "\nrtsp://10.0.0.1/x",
    " rtsp://10.0.0.1/x",
    "rtsp://10.0.0.1 /x",
    "rtsp:///10.0.0.1/x",
    "rtsp:/10.0.0.1/x",
    "rtsp:10.0.0.1/x",
    "rtsp:////10.0.0.1/x",
    "rtsp:rtsp://10.0.0.1/x",
    "rtsp+tcp://10.0.0.1/x",
    "rt\tsp://10.0.0.1/x",
    "//10.0.0.1/x",
    "rtsp://127.0.0.1,10.0.0.1/x",
    "rtsp://10.0.0.1;127.0.0.1/x",
    "rtsp://10.0.0.1&@127.0.0.1#@10.0.0.2/x",
]


def ffmpeg(url: str) -> tuple[str, int]:
    """Host and port, as libavformat's av_url_split takes them apart."""
    rest = url.partition("://")[2]
    end = min((rest.find(letter) for letter in "/?#" if letter in rest), default=len(rest))
    rest = rest[:end].rpartition("@")[2]
    if rest.startswith("[") and "]" in rest:
        host, _, tail = rest[1:].partition("]")
        return host, _number(tail[1:]) if tail.startswith(":") else 0
    host, _, port = rest.partition(":")
    return host, _number(port)


def _number(text: str) -> int:
    digits = "".join(itertools.takewhile(lambda letter: letter in "0123456789", text))
    return int(digits or 0)


@pytest.mark.parametrize("url", DIFFERENT)
def test_what_programs_read_differently_is_refused(url: str) -> None:
    hosts = AllowedHosts("stream_hosts", ("10.0.0.0/8", "fd00::/8", "fe80::/10"))
    with pytest.raises(ValueError):
        parts = place(url, PORTS)
        hosts.addresses(parts.host, parts.port)


@pytest.mark.parametrize(
    ("url", "host", "port", "whole"),
    [
        ("rtsp://10.0.0.1/x", "10.0.0.1", 554, None),
        ("RTSP://Cam.Example:8554", "cam.example", 8554, "rtsp://cam.example:8554"),
        ("rtsp://u:p%40x!$&'()*+,;=~@h/x?a=b@c", "h", 554, None),
        ("rtsp://10.0.0.2:p@ss@h/x", "h", 554, "rtsp://10.0.0.2:p%40ss@h/x"),
        ("rtsp://h?x=[1]", "h", 554, None),
        ("rtsp://h/[1]@x:y", "h", 554, None),
        ("http://[FD00::1]:80/x", "fd00::1", 80, "http://[fd00::1]/x"),
        ("https://my_host-1.example./\u00e9", "my_host-1.example.", 443, None),
    ],
)
def test_what_all_read_alike(url: str, host: str, port: int, whole: str | None) -> None:
    found = place(url, PORTS)
    assert (found.host, found.port, str(found)) == (host, port, whole or url)


def test_a_bounded_fuzz_of_urls() -> None:
    """Whatever is accepted, Python and FFmpeg find the host and port in it that were checked."""
    pieces = [
        "10.0.0.1",
        "127.0.0.1",
        "fd00::1",
        "a",
        "[",
        "]",
        "@",
        ":",
        "/",
        "?",
        "#",
        "\\",
        "%",
        "%5b",
        "80",
        " ",
        "\t",
    ]
    random.seed(12)
    accepted = 0
    for _ in range(20_000):
        url = "rtsp://" + "".join(random.choices(pieces, k=random.randint(1, 6)))
        try:
            found = place(url, PORTS)
        except ValueError:
            continue
        accepted += 1
        parts = urlsplit(str(found))
        assert (parts.hostname or "", parts.port or 554) == (found.host, found.port), url
        host, port = ffmpeg(str(found))
        assert (host, port or 554) == (found.host, found.port), url
    assert accepted > 500


@pytest.mark.parametrize("form", ["::ffff:{}", "::{}", "::ffff:0:{}", "64:ff9b::{}"])
def test_an_address_counts_as_what_it_leads_to(form: str) -> None:
    hosts = AllowedHosts("stream_hosts", ("10.0.0.0/8", "::/0", "cam.example"))
    assert hosts.addresses(form.format("10.1.2.3"), 80)
    for inside in ("127.0.0.1", "169.254.169.254", "192.168.0.1", "8.8.8.8"):
        with pytest.raises(UsageError, match="not allowed"):
            hosts.addresses(form.format(inside), 80)


@pytest.mark.parametrize(
    "address",
    [
        "2002:7f00:1::", "2002:a9fe:a9fe::1", "2001:0:808:808::80ff:fffe", "2001:0:7f00:1::f7f7:f7f7",
        "fec0::1", "feff::1", "64:ff9b::7f00:1", "64:ff9b:1::7f00:1", "64:ff9b:1:7f00:1::", "64:ff9b:1::808:808",
        "::7f00:1", "::ffff:127.0.0.1", "::ffff:0:127.0.0.1", "fc00::1", "fe80::1", "::", "::1", "ff02::1",
        "2001:db8::1", "3fff::1", "100::1", "5f00::1", "4000::1", "0.0.0.0", "10.0.0.1", "100.64.0.1",
        "127.0.0.1", "169.254.0.1", "172.16.0.1", "192.0.0.1", "192.0.2.1", "192.88.99.1", "192.168.0.1",
        "198.18.0.1", "198.51.100.1", "203.0.113.1", "224.0.0.1", "240.0.0.1", "255.255.255.255",
    ],
)  # fmt: skip
def test_a_name_leads_to_public_addresses_only(address: str) -> None:
    hosts = AllowedHosts("fetch_hosts", ("cdn.example",), lambda host, port: ["93.184.215.14", address])
    with pytest.raises(UsageError, match="not allowed"):
        hosts.addresses("cdn.example", 80)


@pytest.mark.parametrize(
    "address", ["93.184.215.14", "2606:2800::1", "64:ff9b::5db8:d70e", "2002:5db8:d70e::1", "::ffff:93.184.215.14"]
)
def test_public_addresses_in_every_form(address: str) -> None:
    hosts = AllowedHosts("fetch_hosts", ("cdn.example",), lambda host, port: [address])
    assert hosts.addresses("cdn.example", 80) == [address]


def test_a_network_that_is_named_is_meant() -> None:
    named = AllowedHosts("stream_hosts", ("64:ff9b:1::/48", "2002:a00::/24"))
    assert named.addresses("64:ff9b:1::7f00:1", 80) and named.addresses("2002:a00::1", 80)
    with pytest.raises(UsageError, match="not allowed"):
        AllowedHosts("stream_hosts", ("::/0",)).addresses("64:ff9b:1::7f00:1", 80)
