"""Sinks: what they lose and what not, when their receivers are slow, broken, full or away."""

from __future__ import annotations

import base64
import hmac
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from queue import Queue
from typing import Any

import pytest

from dycoke_edge import Camera, CameraWatcher, Event, UsageError
from dycoke_edge.runtime.sinks import webhook
from dycoke_edge.runtime.sinks.bounded import BoundedSink, CallbackSink, Transient
from dycoke_edge.runtime.sinks.handlers import as_sinks
from dycoke_edge.runtime.sinks.jsonl import JsonlSink
from dycoke_edge.runtime.sinks.webhook import WebhookSink, sign, sign_standard, signing_key
from tests.cameras import FakeLLM, by_hand, drive, wait
from tests.commands import ROOT
from tests.talker import SLOW, flood, talking

QUICK = (0.001, 0.002)  # backoff
EVENT = Event("alert", "new", "gate", "0", 1_790_000_000.0, rule_id="person", text="ü")


def event(number: int, **more: Any) -> Event:
    return replace(EVENT, id=f"{number:06}", **more)


class Receiver(BoundedSink):
    """Fails as often as told, then takes."""

    def __init__(self, fails: int = 0, kind: type[Exception] = Transient, **options: Any) -> None:
        super().__init__("receiver", backoff=QUICK, **options)
        self.taken, self.tried, self.finished = list[str](), 0, 0
        self.gate = threading.Event()
        self.gate.set()
        self._fails, self._kind = fails, kind

    def deliver(self, event: Event) -> None:
        assert self.gate.wait(30)
        self.tried += 1
        if self.tried <= self._fails:
            raise self._kind("rtsp://admin:hunter2@cam is away")
        self.taken.append(event.id)

    def finish(self) -> None:
        self.finished += 1


# The queue


def test_events_come_in_order_and_whole() -> None:
    sink = Receiver()
    for i in range(500):
        sink(event(i))
    assert sink.flush(30)
    assert sink.taken == [event(i).id for i in range(500)]
    expected = {"name": "receiver", "queued": 0, "delivered": 500, "dropped": 0, "failures": 0, "error": None}
    assert sink.status() == expected
    sink.close(30)
    assert sink.finished == 1


def test_a_full_queue_drops_the_oldest_and_counts() -> None:
    sink = Receiver(capacity=10)
    sink.gate.clear()
    sink(event(0))
    wait(lambda: sink._busy)
    for i in range(1, 101):
        sink(event(i))
    assert sink.status() | {"queued": 0} == sink.status() | {"queued": 0, "dropped": 90}
    sink.gate.set()
    sink.close(30)
    assert sink.taken == [event(0).id, *(event(i).id for i in range(91, 101))]
    assert (sink.delivered, sink.dropped) == (11, 90)


def test_a_transient_failure_is_tried_again_and_no_event_is_lost() -> None:
    sink = Receiver(fails=5)
    for i in range(3):
        sink(event(i))
    assert sink.flush(30)
    assert sink.taken == [event(i).id for i in range(3)] and sink.failures == 5 and sink.dropped == 0


def test_a_receiver_may_be_away_for_longer_than_numbers_reach() -> None:
    sink = Receiver(fails=1100, attempts=10**9)  # the pause doubles, up to its limit
    sink._backoff = (1e-9, 1e-6)
    sink(event(0))
    assert sink.flush(30) and sink.failures == 1100 and sink.delivered == 1


@pytest.mark.parametrize(("fails", "kind", "lost"), [(4, Transient, 1), (1, ValueError, 1), (8, Transient, 2)])
def test_what_is_given_up_is_counted(fails: int, kind: type[Exception], lost: int) -> None:
    sink = Receiver(fails, kind, attempts=4)
    for i in range(3):
        sink(event(i))
    assert sink.flush(30)
    assert sink.dropped == lost and sink.delivered == 3 - lost and sink.failures == fails


def test_an_error_is_shown_without_credentials() -> None:
    sink = Receiver(1, ValueError)
    sink(event(0))
    assert sink.flush(30)
    assert "ValueError" in str(sink.status()["error"]) and "hunter2" not in str(sink.status())
    sink(event(1))
    assert sink.flush(30) and sink.status()["error"] is None


def test_close_tries_all_once_more_and_counts_the_rest() -> None:
    sink = Receiver(fails=10**9, attempts=10**9)
    for i in range(5):
        sink(event(i))
    sink.close(30)
    sink(event(6))
    assert sink.taken == [] and sink.dropped == 6 and sink.finished == 1
    sink.close(30)


def test_close_does_not_wait_for_a_receiver_that_hangs() -> None:
    sink = Receiver()
    sink.gate.clear()
    for i in range(5):
        sink(event(i))
    sink.close(0.01)
    assert sink.taken == [] and sink.dropped >= 4
    sink.gate.set()


def test_close_of_a_sink_that_was_never_used() -> None:
    sink = Receiver()
    sink.close()
    assert sink.finished == 1


def test_a_plain_function_has_a_thread_of_its_own_and_may_fail() -> None:
    threads, seen = set[int](), list[str]()

    def handler(one: Event) -> None:
        threads.add(threading.get_ident())
        seen.append(one.id)
        if one.id == event(1).id:
            raise RuntimeError("mine")

    sink = CallbackSink(handler)
    for i in range(3):
        sink(event(i))
    sink.close(30)
    assert len(seen) == 3 and threading.get_ident() not in threads
    assert sink.failures == 1 and sink.name == "handler"


# Files


def lines(path: Path) -> list[str]:
    return [json.loads(line)["id"] for line in path.read_text(encoding="utf-8").splitlines()]


def test_jsonl_appends(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    for part in range(2):
        sink = JsonlSink(path)
        for i in range(3):
            sink(event(part * 3 + i))
        sink.close(30)
    assert lines(path) == [event(i).id for i in range(6)]
    assert json.loads(path.read_text(encoding="utf-8").splitlines()[0]) == event(0).to_dict()


def test_jsonl_rotates_and_keeps_so_many(tmp_path: Path) -> None:
    path, size = tmp_path / "events.jsonl", len(event(0).to_json().encode()) + 1
    sink = JsonlSink(path, max_bytes=size * 3 + 1, keep=2, fsync=True)
    for i in range(13):
        sink(event(i))
    sink.close(30)
    found = {entry.name: lines(entry) for entry in tmp_path.iterdir()}
    ids = [event(i).id for i in range(13)]
    assert found == {"events.jsonl": ids[12:], "events.jsonl.1": ids[9:12], "events.jsonl.2": ids[6:9]}


def test_jsonl_outlives_whoever_moves_its_file(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    sink = JsonlSink(path)
    for i in range(4):
        sink(event(i))
        assert sink.flush(30)
        path.rename(tmp_path / f"moved{i}")
    sink.close(30)
    assert [lines(tmp_path / f"moved{i}") for i in range(4)] == [[event(i).id] for i in range(4)]


FULL = """
import resource, sys
from pathlib import Path
from dycoke_edge.runtime.sinks.handlers import as_sinks
from dycoke_edge.runtime.sinks.jsonl import JsonlSink
from tests.cameras import FakeLLM, by_hand, drive, wait
from tests.test_sinks import event

path, size = Path(sys.argv[1]), len(event(0).to_json().encode()) + 1
sink = JsonlSink(path, backoff=(0.001, 0.002), capacity=50)
resource.setrlimit(resource.RLIMIT_FSIZE, (size * 5 + size // 2, resource.RLIM_INFINITY))  # as a full disk: no room
for i in range(20):
    sink(event(i))
wait(lambda: sink.failures >= 3)
whole = path.read_bytes()
assert whole.endswith(b"\\n") and whole.count(b"\\n") == 5, whole
assert "File too large" in sink.status()["error"], sink.status()
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
assert sink.flush(30)
sink.close(30)
print(sink.delivered, sink.dropped)
"""


def test_a_full_disk_costs_no_line_while_there_is_room_in_the_queue(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    command = [sys.executable, "-c", FULL, str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["20", "0"] and lines(path) == [event(i).id for i in range(20)]


@pytest.mark.parametrize(
    ("path", "options", "says"),
    [("no/such/folder/x.jsonl", {}, "No such file"), ("", {}, "s a directory"), ("x", {"keep": 0}, "keep=0")],
)
def test_a_file_that_cannot_be_written(tmp_path: Path, path: str, options: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        JsonlSink(tmp_path / path, **options)


# Webhooks


class Hook:
    """A web server that answers with the given status codes in turn, the last of them for ever."""

    def __init__(self, *codes: int, headers: dict[str, str] | None = None) -> None:
        self.codes, self.headers = list(codes), headers or {}
        self.requests = list[tuple[dict[str, str], bytes]]()
        hook = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                headers = {k.lower(): v for k, v in self.headers.items()} | {"client": str(self.client_address[1])}
                hook.requests.append((headers, body))
                code = hook.codes.pop(0) if len(hook.codes) > 1 else hook.codes[0]
                self.send_response(code)
                for name, value in {**hook.headers, "Content-Length": "0"}.items():
                    self.send_header(name, value)
                self.end_headers()

            def log_message(self, *arguments: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/hook?token=canary"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def hooked() -> Iterator[Callable[..., Hook]]:
    made = list[Hook]()

    def make(*codes: int, **options: Any) -> Hook:
        made.append(Hook(*codes, **options))
        return made[-1]

    yield make
    for hook in made:
        hook.close()


def test_a_webhook_is_a_signed_cloud_event(hooked: Callable[..., Hook]) -> None:
    hook = hooked(204)
    sink = WebhookSink(hook.url, secret="s3cret", utc=lambda: 1_790_000_005.9)
    sink(event(7))
    sink.close(30)
    ((headers, body),) = hook.requests
    assert json.loads(body) == event(7).to_dict()
    expected = {
        "content-type": "application/json",
        "idempotency-key": "000007",
        "ce-specversion": "1.0",
        "ce-id": "000007",
        "ce-source": "/dycoke/gate",
        "ce-type": "dycoke.alert.new",
        "ce-time": "2026-09-21T14:13:20.000Z",
        "x-dycoke-timestamp": "1790000005",
        "x-dycoke-signature": sign("s3cret", "1790000005", body),
    }
    assert expected.items() <= headers.items()
    assert headers["x-dycoke-signature"] != sign("other", "1790000005", body)
    assert sink.delivered == 1


def test_a_signature_is_what_openssl_computes() -> None:
    # printf '1.{}' | openssl dgst -sha256 -hmac key
    assert sign("key", "1", b"{}") == "sha256=1ba6b8171186efc613e8bcc0cbdab2748f24984d7c5a84faa2637afa0e40d224"


@pytest.mark.parametrize(
    ("secret", "key"),
    [
        ("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", base64.b64decode("MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")),
        ("s3cret \u00fc", "s3cret \u00fc".encode()),
    ],
)
def test_a_webhook_carries_the_signature_of_standard_webhooks(
    hooked: Callable[..., Hook], secret: str, key: bytes
) -> None:
    hook, now = hooked(500, 204), iter((1_790_000_005.9, 1_790_000_009.1))
    sink = WebhookSink(hook.url, secret=secret, utc=lambda: next(now), backoff=QUICK)
    sink(event(7))
    sink.close(30) if sink.flush(30) else pytest.fail("not delivered")
    for (headers, body), stamp in zip(hook.requests, ("1790000005", "1790000009"), strict=True):
        digest = hmac.digest(key, b"000007." + stamp.encode() + b"." + body, "sha256")
        assert headers["webhook-id"] == "000007" and headers["webhook-timestamp"] == stamp
        assert headers["webhook-signature"] == "v1," + base64.b64encode(digest).decode()


def test_a_standard_signature_is_that_of_their_own_library() -> None:
    # standardwebhooks 1.1.0: Webhook("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw").sign("msg_p5jXN8AQM9LWM0D4loKWxJek",
    # datetime.fromtimestamp(1614265330, timezone.utc), '{"test": 2432232314}')
    key = signing_key("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
    found = sign_standard(key, "msg_p5jXN8AQM9LWM0D4loKWxJek", "1614265330", b'{"test": 2432232314}')
    assert found == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


@pytest.mark.parametrize("secret", ["whsec_", "whsec_not base64", "whsec_abc"])
def test_a_secret_that_is_no_base64(secret: str) -> None:
    with pytest.raises(UsageError, match="a secret that begins with whsec_ goes on in base64, e") as raised:
        WebhookSink("https://host/hook", secret=secret)
    assert secret == "whsec_" or secret not in str(raised.value)


def test_nothing_is_signed_without_a_secret(hooked: Callable[..., Hook]) -> None:
    hook = hooked(204)
    sink = WebhookSink(hook.url)
    sink(event(7))
    sink.close(30)
    ((headers, _),) = hook.requests
    assert not [name for name in headers if "signature" in name]


@pytest.mark.parametrize("codes", [(500, 503, 200), (429, 200), (502, 504, 599, 201)])
def test_5xx_and_429_are_tried_again_with_the_same_key(hooked: Callable[..., Hook], codes: tuple[int, ...]) -> None:
    hook = hooked(*codes)
    sink = WebhookSink(hook.url, backoff=QUICK)
    sink(event(1))
    sink(event(2))
    sink.close(30) if sink.flush(30) else pytest.fail("not delivered")
    keys = [headers["idempotency-key"] for headers, _ in hook.requests]
    assert keys == ["000001"] * len(codes) + ["000002"]
    assert (sink.delivered, sink.dropped, sink.failures) == (2, 0, len(codes) - 1)


@pytest.mark.parametrize("code", [400, 401, 404, 410, 301, 307])
def test_any_other_status_loses_the_event_at_once(hooked: Callable[..., Hook], code: int) -> None:
    hook = hooked(code, headers={"Location": "http://127.0.0.1:9/elsewhere"})
    sink = WebhookSink(hook.url, backoff=QUICK)
    sink(event(1))
    assert sink.flush(30)
    assert len(hook.requests) == 1 and (sink.delivered, sink.dropped) == (0, 1)
    assert f"HTTP {code}" in str(sink.error)
    sink.close(30)


def test_a_webhook_that_says_500_for_an_hour_loses_only_what_the_queue_cannot_hold(hooked: Callable[..., Hook]) -> None:
    hook = hooked(500)
    sink = WebhookSink(hook.url, backoff=QUICK, capacity=10, attempts=10**9)
    sink(event(0))
    wait(lambda: hook.requests)
    for i in range(1, 40):
        sink(event(i))
    wait(lambda: len(hook.requests) >= 30)
    assert sink.delivered == 0 and sink.status()["queued"] == 11
    hook.codes = [200]
    assert sink.flush(30)
    assert sink.delivered == 11 and sink.dropped == 29
    assert {headers["idempotency-key"] for headers, _ in hook.requests[-10:]} == {event(i).id for i in range(30, 40)}
    sink.close(30)


def test_retry_after_is_followed_within_bounds(hooked: Callable[..., Hook], monkeypatch: pytest.MonkeyPatch) -> None:
    pauses = list[float | None]()
    monkeypatch.setattr(BoundedSink, "_pause", lambda self, attempt, after: pauses.append(after))
    for header in ("7", "Wed, 21 Oct 2026 07:28:00 GMT", "-3", ""):
        hook = hooked(429, 200, headers={"Retry-After": header})
        sink = WebhookSink(hook.url)
        sink(event(1))
        assert sink.flush(30)
        sink.close(30)
    assert pauses == [7.0, None, None, None]


def test_a_connection_is_used_again(hooked: Callable[..., Hook]) -> None:
    hook = hooked(200)
    sink = WebhookSink(hook.url)
    for number in range(3):
        sink(event(number))
    assert sink.flush(30)
    sink.close(30)
    assert sink.delivered == 3 and len({headers["client"] for headers, _ in hook.requests}) == 1


@pytest.mark.parametrize("kind", SLOW)
def test_an_answer_that_drips_is_a_failure(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webhook, "TIMEOUT_S", 0.3)
    with talking(SLOW[kind]) as receiver:
        sink = WebhookSink(f"http://127.0.0.1:{receiver.port}/hook", attempts=2, backoff=QUICK)
        sink(event(1))
        assert sink.flush(60)
        assert (sink.delivered, sink.dropped, sink.failures) == (0, 1, 2) and receiver.gone.wait(20)
        sink.close(30)


@pytest.mark.parametrize(("status", "counts"), [(200, (1, 0)), (404, (0, 1))])
@pytest.mark.parametrize("more", ["", "Transfer-Encoding: chunked\r\n", "Content-Encoding: gzip\r\n"])
def test_an_endless_answer_is_cut(status: int, counts: tuple[int, int], more: str) -> None:
    block = b"10000\r\n" + b"x" * 0x10000 + b"\r\n" if "chunked" in more else b"x" * 0x10000
    with talking(flood(f"HTTP/1.1 {status} OK\r\n{more}\r\n".encode(), block)) as receiver:
        sink = WebhookSink(f"http://127.0.0.1:{receiver.port}/hook", attempts=1)
        sink(event(1))
        assert sink.flush(60)
        assert (sink.delivered, sink.dropped) == counts and receiver.gone.wait(20)
        assert receiver.sent < 16_000_000  # what the system's buffers hold
        sink.close(30)


def test_no_receiver_is_transient_and_its_url_stays_secret() -> None:
    sink = WebhookSink("http://user:hunter2@127.0.0.1:9/hook?token=canary", attempts=3, backoff=QUICK)
    sink(event(1))
    assert sink.flush(30)
    assert sink.failures == 3 and sink.dropped == 1
    shown = str(sink.status())
    assert "no answer" in shown and "hunter2" not in shown and "canary" not in shown
    sink.close(30)


@pytest.mark.parametrize("url", ["", "ftp://host/x", "host/x", "http://", "file:///etc/passwd"])
def test_a_url_that_is_none(url: str) -> None:
    with pytest.raises(UsageError, match="url of a webhook must be"):
        WebhookSink(url)


# What on_event takes


@pytest.mark.parametrize("kind", [str, Path], ids=["str", "PathLike"])
@pytest.mark.parametrize("many", [True, False], ids=["list", "alone"])
def test_a_path_is_a_file_of_json_lines(tmp_path: Path, kind: Callable[[Path], Any], many: bool) -> None:
    path, taken = tmp_path / "events.jsonl", list[Event]()
    llm = FakeLLM()
    on_event = [kind(path), taken.append] if many else kind(path)
    with by_hand(llm, Camera("gate", "rtsp://x", prompt="What?"), on_event=on_event) as (made, readers):
        readers["gate"].fps = 1
        drive(made, llm.clock, 20)
        sinks = made.status()["sinks"]
    lines = [json.loads(line)["id"] for line in path.read_text().splitlines()]
    assert lines == [event.id for event in made.events.since()] and len(lines) > 4
    assert len(sinks) == 1 + many and (not many or [event.id for event in taken] == lines)


class Lister:
    """A sink as an application may write one."""

    def __call__(self, event: Event) -> None: ...

    def close(self, timeout: float) -> None: ...


async def later(event: Event) -> None: ...


@pytest.mark.parametrize(
    ("handler", "why"),
    [
        (None, "NoneType cannot be called"),
        (7, "int cannot be called"),
        (b"events.jsonl", "bytes cannot be called"),
        ({"path": "events.jsonl"}, "dict cannot be called"),
        (BytesIO(), "BytesIO cannot be called"),
        (Lister, "Lister is a class; make one of it, Lister(...)"),
        (later, "later is async"),
        (lambda: None, "does not take one argument"),
        (lambda event, more: None, "does not take one argument"),
    ],
    ids=["none", "number", "bytes", "dict", "file", "class", "async", "none of them", "two of them"],
)
@pytest.mark.parametrize("many", [True, False], ids=["list", "alone"])
def test_what_takes_no_event_is_refused_at_once(tmp_path: Path, handler: Any, why: str, many: bool) -> None:
    path = tmp_path / "events.jsonl"
    with pytest.raises(UsageError) as caught:
        CameraWatcher(FakeLLM().real, on_event=[path, print, handler] if many else handler)
    line = str(caught.value)
    assert line.startswith("on_event: ") and why in line and ".jsonl" in line and "\n" not in line
    assert not path.exists()


def test_what_takes_an_event_is_taken() -> None:
    handlers = [print, [].append, Lister(), lambda event, more=1: None, partial(max, 1), Queue().put]
    assert [type(sink).__name__ for sink in as_sinks(handlers)] == [  # type: ignore[arg-type]
        *("CallbackSink", "CallbackSink", "Lister", "CallbackSink", "CallbackSink", "CallbackSink")
    ]
    assert as_sinks(()) == [] and len(as_sinks(print)) == 1
