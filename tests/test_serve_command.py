"""`dycoke-edge serve`: cameras.yaml, what is wrong with it in one line, and a process that starts and ends as told."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from dycoke_edge.cli_serve import load
from dycoke_edge.runtime.serve.config import read_config
from tests.commands import ROOT, here
from tests.serving import CHAT, wait_for

Capture = pytest.CaptureFixture[str]
CANARY = "c4n4ry-S3CRET"
CAMERA = "cameras: {yard: {source: 'test://?fps=5'}}\n"
WHOLE = """
fps: 2
window_s: 4
prompt: What happens?
cameras:
  front_door:
    source: rtsp://{DYCOKE_USER}:{DYCOKE_PASSWORD}@10.0.0.5/sub
    fps: 0.5
    rules:
      parcel: {prompt: "Is a parcel there?", threshold: 0.3}
  yard: {source: "test://", prompt: null, every_s: 2}
rules:
  person: {prompt: "Is a person in view?", cameras: [yard], severity: warning}
sinks:
  jsonl: {path: events.jsonl}
  webhook: {url: "https://host/hook", secret: "{DYCOKE_PASSWORD}"}
  mqtt: {host: broker, username: u, password: "{DYCOKE_PASSWORD}", discovery: homeassistant}
server: {port: 9000, api_key: "{DYCOKE_API_KEY}", host: 0.0.0.0, stream_hosts: [10.0.0.0/24]}
engine: {kv_capacity: 4096}
compression: {merge_ratio: 0.5}
live: {gate_threshold: 2}
reading: {read_timeout: 3}
"""


@pytest.fixture
def secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DYCOKE_USER", "watcher")
    monkeypatch.setenv("DYCOKE_PASSWORD", CANARY)
    monkeypatch.setenv("DYCOKE_API_KEY", CANARY * 2)


@pytest.fixture
def written(tmp_path: Path) -> Path:
    path = tmp_path / "cameras.yaml"
    path.write_text(WHOLE)
    return path


def test_a_whole_configuration(secrets: None, written: Path) -> None:
    config = read_config(load(written), port=9001)
    door, yard = config.cameras
    assert door.uri == f"rtsp://watcher:{CANARY}@10.0.0.5/sub"
    assert (door.fps, door.window_s, door.every_s, door.prompt) == (0.5, 4, 4, "What happens?")
    assert (yard.fps, yard.every_s, yard.prompt) == (2, 2, None)
    (parcel,), (person,) = door.rules, config.rules
    assert (parcel.threshold, parcel.clear_threshold) == (0.3, 0.3) and person.cameras == ("yard",)
    assert config.sinks.webhook is not None and config.sinks.webhook.secret == CANARY
    assert config.server.port == 9001 and config.server.stream_hosts == ("10.0.0.0/24",)
    assert not config.server.shows_frames and config.engine.kv_capacity == 4096
    assert (
        config.compression.merge_ratio == 0.5 and config.live.gate_threshold == 2 and config.reading.read_timeout == 3
    )
    assert CANARY not in repr(config)


def test_values_of_the_environment_are_only_text(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DYCOKE_X", "a\nrules: {x: {prompt: '{DYCOKE_USER}'}}")
    path = tmp_path / "cameras.yaml"
    path.write_text("prompt: 'x {DYCOKE_X}'\n" + CAMERA)
    assert read_config(load(path)).cameras[0].prompt == "x a\nrules: {x: {prompt: '{DYCOKE_USER}'}}"


def test_check_starts_nothing(capsys: Capture, secrets: None, written: Path, tiny_bundle: Path) -> None:
    outcome = here(capsys, "serve", tiny_bundle, "--config", written, "--check")
    assert outcome.code == 0 and outcome.err == "" and CANARY not in outcome.out
    assert json.loads(outcome.out) == {"config": str(written), "cameras": 2, "rules": 2, "ok": True}
    assert not (ROOT / "events.jsonl").exists()


def test_the_schema_names_every_key(capsys: Capture) -> None:
    schema = json.loads(here(capsys, "serve", "--schema").out)
    assert {"cameras", "rules", "sinks", "server", "fps", "window_s", "prompt"} <= set(schema["properties"])
    server = schema["$defs"]["Server"]
    assert server["additionalProperties"] is False and server["properties"]["port"]["maximum"] == 65535
    assert all(field.get("description") for field in server["properties"].values())


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is not a mapping"),
        ("- a", "is not a mapping"),
        ("cameras: [", "line 1: "),
        ("a: 1\na: 2", "line 1: 'a' comes twice"),
        ("cameras: !!python/object/apply:os.system [reboot]", "line 1: "),
        ("camera: {}", "camera: unknown key; did you mean cameras?"),
        ("zzz: {}", "zzz: unknown key; use one of "),
        ("cameras: {yard: {}}", "cameras.yard.source is missing"),
        ("cameras: {yard: {source: 'test://', fsp: 2}}", "cameras.yard.fsp: unknown key; did you mean fps?"),
        ("cameras: {yard: {source: 'test://', fps: fast}}", "cameras.yard.fps: "),
        ("cameras: {yard: {source: 'test://', fps: 0}}", "cameras.yard.fps: "),
        ("cameras: {yard: {source: 'test://', fps: .inf}}", "cameras.yard.fps: "),
        ("cameras: {yard: {source: 'test://', fps: .nan}}", "cameras.yard"),
        ("cameras: {yard: {source: 'exec://reboot'}}", "cameras.yard.source: "),
        ("cameras: {yard: {source: 'ftp://x/y'}}", "cameras.yard.source: "),
        ("cameras: {'a b': {source: 'test://'}}", "cameras.a b: camera id 'a b'"),
        ("cameras: {'../x': {source: 'test://'}}", "cameras.../x: camera id '../x'"),
        ("cameras: {yard: {source: 'test://', prompt: ' '}}", "cameras.yard: prompt of camera yard is empty"),
        ("cameras: {yard: {source: 'test://', rules: {p: {}}}}", "cameras.yard.rules.p.prompt is missing"),
        ("cameras: {yard: {source: 'test://', rules: {p: {prompt: x, cameras: []}}}}", "rules.p.cameras: unknown"),
        ("cameras: {yard: {source: 'test://', rules: {p: {prompt: x, threshold: 2}}}}", "rules.p.threshold: "),
        ("rules: {p: {prompt: x, clear_threshold: 0.9}}", "rules.p: clear_threshold=0.9"),
        ("rules: {p: {prompt: x, severity: awful}}", "rules.p: severity='awful'"),
        ("rules: {p: {prompt: x, cameras: [attic]}}", "rules.p.cameras: there is no camera attic"),
        (CAMERA.replace("5'", "5', rules: {p: {prompt: x}}") + "rules: {p: {prompt: x}}", "yard.rules.p: this id"),
        ("sinks: {kafka: {}}", "sinks.kafka: unknown key; use one of jsonl, mqtt, webhook"),
        ("sinks: {jsonl: {}}", "sinks.jsonl.path is missing"),
        ("sinks: {mqtt: {host: h, qos: 7}}", "sinks.mqtt.qos: "),
        ("sinks: {webhook: {url: 'http://h', verify: no}}", "verify: unknown key; did you mean verify_tls?"),
        ("sinks: {webhook: {url: h}}", "[^/]', e.g. url: https://host/hook"),
        ("server: {port: 70000}", "server.port: "),
        ("server: {prot: 70}", "server.prot: unknown key; did you mean port?"),
        ("server: {host: 0.0.0.0}", "server: host=0.0.0.0 (--host) can be reached from outside and no api_key is set"),
        ("server: {api_key: short}", "server: api_key must be 16 or more"),
        ("server: {max_cameras: 1}\ncameras: {a: {source: 'test://'}, b: {source: 'test://'}}", "cameras: 2 of them"),
        ("engine: {provider: cuda9}", "engine.provider: "),
        ("compression: {merge_ratio: 7}", "compression.merge_ratio: "),
        ("cameras: {yard: {source: 'rtsp://u:{DYCOKE_NONE}@h/'}}", "cameras.yard.source: {DYCOKE_NONE} is used"),
    ],
)  # fmt: skip
def test_one_line_for_what_is_wrong(capsys: Capture, tmp_path: Path, tiny_bundle: Path, text: str, said: str) -> None:
    path = tmp_path / "cameras.yaml"
    path.write_text(text)
    outcome = here(capsys, "serve", tiny_bundle, "--config", path, "--check")
    assert outcome.code == 2 and outcome.complaint.startswith(f"{path}: ")
    assert said in outcome.complaint


@pytest.mark.parametrize(
    "key",
    ["server: {api_key: 'SECRET xx'}", "cameras: {a: {source: {x: SECRET}}}", "sinks: {webhook: {url: 'SECRET'}}"],
)
def test_errors_hold_no_values(capsys: Capture, tmp_path: Path, tiny_bundle: Path, key: str) -> None:
    path = tmp_path / "cameras.yaml"
    path.write_text(key.replace("SECRET", CANARY))
    outcome = here(capsys, "serve", tiny_bundle, "--config", path, "--port", "0")
    assert outcome.code == 2 and CANARY not in outcome.err and outcome.complaint


def test_what_serve_needs(capsys: Capture, tmp_path: Path, tiny_bundle: Path, written: Path) -> None:
    assert "--config cameras.yaml" in here(capsys, "serve", tiny_bundle).complaint
    assert "cannot be read" in here(capsys, "serve", tiny_bundle, "--config", tmp_path / "none.yaml").complaint
    (tmp_path / "a.yaml").write_text(CAMERA)
    assert here(capsys, "serve", tmp_path, "--config", tmp_path / "a.yaml", "--check").code == 4
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        outcome = here(capsys, "serve", tiny_bundle, "--config", tmp_path / "a.yaml", "--port", port)
    assert outcome.code == 2 and f"127.0.0.1:{port} (--host, --port)" in outcome.complaint


# A process


@contextmanager
def process(
    bundle: Path, config: str, folder: Path, **environment: str
) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A server in a process of its own: its URL and the process. Output lands in folder/out and folder/err."""
    path = folder / "cameras.yaml"
    path.write_text(config)
    command = [sys.executable, "-m", "dycoke_edge", "serve", str(bundle), "--config", str(path), "--port", "0"]
    with (folder / "out").open("wb") as out, (folder / "err").open("wb") as err:
        running = subprocess.Popen(
            command, cwd=ROOT, stdout=out, stderr=err, env={"PATH": "/usr/bin:/bin", **environment}
        )
    try:
        said = wait_for(
            lambda: re.findall(r" on (http://\S+)", (folder / "err").read_text()) or running.poll() is not None, 60
        )
        assert isinstance(said, list), (folder / "err").read_text()
        url = said[0]
        wait_for(lambda: _ready(url))
        yield url, running
    finally:
        running.kill()
        running.wait()


def _ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/v1/health/ready", trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_cleanly(tiny_bundle: Path, tmp_path: Path, number: signal.Signals) -> None:
    """In the middle of an answer, of events and of an alert: the alert's end is written, and nothing hangs."""
    config = f"""
fps: 5
window_s: 1
every_s: 0.5
cameras: {{yard: {{source: "test://?fps=10&motion=3", realtime: true}}}}
rules: {{always: {{prompt: "Is it?", threshold: 0, clear_threshold: 0, consecutive: 1}}}}
sinks: {{jsonl: {{path: {tmp_path}/events.jsonl}}}}
server: {{max_new_tokens: 8000}}
"""
    body = {
        "model": tiny_bundle.name,
        "messages": [{"role": "user", "content": "Hi"}],
        "max_tokens": 7000,
        "stream": True,
    }
    with process(tiny_bundle, config, tmp_path) as (url, running), httpx.Client(base_url=url, trust_env=False) as http:
        wait_for(lambda: http.get("/v1/alerts/recent").json())
        with http.stream("POST", CHAT, json=body) as answer, http.stream("GET", "/v1/events") as events:
            lines = answer.iter_lines()
            next(lines)
            following = events.iter_lines()
            next(following)
            running.send_signal(number)
            assert running.wait(5) == 0  # the promise is 5 seconds
    events_written = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    phases = [event["phase"] for event in events_written if event["type"] == "alert"]
    assert phases[0] == "new" and phases[-1] == "end"
    assert (tmp_path / "out").read_text() == "" and "Traceback" not in (tmp_path / "err").read_text()


def test_a_secret_appears_nowhere(tiny_bundle: Path, tmp_path: Path) -> None:
    """Passwords and keys of the configuration and of requests, in all that a server says, writes and shows."""
    config = f"""
cameras:
  dead: {{source: "rtsp://user-{CANARY}:{{DYCOKE_PASSWORD}}@127.0.0.1:9/x?token={CANARY}"}}
  yard: {{source: "test://?fps=10", realtime: true, fps: 5, window_s: 1, every_s: 1, prompt: "What?"}}
sinks:
  jsonl: {{path: {tmp_path}/events.jsonl}}
  webhook: {{url: "http://127.0.0.1:9/{CANARY}", secret: "{{DYCOKE_PASSWORD}}"}}
  mqtt: {{host: 127.0.0.1, port: 9, username: "{CANARY}", password: "{{DYCOKE_PASSWORD}}"}}
server: {{api_key: "{{DYCOKE_API_KEY}}", stream_hosts: [127.0.0.0/8]}}
"""
    key = f"{CANARY}-0123456789"
    said = list[str]()

    def heard(response: httpx.Response) -> httpx.Response:
        said.append(f"{response.headers} {response.text}")
        return response

    with process(tiny_bundle, config, tmp_path, DYCOKE_PASSWORD=CANARY, DYCOKE_API_KEY=key) as (url, running):
        with httpx.Client(base_url=url, trust_env=False, headers={"Authorization": f"Bearer {key}"}) as http:
            new: dict[str, Any] = {
                "liveStreamUrl": f"rtsp://a:p@ss{CANARY}@127.0.0.1:9/y?password={CANARY}",
                "id": "added",
            }
            assert heard(http.post("/v1/live-stream", json=new)).status_code == 201
            heard(http.post("/v1/live-stream", json={**new, "id": "again"}))
            heard(http.post("/v1/live-stream", json={**new, "id": "x", "liveStreamUrl": f"rtsp://u:{CANARY}@other/"}))
            heard(http.post("/v1/live-stream", json={**new, "fps": CANARY}))
            for content in (f"http://u:{CANARY}@h/x", f"file:///{CANARY}", f"{CANARY}:x"):
                part = {"type": "video_url", "video_url": {"url": content}}
                message = {"role": "user", "content": [part, {"type": "text", "text": "What?"}]}
                heard(http.post(CHAT, json={"model": tiny_bundle.name, "messages": [message]}))
            heard(http.post(CHAT, json={"model": CANARY, "messages": [{"role": CANARY, "content": 1}]}))
            heard(http.get(f"/v1/models?token={CANARY}&api_key={CANARY}"))
            heard(http.get("/v1/models", headers={"Authorization": f"Bearer {CANARY}"}))
            wait_for(
                lambda: all(camera["error"] for camera in http.get("/v1/live-stream").json() if camera["id"] != "yard")
            )
            wait_for(lambda: 'dycoke_sink_failures_total{sink="webhook"} 0' not in http.get("/metrics").text)
            for path in (
                "/",
                "/v1/live-stream",
                "/v1/alerts",
                "/v1/alerts/recent",
                "/metrics",
                "/v1/health/ready",
                "/openapi.json",
            ):
                heard(http.get(path))
            with http.stream("GET", "/v1/events?after=" + "0" * 26) as events:
                lines = events.iter_lines()
                said.extend(next(lines) for _ in range(30))
        said.append(Path(f"/proc/{running.pid}/cmdline").read_text())
        running.terminate()
        assert running.wait(5) == 0
    said += [(tmp_path / name).read_text() for name in ("out", "err", "events.jsonl")]
    assert len(said) > 45 and "rtsp://***@127.0.0.1:9" in "".join(said)
    assert [text for text in said if CANARY in text] == []
