"""RTSP cameras that may be at some hosts only: no redirect, of whatever form, leads FFmpeg elsewhere."""

from __future__ import annotations

import random
import shutil
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dycoke_edge import VideoLLM
from dycoke_edge.config_camera import ReaderSpec
from dycoke_edge.runtime import hosts
from dycoke_edge.runtime.camera import relay
from dycoke_edge.runtime.camera.relay import Messages, Unfit
from dycoke_edge.runtime.camera.source import Source, SourceError, open_source
from tests.servers.camera import Answer, Camera, camera
from tests.serving import serving, wait_for

SPEC = ReaderSpec(hosts=("127.0.0.2/32",), open_timeout=5, read_timeout=4)
AWAY = "Location: rtsp://127.0.0.1:{port}/away"
REDIRECTS = [
    "RTSP/1.0 302 Found\r\nCSeq: {n}\r\n{away}\r\n\r\n",
    "RTSP/1.0 301 Moved\r\nCSeq: {n}\r\n{away}\r\n\r\n",
    "RTSP/1.0 303 See Other\r\nCSeq: {n}\r\n{away}\r\n\r\n",
    "RTSP/1.0 305 Use Proxy\r\nCSeq: {n}\r\n{away}\r\n\r\n",
    "RTSP/2.0  302 Found\r\nCSeq: {n}\r\n{away}\r\n\r\n",
    "RTSP/1.0 302\r\nCSeq: {n}\r\n{away}\r\n\r\n",
    "RTSP/1.0 302 Found\nCSeq: {n}\n{away}\n\n",
    "RTSP/1.0 302 Found\nCSeq: {n}\n{away}\n\r\n",
    "\r\n\r\nRTSP/1.0 302 Found\r\nCSeq: {n}\r\n{away}\r\n\r\n",
    " RTSP/1.0 302 Found\r\nCSeq: {n}\r\n{away}\r\n\r\n",
    "\tRTSP/1.0 302 Found\r\nCSeq: {n}\r\n{away}\r\n\r\n",
    "RTSP/1.0\t302 Found\r\nCSeq: {n}\r\n{away}\r\n\r\n",
    "RTSP/ 302 Found\r\nCSeq: {n}\r\n{away}\r\n\r\n",
    "RTSP/1.0 +302 Found\r\nCSeq: {n}\r\n{away}\r\n\r\n",
    "RTSP/1.0 0302 Found\r\nCSeq: {n}\r\n{away}\r\n\r\n",
    "RT\rSP/1.0 302 Found\r\nCSeq: {n}\r\n{away}\r\n\r\n",
    "RTSP/1.0 200 OK\r\nCSeq: 77\r\nContent-Length: 0\r\n\r\nRTSP/1.0 302 Found\r\nCSeq: {n}\r\n{away}\r\n\r\n",
    "RTSP/1.0 200 OK\r\nContent-Length: 9\r\nContent-Length: 0\r\n\r\nRTSP/1.0 302 F\r\nCSeq: {n}\r\n{away}\r\n\r\n",
    "RTSP/1.0 200 OK\r\nCSeq: 77\r\nContent-Length: 0x60\r\n\r\nRTSP/1.0 302 F\r\nCSeq: {n}\r\n{away}\r\n\r\n",
    "RTSP/1.0 200 OK\r\nCSeq: 77\r\nContent-Length : 90\r\n\r\nRTSP/1.0 302 F\r\nCSeq: {n}\r\n{away}\r\n\r\n",
    "RTSP/1.0 200 OK\r\n$\x00\x00\x02ab\r\nCSeq: 77\r\n\r\nRTSP/1.0 302 F\r\nCSeq: {n}\r\n{away}\r\n\r\n",
    "$\x00\x00\x02abRTSP/1.0 302 Found\r\nCSeq: {n}\r\n{away}\r\n\r\n",
    "REDIRECT rtsp://127.0.0.1/x RTSP/1.0\r\nCSeq: 1\r\n{away}\r\n\r\n",
    "OPTIONS * RTSP/1.0\r\nCSeq: 1\r\n\r\nRTSP/1.0 302 Found\r\nCSeq: {n}\r\n{away}\r\n\r\n",
]  # fmt: skip


@pytest.fixture
def elsewhere() -> Iterator[Camera]:
    """Where nobody may be led."""
    with camera() as other:
        yield other


def told(method: str, text: str, port: int) -> Answer:
    """A camera that answers one method so."""

    def answer(asked: str, number: str) -> bytes | None:
        said = text.replace("{n}", number).replace("{away}", AWAY.format(port=port))
        return said.encode("latin-1") if asked == method else None

    return answer


def opened(at: Camera, spec: ReaderSpec = SPEC, scheme: str = "rtsp") -> Source:
    return open_source(f"{scheme}://u:p%40ss@127.0.0.2:{at.port}/x?y=z", spec)


def test_ffmpeg_follows_when_it_may(elsewhere: Camera) -> None:
    """The control: without `hosts` a redirect is followed, as for an operator's own cameras."""
    with camera(told("DESCRIBE", REDIRECTS[0], elsewhere.port), "127.0.0.2") as first:
        source = opened(first, ReaderSpec(open_timeout=5, read_timeout=4))
        source.open()
        source.close()
    assert elsewhere.connections == 1


@pytest.mark.parametrize("text", REDIRECTS)
def test_no_redirect_is_followed(elsewhere: Camera, text: str) -> None:
    with camera(told("DESCRIBE", text, elsewhere.port), "127.0.0.2") as first:
        source = opened(first)
        with pytest.raises(SourceError) as caught:
            source.open()
        source.close()
        assert first.connections == 1 and elsewhere.connections == 0
        assert caught.value.code == "refused" and "ss@" not in str(caught.value)


@pytest.mark.parametrize("method", ["OPTIONS", "SETUP", "PLAY", "END"])
def test_no_redirect_is_followed_at_any_time(elsewhere: Camera, method: str) -> None:
    with camera(told(method, REDIRECTS[0], elsewhere.port), "127.0.0.2") as first:
        source = opened(first)
        with pytest.raises(SourceError, match="redirects to another address, which is not followed"):
            source.open()
            for _ in source:
                pass
        source.close()
        assert elsewhere.connections == 0


def test_a_camera_is_read_through_the_relay() -> None:
    with camera(host="127.0.0.2") as at:
        source = opened(at)
        assert source.open().width == 64
        frames = list(source)
        source.close()
    assert len(frames) == 40 and at.connections == 1
    assert all("127.0.0.1" in request.split("\r\n")[0] and "/x" in request for request in at.asked)


def test_tls_ends_in_the_relay(tmp_path: Path, elsewhere: Camera) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("no openssl")
    made = ("-keyout", tmp_path / "key.pem", "-out", tmp_path / "cert.pem", "-subj", "/CN=camera", "-days", "2")
    subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", *made], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
    with camera(host="127.0.0.2", context=context) as at:
        source = opened(at, scheme="rtsps")
        source.open()
        assert len(list(source)) == 40
        source.close()
    answer = told("DESCRIBE", REDIRECTS[0], elsewhere.port)
    with camera(answer, "127.0.0.2", context) as at, pytest.raises(SourceError, match="redirects"):
        opened(at, scheme="rtsps").open()
    with camera(host="127.0.0.2") as at, pytest.raises(SourceError) as caught:
        opened(at, scheme="rtsps").open()
    assert caught.value.code in ("tls", "timeout") and elsewhere.connections == 0


def test_a_name_is_checked_at_every_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that led to a camera yesterday leads inside today."""
    answers = iter([["127.0.0.2"], ["127.0.0.1"], OSError])

    def resolve(host: str, port: int) -> list[str]:
        found = next(answers)
        if isinstance(found, list):
            return found
        raise OSError

    monkeypatch.setattr(hosts, "resolve", resolve)
    spec = ReaderSpec(hosts=("cam.example", "127.0.0.2/32"), open_timeout=5, read_timeout=4)
    with camera(host="127.0.0.2") as at:
        first = open_source(f"rtsp://cam.example:{at.port}/x", spec)
        first.open()
        first.close()
        for reason in ("not allowed", "no address"):
            with pytest.raises(SourceError, match=reason):
                open_source(f"rtsp://cam.example:{at.port}/x", spec).open()
    assert at.connections == 1


def test_a_camera_that_was_added_over_http(tiny_bundle: Path, elsewhere: Camera) -> None:
    llm = VideoLLM.load(tiny_bundle, kv_capacity=2048, prefill_chunk=64)
    with (
        camera(host="127.0.0.2") as good,
        camera(told("DESCRIBE", REDIRECTS[0], elsewhere.port), "127.0.0.2") as bad,
        serving(llm, stream_hosts=("127.0.0.2/32",)) as server,
    ):
        for name, at in (("good", good), ("bad", bad)):
            new = {"liveStreamUrl": f"rtsp://127.0.0.2:{at.port}/x", "id": name, "window_s": 1, "fps": 2}
            assert server.http.post("/v1/live-stream", json=new).status_code == 201

        def shown(name: str) -> dict[str, Any]:
            found: dict[str, Any] = server.http.get(f"/v1/live-stream/{name}").json()
            return found

        wait_for(lambda: shown("good").get("decoded_frames"))
        told_why = str(wait_for(lambda: shown("bad").get("error")))
        assert "redirects to another address" in told_why and shown("bad")["liveStreamUrl"].endswith(f":{bad.port}/x")
        assert elsewhere.connections == 0


def test_messages_come_out_the_same_however_they_are_cut() -> None:
    packet = b"$\0\0\5RTSP/"
    sent = packet + b"RTSP/1.0 200 OK\nCSeq: 1\r\nContent-length:  3\r\n\r\n\r\n$" + packet + b"\r\n" + packet
    sent += b"GET_PARAMETER * RTSP/1.0\r\nX\r\n\r\n" + packet
    wanted = packet + b"RTSP/1.0 200 OK\r\nCSeq: 1\r\nContent-Length: 3\r\n\r\n\r\n$" + packet + packet
    wanted += b"GET_PARAMETER * RTSP/1.0\r\nX\r\nContent-Length: 0\r\n\r\n" + packet
    random.seed(12)
    for _ in range(300):
        cuts = sorted(random.choices(range(len(sent)), k=random.randint(0, 20)))
        messages = Messages()
        parts = [sent[start:end] for start, end in zip([0, *cuts], [*cuts, len(sent)], strict=True)]
        assert b"".join(messages.fit(part) for part in parts) == wanted


def test_a_bounded_fuzz_of_messages() -> None:
    """Nothing is handed on that is neither a packet nor a plain message, and little is held."""
    pieces = [
        b"RTSP/1.0 ",
        b"200",
        b"302",
        b" OK",
        b"\r\n",
        b"\n",
        b"\r",
        b"$",
        b"\0\0\2ab",
        b"CSeq: 1",
        b"Content-Length: 4",
    ]
    random.seed(12)
    handed = 0
    for _ in range(20_000):
        messages, sent = Messages(), b"".join(random.choices(pieces, k=random.randint(1, 14)))
        try:
            out = messages.fit(sent)
        except Unfit:
            continue
        while out:
            handed += 1
            if out.startswith(b"$"):
                out = out[4 + int.from_bytes(out[2:4], "big") :]
                continue
            head, _, out = out.partition(b"\r\n\r\n")
            lines = head.split(b"\r\n")
            assert lines[0].startswith(b"RTSP/1.0 200") and not any(b"\n" in line or b"\r" in line for line in lines)
            out = out[int(lines[-1].removeprefix(b"Content-Length: ")) :]
    assert handed > 100


def test_a_header_without_an_end_is_not_kept() -> None:
    messages = Messages()
    with pytest.raises(Unfit):
        for _ in range(1000):
            messages.fit(b"X: y\r\n" * 100)
    assert len(messages._held) < 2 * relay.HEADER_BYTES
