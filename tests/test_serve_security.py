"""Hostile requests: what a server must never read, fetch, hold or say."""

from __future__ import annotations

import http.server
import json
import os
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from time import sleep
from typing import Any

import httpx
import pytest
from PIL import Image

from dycoke_edge import InputError, UsageError, VideoLLM
from dycoke_edge.config_serve import ServeSpec
from dycoke_edge.runtime.repetition import Repetition
from dycoke_edge.runtime.serve import bodies, media
from dycoke_edge.runtime.serve.hosts import AllowedHosts
from dycoke_edge.runtime.serve.messages import ChatRequest
from tests import clips
from tests.serving import CHAT, Served, data_url, drain, error, image, serving, text, video, wait_for

KEY = "0123456789abcdef-canary"
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def model(tiny_bundle: Path) -> VideoLLM:
    return VideoLLM.load(tiny_bundle, kv_capacity=2048, prefill_chunk=64)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return clips.write_clip(tmp_path_factory.mktemp("clip") / "clip.mp4")


@pytest.fixture(scope="module")
def site(clip: Path) -> Iterator[Site]:
    with Site.running(clip.read_bytes()) as site:
        yield site


@pytest.fixture(scope="module")
def allowed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose files may be asked about."""
    return tmp_path_factory.mktemp("allowed")


@pytest.fixture(scope="module")
def served(model: VideoLLM, allowed: Path) -> Iterator[Served]:
    limits: dict[str, Any] = {"max_body_bytes": 300_000, "max_pixels": 40_000, "max_video_s": 10.0}
    hosts: dict[str, Any] = {"fetch_hosts": ("127.0.0.2/32",), "stream_hosts": ("10.0.0.0/8", "cam.example")}
    times: dict[str, Any] = {"header_timeout_s": 0.5, "body_timeout_s": 0.5, "send_timeout_s": 0.5}
    with serving(model, file_dirs=(str(allowed),), max_connections=20, **limits, **hosts, **times) as server:
        yield server


class Site:
    """A web server on loopback that remembers what it was asked."""

    def __init__(self, content: bytes) -> None:
        self.asked = list[tuple[str, str | None]]()
        site = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                site.asked.append((self.path, self.headers["Host"]))
                if self.path == "/away":
                    self.send_response(302)
                    self.send_header("Location", "/clip.mp4")
                    self.end_headers()
                    return
                body = b"x" * 2_000_000 if self.path == "/huge" else content
                self.send_response(404 if self.path == "/gone" else 200)
                self.end_headers()  # no length: only counting tells how much it is
                with suppress(OSError):  # the client had enough
                    self.wfile.write(body)

            def log_message(self, format: str, *arguments: Any) -> None: ...

        self.server = http.server.ThreadingHTTPServer(("0.0.0.0", 0), Handler)
        self.port = self.server.server_address[1]

    @classmethod
    @contextmanager
    def running(cls, content: bytes) -> Iterator[Site]:
        site = cls(content)
        thread = threading.Thread(target=site.server.serve_forever, args=(0.02,))
        thread.start()
        yield site
        site.server.shutdown()
        site.server.server_close()
        thread.join()


# URLs to fetch


def test_an_allowed_url_is_fetched(served: Served, site: Site) -> None:
    response = served.ask(video(f"http://127.0.0.2:{site.port}/clip.mp4?a=b"), text())
    assert response.status_code == 200 and response.json()["dycoke"]["frames"] > 1
    assert site.asked.pop() == ("/clip.mp4?a=b", f"127.0.0.2:{site.port}")


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("http://127.0.0.1:{port}/clip.mp4", "not allowed"),
        ("http://localhost:{port}/clip.mp4", "not allowed"),
        ("http://[::ffff:127.0.0.1]:{port}/clip.mp4", "not allowed"),
        ("http://2130706433:{port}/clip.mp4", "not allowed"),
        ("http://0x7f.1:{port}/clip.mp4", "not allowed"),
        ("http://169.254.169.254/latest/meta-data/", "not allowed"),
        ("http://127.0.0.2@127.0.0.1:{port}/clip.mp4", "holds a login"),
        ("http://127.0.0.2:{port}\\@127.0.0.1:{port}/", ""),
        ("http://127.0.0.2:99999/", "malformed"),
        ("http:///clip.mp4", "not allowed"),
        ("ftp://127.0.0.2/clip.mp4", "give a data: URL"),
        ("rtsp://127.0.0.2/x", "give a data: URL"),
        ("gst://videotestsrc", "give a data: URL"),
        ("concat:/etc/passwd", "give a data: URL"),
    ],
)
def test_no_other_url_is_fetched(served: Served, site: Site, url: str, said: str) -> None:
    site.asked.clear()
    for part in (video, image):
        assert said in error(served.ask(part(url.format(port=site.port)), text()), 400)["message"]
    assert site.asked == []


@pytest.mark.parametrize(
    ("path", "said"), [("/away", "HTTP 302"), ("/gone", "HTTP 404"), ("/huge", "more than 300000")]
)
def test_redirects_and_floods_are_refused(served: Served, site: Site, path: str, said: str) -> None:
    site.asked.clear()
    assert said in error(served.ask(video(f"http://127.0.0.2:{site.port}{path}"), text()), 400)["message"]
    assert [asked for asked, _ in site.asked] == [path]


def test_nothing_is_fetched_unless_configured(tiny_bundle: Path, site: Site) -> None:
    site.asked.clear()
    with serving(VideoLLM.load(tiny_bundle, kv_capacity=1024)) as plain:
        for url in (f"http://127.0.0.2:{site.port}/clip.mp4", "file:///etc/passwd"):
            error(plain.ask(video(url), text()), 400)
        refused = plain.http.post("/v1/live-stream", json={"liveStreamUrl": "rtsp://10.0.0.1/x"})
        assert error(refused, 403)["code"] == "host_not_allowed"
    assert site.asked == []


@pytest.mark.parametrize(
    "address", ["127.0.0.1", "169.254.169.254", "10.1.1.1", "::1", "fe80::1%eth0", "::ffff:10.0.0.1"]
)
def test_a_name_that_leads_inside_is_refused(address: str) -> None:
    """DNS rebinding: the name is allowed, what it points to is not. One bad address among good ones is enough."""
    hosts = AllowedHosts("fetch_hosts", ("cdn.example",), lambda host, port: ["93.184.215.14", address])
    with pytest.raises(UsageError, match=r"not allowed.*fetch_hosts"):
        hosts.addresses("cdn.example", 80)


def test_a_name_is_looked_up_once() -> None:
    """What is connected to is what was checked."""
    answers = iter([["93.184.215.14"], ["127.0.0.1"]])
    hosts = AllowedHosts("fetch_hosts", ("cdn.example",), lambda host, port: next(answers))
    assert hosts.addresses("CDN.example.", 80) == ["93.184.215.14"]
    inside = AllowedHosts("fetch_hosts", ("cdn.example", "10.0.0.0/8"), lambda host, port: ["10.1.2.3"])
    assert inside.addresses("cdn.example", 80) == ["10.1.2.3"]
    with pytest.raises(UsageError, match="not allowed"):
        inside.addresses("other.example", 80)


# Files


@pytest.mark.parametrize("name", ["clip.mp4", "folder/../clip.mp4", "%63lip.mp4"])
def test_files_inside_are_read(served: Served, allowed: Path, clip: Path, name: str) -> None:
    (allowed / "clip.mp4").write_bytes(clip.read_bytes())
    (allowed / "folder").mkdir(exist_ok=True)
    assert served.ask(video(f"file://{allowed}/{name}"), text()).status_code == 200


@pytest.mark.parametrize(
    "name",
    [
        "../secret.mp4",
        "%2e%2e/secret.mp4",
        "link.mp4",
        "folder/link.mp4",
        "hard/secret.mp4",
        "pipe",
        ".",
        "none",
        "%00",
    ],
)
def test_files_outside_are_not(served: Served, allowed: Path, clip: Path, name: str) -> None:
    outside = allowed.parent / "secret.mp4"
    outside.write_bytes(clip.read_bytes())
    (allowed / "folder").mkdir(exist_ok=True)
    for link, target in ((allowed / "link.mp4", outside), (allowed / "folder/link.mp4", outside)):
        if not link.is_symlink():
            link.symlink_to(target)
    if not (allowed / "hard").is_symlink():
        (allowed / "hard").symlink_to(allowed.parent)
    if not (allowed / "pipe").exists():
        os.mkfifo(allowed / "pipe")
    found = error(served.ask(video(f"file://{allowed}/{name}"), text()), 400)
    assert str(allowed) not in found["message"]
    for url in ("file:///etc/passwd", "file:///proc/self/environ", "file:///dev/zero", "file://host/x", str(outside)):
        error(served.ask(image(url), text()), 400)


# What files may be


def playlist(kind: str, target: Path) -> bytes:
    lists = {
        "hls": f"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\nfile://{target}\n#EXT-X-ENDLIST\n",
        "concat": f"ffconcat version 1.0\nfile {target}\n",
        "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\n"
        "m=video 5004 RTP/AVP 96\na=rtpmap:96 H264/90000\n",
        "text": "root:x:0:0:root:/root:/bin/bash\n" * 20,
    }
    return lists[kind].encode()


@pytest.mark.parametrize("kind", ["hls", "concat", "sdp", "text"])
def test_lists_that_name_other_files_are_no_videos(served: Served, clip: Path, kind: str) -> None:
    found = error(served.ask(video(data_url(playlist(kind, clip))), text()), 400)
    assert "cannot be read as a video" in found["message"]


def test_bombs_are_refused_before_they_are_decoded(served: Served, tmp_path: Path) -> None:
    Image.new("1", (20_000, 20_000)).save(tmp_path / "bomb.png")
    assert (
        "40000 pixels" in error(served.ask(image(data_url(tmp_path / "bomb.png", "image/png")), text()), 400)["message"]
    )
    large = clips.write_clip(tmp_path / "large.mp4", size=(640, 480), frames=4)
    assert "640 x 480 pixels" in error(served.ask(video(data_url(large)), text()), 400)["message"]
    long = clips.write_clip(tmp_path / "long.mp4", frames=2, times=[0, 3600])
    assert "at most 10 s" in error(served.ask(video(data_url(long)), text()), 400)["message"]


def test_a_picture_that_grows_on_the_way(served: Served, tmp_path: Path) -> None:
    small = clips.write_clip(tmp_path / "small.h264", size=(64, 48), frames=4)
    large = clips.write_clip(tmp_path / "large.h264", size=(640, 480), frames=4)
    both = tmp_path / "both.h264"
    both.write_bytes(small.read_bytes() + large.read_bytes())
    assert len(clips.marks(both)) == 8
    with pytest.raises(InputError, match=r"damaged|cannot be read"):
        clips.marks(both, max_pixels=10_000)
    assert "damaged" in error(served.ask(video(data_url(both)), text()), 400)["message"]  # 40,000 are allowed


@pytest.mark.parametrize("kind", ["WEBP", "PNG"])
def test_an_animation_is_a_video(served: Served, kind: str, tmp_path: Path) -> None:
    path, drawn = tmp_path / "clip.bin", [Image.fromarray(clips.mark(k)) for k in range(6)]
    drawn[0].save(path, kind, save_all=True, append_images=drawn[1:], duration=500, lossless=True)
    assert served.ask(video(data_url(path)), text(), max_tokens=1).status_code == 200
    drawn[0].save(path, kind, save_all=True, append_images=drawn[1:], duration=3000, lossless=True)
    assert "18 s long; at most 10 s" in error(served.ask(video(data_url(path)), text()), 400)["message"]
    large = [image.resize((640, 480)) for image in drawn]
    large[0].save(path, kind, save_all=True, append_images=large[1:], duration=100)
    assert "640 x 480 pixels" in error(served.ask(video(data_url(path)), text()), 400)["message"]


def test_a_million_packets(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(media, "PACKETS", 20)
    with pytest.raises(InputError, match="21 or more frames"):
        media.check_video(clip, ServeSpec())


@pytest.mark.parametrize(
    ("cut", "shown"),
    [
        (lambda whole: clips.trimmed(whole, 2.3), 44),
        (lambda whole: clips.edited(whole, [(1.5, 0.42)]), 18),
        (lambda whole: clips.edited(whole, [(0.5, None), (6.0, 0.0)]), 72),  # shown half a second late
    ],
)
def test_what_an_edit_list_hides_has_no_length(cut: Callable[[Path], Path], shown: int, tmp_path: Path) -> None:
    options = {"g": "250", "bf": "2", "x264-params": "scenecut=0"}
    path = cut(clips.write_clip(tmp_path / "whole.mp4", codec="libx264", options=options, frames=72))
    spec = ServeSpec(file_dirs=(str(tmp_path),), max_frames=shown, max_video_s=shown / 12 + 0.01)
    assert media.check_video(path, spec) == pytest.approx(shown / 12)
    assert len(media.Media(spec, clips.SIZE).video(path.as_uri(), media.Wanted(fps=12))) == shown
    assert len(media.Media(spec, clips.SIZE).video(path.as_uri(), media.Wanted(fps=6))) == shown // 2


def test_what_an_edit_list_hides_is_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = clips.edited(clips.write_clip(tmp_path / "whole.mp4", frames=72), [(0.5, 0.0)])
    monkeypatch.setattr(media, "PACKETS", 20)
    with pytest.raises(InputError, match="21 or more frames"):
        media.check_video(path, ServeSpec())


# Bodies and connections


def raw(head: str, body: bytes = b"") -> bytes:
    return f"{head}\r\nHost: 127.0.0.1\r\n".encode() + body


def test_a_large_body_is_refused_unread(served: Served) -> None:
    said = served.send(
        raw(f"POST {CHAT} HTTP/1.1", b"Content-Type: application/json\r\nContent-Length: 2147483648\r\n\r\n")
    )
    assert said.startswith(b"HTTP/1.1 413 ") and b'"code":"too_large"' in said
    assert error(served.ask(text("x" * 400_000)), 413)
    assert error(served.http.request("GET", "/v1/models", content=b"x"), 413)


def test_only_questions_may_be_large(served: Served) -> None:
    body = b'{"prompt": "' + b"x" * 140_000 + b'"}'
    for method, path in (("POST", "/v1/alerts"), ("PUT", "/v1/alerts/x"), ("POST", "/v1/live-stream"), ("PUT", CHAT)):
        found = error(served.http.request(method, path, content=body, headers=JSON), 413)
        assert "at most 131072 bytes" in found["message"]


def test_bodies_are_bounded_together(model: VideoLLM) -> None:
    head = raw(f"POST {CHAT} HTTP/1.1", b"Content-Type: application/json\r\nContent-Length: 300000\r\n\r\n")
    with serving(model, max_bodies_bytes=500_000) as served:
        with socket.create_connection(("127.0.0.1", served.port), 10) as first:
            first.sendall(head + b" " * 290_000)
            wait_for(lambda: b"HTTP/1.1 429 " in served.send(head + b" " * 300_000))
            assert served.ask(text()).status_code == 200  # there is room for a small one
        wait_for(lambda: served.ask(text("x" * 300_000)).status_code == 400)  # too many letters: it was read
        assert [served.ask(text("x" * 300_000)).status_code for _ in range(3)] == [400] * 3  # and given back


def test_bytes_are_given_back_before_an_answer_begins(model: VideoLLM, clip: Path) -> None:
    with serving(model, max_bodies_bytes=200_000, max_new_tokens=1000) as served:
        part = video(data_url(clip.read_bytes() + b" " * 50_000))
        body = {"model": served.model, "messages": [{"role": "user", "content": [part, text()]}], "max_tokens": 1000}
        with served.http.stream("POST", CHAT, json=body | {"stream": True}) as answer:
            next(answer.iter_lines())
            assert "letters" in error(served.ask(text("x" * 150_000)), 400)["message"]


def test_a_large_body_in_chunks_is_refused(served: Served) -> None:
    chunk = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
    head = raw(f"POST {CHAT} HTTP/1.1", b"Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n")
    assert served.send(head + chunk * 6).startswith(b"HTTP/1.1 413 ")


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 100_000,
        b"{",
        b"\xff",
        b'{"model": NaN}',
        b"9" * 10_000,
        b'{"model": "\\ud800", "messages": []}',
        b"null",
        b"",
    ],
)
def test_what_is_no_request(served: Served, body: bytes) -> None:
    for path in (CHAT, "/v1/live-stream", "/v1/alerts"):
        error(served.http.post(path, content=body, headers=JSON), 400)


def chat(messages: str) -> bytes:
    return f'{{"model": "x", "messages": [{messages}]}}'.encode()


MESSAGE, PART = '{"role": "user", "content": [%s]}', '{"type": "text", "text": "a"}'


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        (chat(MESSAGE % ",".join(["{},[]"] * 12_000)), 400, "too many values"),
        (chat(MESSAGE % ("[" * 40_000)), 400, "too many values"),
        (b'{"metadata": {' + b",".join(b'"%d":0' % (i % 10) for i in range(40_000)) + b"}}", 400, "too many values"),
        (chat(MESSAGE % ",".join([PART] * 129)), 400, "at most 128 items"),
        (chat(",".join([MESSAGE % PART] * 65)), 400, "at most 64 items"),
        (chat(MESSAGE % ",".join(['{"type": "x"}'] * 64)), 400, "messages.0.content.0: should be one of"),
        (chat(MESSAGE % ("[" * 5000)), 400, "is not JSON"),
        (b'{"model": ' + b"9" * 5000 + b"}", 400, ""),
    ],
)  # fmt: skip
def test_bodies_of_many_values(served: Served, body: bytes, status: int, said: str) -> None:
    assert said in error(served.http.post(CHAT, content=body, headers=JSON), status)["message"]


def test_64_messages_of_128_parts_are_a_request() -> None:
    asked = chat(",".join([MESSAGE % ",".join([PART] * 128)] * 64))
    body = bytearray(asked.split(b"\r\n\r\n")[-1])
    read = bodies.parse(ChatRequest, body, bodies.VALUES)
    assert isinstance(read, ChatRequest) and body == b""
    assert sum(len(message.content or "") for message in read.messages) == 8192


def test_bodies_are_read_apart_from_the_event_loop(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = list[str]()
    real = json.loads

    def loads(text: str) -> Any:
        seen.append(threading.current_thread().name)
        return real(text)

    monkeypatch.setattr(json, "loads", loads)
    for path in (CHAT, "/v1/live-stream", "/v1/alerts", "/v1/alerts/x"):
        served.http.request("PUT" if path.endswith("x") else "POST", path, json={})
    assert len(seen) == 4 and "server" not in seen  # that is the loop's thread


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
def test_a_form_is_no_request(served: Served, kind: str) -> None:
    error(served.http.post("/v1/alerts", content=b'{"prompt": "Is it?"}', headers={"Content-Type": kind}), 415)


@pytest.mark.parametrize(
    "begun",
    [
        b"",
        b"GET / HT",
        raw("GET /v1/models HTTP/1.1"),
        raw("GET /v1/models HTTP/1.1", b"\r\n") + b"GET / H",  # slow only the second time
    ],
)
def test_a_header_that_does_not_end(served: Served, begun: bytes) -> None:
    served.send(begun)  # returns when the server hangs up


def test_a_header_that_drips(served: Served) -> None:
    with socket.create_connection(("127.0.0.1", served.port), 10) as connection, pytest.raises(OSError):
        for _ in range(100):
            connection.sendall(b"G")
            threading.Event().wait(0.05)


def test_a_body_that_does_not_end(served: Served) -> None:
    said = served.send(raw(f"POST {CHAT} HTTP/1.1", b"Content-Type: application/json\r\nContent-Length: 9\r\n\r\n{"))
    assert said.startswith(b"HTTP/1.1 408 ") and b'"code":"timeout"' in said


def test_an_answer_before_the_body_is_not_lost(served: Served) -> None:
    with socket.create_connection(("127.0.0.1", served.port), 10) as connection:
        connection.sendall(
            raw("POST /v1/alerts HTTP/1.1", b"Content-Type: text/plain\r\nContent-Length: 200000\r\n\r\n")
        )
        sleep(0.3)  # the answer is on its way
        connection.sendall(b"x" * 100000)
        sleep(0.1)
        connection.sendall(b"x" * 100000)
        answer = bytearray()
        while block := connection.recv(1 << 16):  # a reset raises
            answer += block
    assert answer.startswith(b"HTTP/1.1 415 ") and b"Content-Type: send application/json" in answer


def test_a_client_that_goes_on_sending_is_left(served: Served) -> None:
    with socket.create_connection(("127.0.0.1", served.port), 10) as connection, pytest.raises(OSError):
        connection.sendall(
            raw("POST /v1/alerts HTTP/1.1", b"Content-Type: text/plain\r\nContent-Length: 200000\r\n\r\n")
        )
        for _ in range(100):
            sleep(0.1)
            connection.sendall(b"x")


def test_what_is_not_http(served: Served) -> None:
    said = served.send(b"\x16\x03\x01\x02\x00\r\n\r\n")
    assert said.startswith(b"HTTP/1.1 400 ") and b'"type": "invalid_request_error"' in said
    assert served.send(b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n").startswith(b"HTTP/1.1 400 ")


def test_connections_are_bounded(served: Served) -> None:
    many = [socket.create_connection(("127.0.0.1", served.port), 10) for _ in range(25)]
    try:
        assert b"" in [drain(connection) for connection in many[-4:]]
    finally:
        for connection in many:
            connection.close()
    wait_for(lambda: served.http.get("/v1/health/live").status_code == 200)


def test_a_full_line_is_told(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Repetition, "push", lambda self, token: False)  # the first answer must last
    with serving(VideoLLM.load(tiny_bundle, kv_capacity=8192), max_chats=1, max_new_tokens=4096) as busy:
        body = {
            "model": busy.model,
            "messages": [{"role": "user", "content": "Hi"}],
            "max_tokens": 4096,
            "stream": True,
        }
        with busy.http.stream("POST", CHAT, json=body) as first:
            lines = first.iter_lines()
            next(lines)
            refused = busy.ask(text())
            assert error(refused, 429)["code"] == "busy" and int(refused.headers["retry-after"]) >= 1
        wait_for(lambda: busy.ask(text()).status_code == 200)  # who leaves makes room


def crowd(served: Served, count: int, data: Callable[[int], bytes]) -> list[bytes]:
    """The first answers to so many requests that are sent at once, over connections that are open until all came."""
    with ExitStack() as stack:
        many = [stack.enter_context(socket.create_connection(("127.0.0.1", served.port), 30)) for _ in range(count)]
        for number, connection in enumerate(many):
            connection.sendall(data(number))
        return [connection.recv(1 << 12) for connection in many]


def statuses(answers: list[bytes]) -> Counter[bytes]:
    return Counter(answer.split(b" ")[1] for answer in answers)


def test_a_burst_of_readers_of_events(model: VideoLLM) -> None:
    with serving(model, max_event_streams=4) as served:
        for _ in range(2):  # who left makes room again
            wait_for(
                lambda: (
                    statuses(crowd(served, 40, lambda _: raw("GET /v1/events HTTP/1.1", b"\r\n")))
                    == {b"200": 4, b"429": 36}
                )
            )


def test_a_burst_of_cameras(model: VideoLLM) -> None:
    def add(number: int) -> bytes:
        body = f'{{"liveStreamUrl": "rtsp://127.0.0.1:9/{number}"}}'.encode()
        return raw(
            "POST /v1/live-stream HTTP/1.1",
            b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body,
        )

    with serving(model, max_cameras=4, stream_hosts=("127.0.0.0/8",)) as served:
        assert statuses(crowd(served, 40, add)) == {b"201": 4, b"409": 36}
        assert len(served.watcher.cameras) == 4
    with serving(model, stream_hosts=("127.0.0.0/8",)) as served:
        assert statuses(crowd(served, 10, lambda _: add(0))) == {b"201": 1, b"409": 9}  # one is watched once


# The model's thread


class PanicError(BaseException):
    """What pyo3 makes of a panic of a Rust library: no Exception."""


def test_a_panic_fails_its_question_and_no_other(model: VideoLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def panics(*arguments: Any, **options: Any) -> Any:
        raise PanicError("index out of bounds, password=" + KEY)

    told = list[BaseException]()
    with serving(model, told=told.append) as served:
        with monkeypatch.context() as patch:
            patch.setattr(VideoLLM, "stream", panics)
            for more in ({}, {"stream": True}):
                response = served.ask(text(), **more)
                assert error(response, 503)["code"] == "unavailable" and KEY not in response.text
        assert [type(one) for one in told] == [PanicError] * 2
        assert served.ask(text()).status_code == 200  # the thread goes on
        assert served.watcher.status()["failures"] == 2


def test_who_left_while_in_line_is_not_answered(model: VideoLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, go_on = list[str](), threading.Event()
    real = VideoLLM.stream

    def holds(self: VideoLLM, messages: Any, *arguments: Any, **options: Any) -> Any:
        asked.append(messages[-1].text)
        assert go_on.wait(30)
        return real(self, messages, *arguments, **options)

    monkeypatch.setattr(VideoLLM, "stream", holds)
    with serving(model) as served:
        turns = served.watcher._turns
        try:
            first = threading.Thread(target=served.ask, args=(text("first"),))
            first.start()
            wait_for(lambda: asked == ["first"])
            body = json.dumps({"model": served.model, "messages": [{"role": "user", "content": "second"}]}).encode()
            head = b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
            with socket.create_connection(("127.0.0.1", served.port), 10) as second:
                second.sendall(raw(f"POST {CHAT} HTTP/1.1", head) + body)
                wait_for(lambda: turns.waiting == 1)
            wait_for(lambda: turns._line[0].cancelled)
        finally:
            go_on.set()
        first.join(30)
        assert served.ask(text("third")).status_code == 200
    assert asked == ["first", "third"]


def test_a_server_ends_while_the_model_does_not(model: VideoLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on, begun = threading.Event(), threading.Event()

    def holds(*arguments: Any, **options: Any) -> Any:
        begun.set()
        assert go_on.wait(60)
        return iter(())

    monkeypatch.setattr(VideoLLM, "stream", holds)
    answers = list[httpx.Response]()
    with serving(model) as served:  # asserts at its end that the server's thread has ended
        asking = threading.Thread(target=lambda: answers.append(served.ask(text())))
        asking.start()
        assert begun.wait(30)
        served.stop()
        asking.join(20)
        assert error(answers[0], 503)["code"] in ("unavailable", "stopping")
        wait_for(lambda: not served.running())
        go_on.set()


# Who may ask


def test_another_name_is_not_this_server(served: Served) -> None:
    """A page whose name was pointed here (DNS rebinding) shows that name in Host."""
    for host in ("evil.example", "127.0.0.1.evil.example", "localhost.evil.example:80", "127.0.0.1@evil.example", ""):
        assert error(served.http.get("/v1/models", headers={"Host": host}), 421)["code"] == "wrong_host"
    for host in ("localhost", "LOCALHOST:1", "127.0.0.1", "[::1]:8000"):
        assert served.http.get("/v1/models", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:1"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site", "Sec-Fetch-Mode": "no-cors"},
    ],
)
def test_pages_of_others_get_nothing(served: Served, headers: dict[str, str]) -> None:
    for method, path in (("GET", "/v1/models"), ("OPTIONS", CHAT), ("DELETE", "/v1/alerts/x")):
        response = served.http.request(method, path, headers=headers)
        error(response, 403)
        assert not [name for name in response.headers if name.startswith("access-control")]
    assert served.http.get("/v1/models", headers={"Origin": served.url}).status_code == 200


@pytest.mark.parametrize(
    "url",
    [
        "gst://videotestsrc", "exec:reboot", "file:///etc/passwd", "/etc/passwd", "csi://0", "v4l2:///dev/video0", "0",
        "test://", "http://10.0.0.1/x", "rtsp:///x", "rtsp://", "rtsp:10.0.0.1", "rtsp://10.0.0.1:0x50/x",
        "rtsp://10.0.0.1 x", "rtsp://[10.0.0.1/x", "RTSP\n://10.0.0.1/x", "rtsp://10.0.0.1\x00/x", "rtsp://10.0.0.1\\@evil/x",
        "",
    ],
)  # fmt: skip
def test_streams_are_rtsp(served: Served, url: str) -> None:
    found = error(served.http.post("/v1/live-stream", json={"liveStreamUrl": url}), 400)
    assert found["param"] == "liveStreamUrl" and served.watcher.cameras == {}


@pytest.mark.parametrize(
    "url",
    [
        "rtsp://169.254.169.254/x", "rtsp://127.0.0.1/x", "rtsp://10.0.0.1@127.0.0.1/x", "rtsp://a:10.0.0.1@evil.example/x",
        "rtsp://evil.example/10.0.0.1", "rtsp://evil.example?@10.0.0.1/", "rtsp://evil.example#@10.0.0.1/",
    ],
)  # fmt: skip
def test_streams_come_from_allowed_hosts(served: Served, url: str) -> None:
    found = error(served.http.post("/v1/live-stream", json={"liveStreamUrl": url}), 403)
    assert found["code"] == "host_not_allowed" and served.watcher.cameras == {}


# Keys


@pytest.fixture(scope="module")
def locked(tiny_bundle: Path) -> Iterator[Served]:
    llm = VideoLLM.load(tiny_bundle, kv_capacity=1024)
    with serving(llm, host="0.0.0.0", api_key=KEY) as server:
        yield server


@pytest.mark.parametrize(
    "given", [None, KEY, "Bearer", f"Basic {KEY}", f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", "Bearer \xff"]
)
def test_no_way_in_without_the_key(locked: Served, given: str | None) -> None:
    headers = {} if given is None else {"Authorization": given.encode("latin-1")}
    for method, path in (
        ("GET", "/v1/models"),
        ("POST", CHAT),
        ("GET", "/metrics"),
        ("GET", "/v1/events"),
        ("GET", "/openapi.json"),
        ("GET", "/none"),
    ):
        response = locked.http.request(method, path, headers=headers)  # type: ignore[arg-type]
        assert error(response, 401)["code"] == "invalid_api_key" and KEY not in response.text
        assert response.headers["www-authenticate"] == "Bearer"


def test_the_key_lets_in(locked: Served) -> None:
    headers = {"Authorization": f"Bearer {KEY}"}
    assert locked.http.get("/v1/models", headers=headers).status_code == 200
    assert locked.http.get("/openapi.json", headers=headers).status_code == 200
    twice = [("Authorization", f"Bearer {KEY}"), ("Authorization", "Bearer x")]
    error(locked.http.get("/v1/models", headers=twice), 400)


@pytest.mark.parametrize("path", ["/", "/favicon.ico", "/v1/health/live", "/v1/health/ready"])
def test_what_needs_no_key_takes_nothing(locked: Served, path: str) -> None:
    """Not a byte of a body is waited for."""
    for method in ("POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "FOO"):
        more = b"Content-Type: application/json\r\nContent-Length: 30000000\r\n\r\n"
        said = locked.send(raw(f"{method} {path} HTTP/1.1", more))
        assert said.startswith(b"HTTP/1.1 405 ") and b"allow: get, head" in said.lower()
    for length in (b"Content-Length: 1\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\n1\r\nx\r\n"):
        assert locked.send(raw(f"GET {path} HTTP/1.1", length)).startswith(b"HTTP/1.1 413 ")
    head, got = locked.http.head(path), locked.http.get(path)
    assert head.status_code == got.status_code < 300 and head.content == b""


def test_what_needs_no_key_tells_nothing(locked: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    assert locked.http.get("/").status_code == locked.http.get("/v1/health/live").status_code == 200
    assert locked.http.get("/v1/health/ready").json() == {"status": "ready", "reasons": []}
    monkeypatch.setattr(type(locked.watcher), "_unready", lambda self: ["the model fell over"])
    for headers, reasons in (({}, []), ({"Authorization": f"Bearer {KEY}"}, ["the model fell over"])):
        response = locked.http.get("/v1/health/ready", headers=headers)
        assert response.status_code == 503 and response.json()["reasons"] == reasons
        assert ("fell over" in response.text) == bool(reasons)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "camera.local", ""])
def test_no_address_for_others_without_a_key(host: str) -> None:
    with pytest.raises(UsageError, match="api_key"):
        ServeSpec(host=host)
    assert not ServeSpec(host=host, api_key=KEY).shows_frames


def test_every_answer_is_closed_to_other_pages(served: Served) -> None:
    for path in ("/", "/v1/models", "/metrics", "/none"):
        headers = served.http.get(path).headers
        assert headers["x-content-type-options"] == "nosniff" and headers["x-frame-options"] == "DENY"
        assert headers["cross-origin-resource-policy"] == "same-origin" and headers["cache-control"] == "no-store"
        assert "frame-ancestors 'none'" in headers["content-security-policy"] and "server" not in headers


# What is said of what strangers sent


@pytest.mark.parametrize(
    "part",
    [
        {"type": KEY * 500},
        {"type": "text", "text": {"a": KEY}},
        {"type": "text", "text": "x", f"{KEY}:{KEY}": 1},
        {"type": "image_url", "image_url": {"url": "x", "detail": KEY}},
        {"type": "video_url", "video_url": {"url": f"{KEY}:" + "pw-" * 5000}},
        {"type": "stream", "stream": {"stream_id": KEY}},
    ],
)
def test_no_answer_repeats_what_was_sent(served: Served, part: dict[str, Any]) -> None:
    response = served.ask(part, text())
    assert response.status_code in (400, 404) and len(response.content) < 1000
    assert "canary" not in response.text and "pw-" not in response.text


def test_a_path_forges_no_line_of_the_log(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "dycoke_edge.access")
    forged = (
        "/v1/x%0d%0a2026-01-01%20INFO%20dycoke_edge.access:%20GET%20/%1b%5b2J%1b%5d0;owned%07%c2%9b%e2%80%a8%e2%80%ae"
    )
    assert served.http.get(forged).status_code == 404
    assert served.http.get("/v1/" + "pw-pw-" * 2000).status_code == 404
    wait_for(lambda: len(caplog.messages) == 2)
    assert all(line.isprintable() and len(line) < 250 for line in caplog.messages)
    assert caplog.messages[0].startswith(r"GET /v1/x\r\n2026-01-01 INFO")


def test_a_bug_is_logged_line_by_line(
    served: Served, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fall(self: object) -> None:
        raise RuntimeError("fell\n2026-01-01 INFO forged\x1b[2J, password=" + KEY)

    monkeypatch.setattr(type(served.watcher), "status", fall)
    error(served.http.get("/v1/live-stream"), 500)
    said = [record.getMessage() for record in caplog.records if record.name == "dycoke_edge.serve"]
    assert len(said) > 5 and all(line.isprintable() for line in said)
    assert said[0].startswith("Traceback") and KEY not in "".join(said)
