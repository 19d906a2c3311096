"""`dycoke-edge serve`: cameras.yaml, what is wrong with it in one line, and a process that starts and ends as told."""

from __future__ import annotations

import json
import logging
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from dycoke_edge import EngineError, VideoLLM
from dycoke_edge.cli_serve import _Plain, load, run
from dycoke_edge.runtime.serve.config import read_config
from dycoke_edge.runtime.serve.listener import Server
from tests.commands import ROOT, here
from tests.hostile import slow_video
from tests.serving import CHAT, text, video, wait_for
from tests.talker import SLOW, talking

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
        ("cameras: {yard: {source: 'test://', prompt: 'What <video>?'}}", "camera yard: prompt (--prompt): text"),
        ("cameras: {yard: {source: 'test://', rules: {p: {prompt: 'Is <image>?'}}}}", "rule p: prompt (--prompt): "),
        ("rules: {p: {prompt: '" + "Is it? " * 300 + "'}}", "rule p: prompt (--prompt): "),
        ("live: {max_question_tokens: 4}\nrules: {p: {prompt: 'Is it?'}}", "use --max-question-tokens "),
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


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("cameras: {a: {source: HERE/none.mp4}}", "cameras.a.source: HERE/none.mp4 does not exist"),
        ("cameras: {a: {source: 'file://HERE/none.mp4'}}", "cameras.a.source: HERE/none.mp4 does not exist"),
        ("cameras: {a: {source: HERE}}", "cameras.a.source: HERE is a folder"),
        ("cameras: {a: {source: 'v4l2:///dev/video99'}}", "cameras.a.source: v4l2:///dev/video99 does not exist"),
        ("cameras: {a: {source: 'gst://videotestsrc'}}", "cameras.a.source: "),
        ("sinks: {jsonl: {path: HERE/none/events.jsonl}}", "sinks.jsonl.path: there is no folder HERE/none"),
        ("sinks: {jsonl: {path: HERE}}", "sinks.jsonl.path: HERE is a folder"),
        ("sinks: {mqtt: {host: h, tls: true, ca_certs: HERE/ca.pem}}", "sinks.mqtt.ca_certs: HERE/ca.pem does not"),
        ("sinks: {webhook: {url: 'http://h/', secret: whsec_x}}", "sinks.webhook: a secret that begins with whsec_"),
        ("server: {file_dirs: [HERE, HERE/none]}", "server.file_dirs: there is no folder HERE/none"),
        (
            "compression: {merge_ratio: 0.6}",
            "compression: merge_ratio=0.6 (--merge-ratio) is not in this bundle, which",
        ),
    ],
)
def test_check_looks_whether_files_are_there(
    capsys: Capture, tmp_path: Path, tiny_bundle: Path, text: str, said: str
) -> None:
    path = tmp_path / "cameras.yaml"
    path.write_text(text.replace("HERE", str(tmp_path)))
    outcome = here(capsys, "serve", tiny_bundle, "--config", path, "--check")
    assert outcome.code == 2 and outcome.complaint.startswith(f"{path}: ")
    assert said.replace("HERE", str(tmp_path)) in outcome.complaint
    assert [file.name for file in tmp_path.iterdir()] == ["cameras.yaml"]


def test_check_is_content_with_what_is_there(capsys: Capture, tmp_path: Path, tiny_bundle: Path) -> None:
    path = tmp_path / "cameras.yaml"
    path.write_text(
        f"cameras: {{a: {{source: {ROOT}/examples/clip.mp4}}, b: {{source: 'rtsp://10.0.0.5/x'}}}}\n"
        f"sinks: {{jsonl: {{path: {tmp_path}/events.jsonl}}}}\nserver: {{file_dirs: [{tmp_path}]}}\n"
    )
    outcome = here(capsys, "serve", tiny_bundle, "--config", path, "--check")
    assert outcome.code == 0 and json.loads(outcome.out)["cameras"] == 2


def test_a_file_that_a_sink_needs_at_its_start(capsys: Capture, tmp_path: Path, tiny_bundle: Path) -> None:
    path = tmp_path / "cameras.yaml"
    path.write_text(f"sinks: {{mqtt: {{host: h, tls: true, ca_certs: {tmp_path}/none.pem}}}}")
    outcome = here(capsys, "serve", tiny_bundle, "--config", path, "--port", 0)
    assert outcome.code == 2 and "sinks.mqtt.ca_certs: No such file" in outcome.err


def test_a_test_picture_is_a_camera() -> None:
    """It comes at its own speed, unless told otherwise, on whatever level; a file does not."""
    sources = {"a": "test://?fps=5", "b": "TEST://", "file": "clip.mp4"}
    cameras = {name: {"source": source} for name, source in sources.items()}
    found = {camera.id: camera.realtime for camera in read_config({"cameras": cameras}).cameras}
    assert found == {"a": True, "b": True, "file": False}
    told = read_config({"cameras": {"a": {"source": "test://", "realtime": False}, "b": {"source": "test://"}}})
    assert [camera.realtime for camera in told.cameras] == [False, True]
    told = read_config({"realtime": False, "cameras": {"a": {"source": "test://", "realtime": True}}})
    assert [camera.realtime for camera in told.cameras] == [True]
    assert not read_config({"realtime": False, "cameras": cameras}).cameras[0].realtime


def test_serve_needs_no_configuration(capsys: Capture, tiny_bundle: Path, tmp_path: Path) -> None:
    outcome = here(capsys, "serve", tiny_bundle, "--check")
    assert outcome.code == 0
    assert json.loads(outcome.out) == {"config": None, "cameras": 0, "rules": 0, "ok": True}
    with process(tiny_bundle, None, tmp_path) as (url, running), httpx.Client(base_url=url, trust_env=False) as http:
        body = {"model": tiny_bundle.name, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
        assert http.post(CHAT, json=body).json()["usage"]["completion_tokens"] == 2
        assert http.get("/v1/live-stream").json() == []
        running.terminate()
        assert running.wait(5) == 0
    outside = here(capsys, "serve", tiny_bundle, "--host", "0.0.0.0")
    assert outside.code == 2 and "server.api_key" in outside.complaint


def test_what_serve_needs(capsys: Capture, tmp_path: Path, tiny_bundle: Path, written: Path) -> None:
    assert "dycoke-edge serve BUNDLE" in here(capsys, "serve").complaint
    assert "cannot be read" in here(capsys, "serve", tiny_bundle, "--config", tmp_path / "none.yaml").complaint
    (tmp_path / "a.yaml").write_text(CAMERA)
    assert here(capsys, "serve", tmp_path, "--config", tmp_path / "a.yaml", "--check").code == 4
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        outcome = here(capsys, "serve", tiny_bundle, "--config", tmp_path / "a.yaml", "--port", port)
    assert outcome.code == 2 and f"127.0.0.1:{port} (--host, --port)" in outcome.complaint


def test_only_a_traceback_has_several_lines() -> None:
    try:
        raise ValueError("a\n2026 INFO forged\x1b[2J")
    except ValueError:
        record = logging.LogRecord("x", logging.ERROR, "", 0, "said %s", ("a\r\nb\x1b\u2028",), sys.exc_info())
    first, *more = _Plain("%(levelname)s %(message)s").format(record).split("\n")
    assert first == r"ERROR said a\r\nb\x1b\u2028"
    assert more[-1] == r"    2026 INFO forged\x1b[2J" and all(line.startswith("    ") for line in more)


# A process


@contextmanager
def process(
    bundle: Path, config: str | None, folder: Path, **environment: str
) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A server in a process of its own: its URL and the process. Output lands in folder/out and folder/err."""
    command = [sys.executable, "-m", "dycoke_edge", "serve", str(bundle), "--port", "0"]
    if config is not None:
        path = folder / "cameras.yaml"
        path.write_text(config)
        command += ["--config", str(path)]
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
rules: {{always: {{prompt: "Is it?", threshold: 0, min_mass: 0, consecutive: 1}}}}
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


@pytest.mark.parametrize("shown", ["pictures", "drip"])
def test_a_signal_waits_for_no_media(tiny_bundle: Path, tmp_path: Path, shown: str) -> None:
    """Pictures that take half a minute to decode, or a URL whose answer drips, are on their way. Their files go."""
    (tmp_path / "temporary").mkdir()
    with talking(SLOW["header"], "127.0.0.2") as site:
        url = f"http://127.0.0.2:{site.port}/x" if shown == "drip" else slow_video()
        message = {"role": "user", "content": [video(url), text()]}
        body = {"model": tiny_bundle.name, "messages": [message]}
        config = CAMERA + "server: {video_timeout_s: 600, fetch_hosts: [127.0.0.2/32]}"
        with process(tiny_bundle, config, tmp_path, TMPDIR=str(tmp_path / "temporary")) as (at, running):

            def ask() -> None:
                with suppress(httpx.TransportError):
                    httpx.post(at + CHAT, json=body, timeout=60, trust_env=False)

            asking = threading.Thread(target=ask)
            asking.start()
            wait_for(lambda: list((tmp_path / "temporary").glob("dycoke-*/*")))  # the file is there, and is read
            running.send_signal(signal.SIGTERM)
            assert running.wait(5) == 0  # the promise is 5 seconds
            asking.join(30)
    assert not list((tmp_path / "temporary").glob("dycoke-*"))
    assert "Traceback" not in (tmp_path / "err").read_text()


class PanicError(BaseException):
    """What pyo3 makes of a panic of a Rust library: no Exception."""


@pytest.mark.parametrize("wish", ["exit", "recover"])
def test_a_panic_ends_the_process_if_so_configured(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, wish: str
) -> None:
    def panics(*arguments: Any, **options: Any) -> Any:
        raise PanicError("index out of bounds")

    servers = list[Server]()
    monkeypatch.setattr(VideoLLM, "stream", panics)
    monkeypatch.setattr("dycoke_edge.cli_serve.output.people.print", lambda *_: None)
    real = Server.run

    def remembered(self: Server, *arguments: Any, **options: Any) -> None:
        servers.append(self)
        real(self, *arguments, **options)

    monkeypatch.setattr(Server, "run", remembered)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    config = read_config({"cameras": {}, "server": {"on_panic": wish, "port": port}})
    body = {"model": tiny_bundle.name, "messages": [{"role": "user", "content": "Hi"}]}
    with ThreadPoolExecutor(1) as pool:
        ran = pool.submit(run, tiny_bundle, config)
        url = f"http://127.0.0.1:{port}"
        wait_for(lambda: _ready(url) or ran.done())
        assert httpx.post(url + CHAT, json=body, trust_env=False).status_code == 503
        if wish == "recover":
            assert httpx.post(url + CHAT, json=body, trust_env=False).status_code == 503
            assert _ready(url)
            servers[0].stop()
        found = ran.exception(20)
    assert isinstance(found, EngineError) == (wish == "exit"), found
    assert found is None or "PanicError" in str(found)


def test_a_secret_appears_nowhere(tiny_bundle: Path, tmp_path: Path) -> None:
    """Passwords and keys of the configuration and of requests, in all that a server says, writes and shows."""
    config = f"""
cameras:
  dead: {{source: "rtsp://user-{CANARY}:{{DYCOKE_PASSWORD}}@127.0.0.1:9/x?token={CANARY}"}}
  path: {{source: "rtsp://127.0.0.1:9/{{DYCOKE_TOKEN}}/x"}}
  query: {{source: "rtsp://127.0.0.1:9/x?channel={{DYCOKE_TOKEN}}"}}
  yard: {{source: "test://?fps=10", realtime: true, fps: 5, window_s: 1, every_s: 1, prompt: "What?"}}
sinks:
  jsonl: {{path: {tmp_path}/events.jsonl}}
  webhook: {{url: "http://127.0.0.1:9/{CANARY}", secret: "{{DYCOKE_PASSWORD}}"}}
  mqtt: {{host: 127.0.0.1, port: 9, username: "{CANARY}", password: "{{DYCOKE_PASSWORD}}"}}
server: {{api_key: "{{DYCOKE_API_KEY}}", stream_hosts: [127.0.0.0/8]}}
"""
    key = f"{CANARY}-0123456789"
    values = {"DYCOKE_PASSWORD": f"{CANARY}@x", "DYCOKE_API_KEY": key, "DYCOKE_TOKEN": f"{CANARY}%20+t"}
    said = list[str]()

    def heard(response: httpx.Response) -> httpx.Response:
        said.append(f"{response.headers} {response.text}")
        return response

    with process(tiny_bundle, config, tmp_path, **values) as (url, running):
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
    assert "rtsp://127.0.0.1:9/{DYCOKE_TOKEN}/x" in "".join(said)
    assert [text for text in said if CANARY in text] == []
