"""The HTTP surface, fuzzed from its own OpenAPI and as bytes: whatever comes, it is answered, and never with a 500."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from dycoke_edge import VideoLLM
from dycoke_edge.config_camera import Camera, Rule
from tests.serving import CHAT, Served, serving, text, wait_for

PACE: dict[str, Any] = {"fps": 5.0, "window_s": 1.0, "every_s": 0.5, "realtime": True}
YARD = Camera("yard", "test://?fps=10", prompt="What?", max_new_tokens=2, **PACE)
NAMES = ["yard", "any", "none"]


def described(served: Served) -> dict[str, Any]:
    """The OpenAPI, with names that exist where a random one would only be not found."""
    api: dict[str, Any] = served.http.get("/openapi.json").json()
    parts = api["components"]["schemas"]
    parts["ChatRequest"]["properties"]["model"]["enum"] = [served.model]
    parts["StreamRef"]["properties"]["stream_id"]["enum"] = NAMES
    parts["NewStream"]["properties"]["liveStreamUrl"]["enum"] = [
        "rtsp://127.0.0.1:9/a",
        "rtsp://127.0.0.1:9/b",
        "gst://x",
    ]
    for path in api["paths"].values():
        for operation in path.values():
            for parameter in operation.get("parameters", []):
                if parameter["in"] == "path":
                    parameter["schema"]["enum"] = [served.model] if parameter["name"] == "model_id" else NAMES
    del api["paths"]["/v1/events"]  # it has no end, which the tool waits for; tests/test_serve_cameras.py has it
    return api


@pytest.mark.slow
def test_no_request_is_too_strange(tiny_bundle: Path, tmp_path: Path) -> None:
    llm = VideoLLM.load(tiny_bundle, kv_capacity=2048, prefill_chunk=64)
    limits: dict[str, Any] = {"max_new_tokens": 2, "max_cameras": 4, "max_rules": 8}
    with serving(llm, [YARD], [Rule("any", "Is it?")], stream_hosts=("127.0.0.0/8",), **limits) as served:
        api = described(served)
        (tmp_path / "api.json").write_text(json.dumps(api))
        command = [sys.executable, "-c", "from schemathesis.cli import schemathesis; schemathesis()", "run"]
        command += ["api.json", f"--url={served.url}", "--checks=not_a_server_error", "--mode=all", "--seed=4"]
        command += ["--phases=coverage,fuzzing", "--max-examples=12", "--request-timeout=10", "--no-color"]
        command += ["--suppress-health-check=all"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
        print(done.stdout)  # which case failed, with the request that repeats it
        assert served.http.get("/v1/health/ready").status_code == 200
        answered = served.watcher.status()["questions"]["answered"]
    assert done.returncode == 0, done.stderr
    cases = re.search(r"(\d+) generated, (\d+) passed", done.stdout)
    assert cases is not None and int(cases[1]) == int(cases[2]) > 20 * len(api["paths"])
    assert answered > 0  # some of them were real questions


# As bytes

CASES = 400
PIECES = [
    b"\r\n",
    b"\n",
    b"\r",
    b"\0",
    b" ",
    b"\t",
    b":",
    b"\x1b[2J",
    b"\xff\xfe",
    b"\xc3\x28",
    b"%",
    b"%00",
    b"%0d%0a",
    b"//",
    b"../",
    b"HTTP/1.1",
    b"HTTP/2.0",
    b"HTTP/0.9",
    b"Content-Length: 5\r\n",
    b"Content-Length: -1\r\n",
    b"content-length: 1e3\r\n",
    b"Content-Length: 99999999999999999999999\r\n",
    b"Transfer-Encoding: chunked\r\n",
    b"Transfer-Encoding: gzip, chunked\r\n",
    b"Transfer-Encoding:\x0bchunked\r\n",
    b"Host: evil.example\r\n",
    b"Host: [::1\r\n",
    b"Origin: http://[\r\n",
    b"Expect: 100-continue\r\n",
    b"Connection: close, keep-alive\r\n",
    b"Upgrade: websocket\r\nConnection: upgrade\r\n",
    b"Content-Type: application/json; charset=x\r\n",
    b"Range: bytes=0-\r\n",
    b"Authorization: Bearer \xff\r\n",
    b"Last-Event-ID: \xff\r\n",
    b" folded: yes\r\n",
    b"X: " + b"y" * 20_000 + b"\r\n",
    b"a: b\r\n" * 300,
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01",
    b"0\r\n\r\n",
    b"fffffffffffffffff\r\n",
    b"-1\r\n",
    b"5;x=y\r\n",
]


def requests(model: str) -> list[bytes]:
    """Good ones, of every shape."""
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}).encode()
    head = b"Host: 127.0.0.1\r\n"
    typed = head + b"Content-Type: application/json\r\n"
    sized = typed + b"Content-Length: %d\r\n\r\n" % len(body) + body
    chunked = typed + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
    path = CHAT.encode()
    return [
        *(b"GET %s HTTP/1.1\r\n%s\r\n" % (at, head) for at in (b"/", b"/v1/models", b"/metrics", b"/v1/alerts/x?y=z")),
        b"GET http://127.0.0.1/v1/health/live HTTP/1.1\r\n" + head + b"\r\n",
        b"OPTIONS * HTTP/1.1\r\n" + head + b"\r\n",
        b"CONNECT 127.0.0.1:9 HTTP/1.1\r\n" + head + b"\r\n",
        b"HEAD / HTTP/1.0\r\n\r\n",
        b"DELETE /v1/live-stream/yard%2f.. HTTP/1.1\r\n" + head + b"\r\n",
        b"POST %s HTTP/1.1\r\n%s" % (path, sized),
        b"POST %s HTTP/1.1\r\n%s" % (path, chunked),
        b"PUT /v1/alerts/x HTTP/1.1\r\n" + sized,
        b"GET /v1/version HTTP/1.1\r\n" + head + b"\r\nPOST " + path + b" HTTP/1.1\r\n" + chunked,
    ]


def mutated(good: list[bytes], dice: random.Random) -> bytes:
    """One to four changes to a good request."""
    data = bytearray(dice.choice(good))
    for _ in range(dice.randint(1, 4)):
        at, length = dice.randrange(len(data) + 1), dice.randint(1, 40)
        match dice.randrange(7):
            case 0:
                data[at : at + 1] = bytes([dice.randrange(256)])
            case 1:
                data[at:at] = dice.choice(PIECES)
            case 2:
                del data[at : at + length]
            case 3:
                data[at:at] = data[at : at + length] * dice.randint(1, 20)
            case 4:
                del data[at:]
            case 5:
                data += dice.choice(good)
            case 6:
                lines = bytes(data).split(b"\r\n")
                lines.insert(dice.randrange(1, len(lines) + 1), dice.choice(PIECES).rstrip(b"\r\n"))
                data = bytearray(b"\r\n".join(lines))
    return bytes(data)


def answers(said: bytes) -> list[int]:
    """The statuses of what a server sent, or a failure if it is no HTTP."""
    assert not said or re.match(rb"HTTP/1\.1 \d{3} ", said), said[:200]
    return [int(status) for status in re.findall(rb"(?:^|[}\n])HTTP/1\.1 (\d{3}) ", said)]


@pytest.mark.slow
def test_no_bytes_are_too_strange(tiny_bundle: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    llm = VideoLLM.load(tiny_bundle, kv_capacity=1024, prefill_chunk=64)
    times: dict[str, Any] = {"header_timeout_s": 0.3, "body_timeout_s": 0.3, "send_timeout_s": 2}
    dice, seen = random.Random(12), Counter[int]()
    with serving(llm, [YARD], **times) as served:
        good = requests(served.model)
        cases = [*good, *(mutated(good, dice) for _ in range(CASES))]
        with ThreadPoolExecutor(48) as pool:
            for case, said in zip(cases, pool.map(served.send, cases), strict=True):
                found = answers(said)
                assert all(status < 500 or status in (501, 503) for status in found), (case, said)
                seen.update(found)
        assert served.http.get("/v1/health/ready").status_code == 200
        wait_for(lambda: served.ask(text()).status_code == 200)
    assert seen[200] > 20 and seen[400] > 100 and len(seen) > 6, seen
    assert not [record for record in caplog.records if record.levelname == "ERROR"]
    assert all(record.getMessage().isprintable() for record in caplog.records)
