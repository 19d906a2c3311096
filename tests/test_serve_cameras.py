"""Cameras, rules, events, health and metrics over HTTP."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from dycoke_edge import VideoLLM
from dycoke_edge.config_camera import Camera, Rule
from dycoke_edge.runtime.camera.events import Event
from tests.serving import Served, error, serving, wait_for

YARD = Camera(
    "yard",
    "test://?fps=10&motion=3",
    fps=5.0,
    window_s=1.0,
    every_s=0.5,
    realtime=True,
    prompt="What?",
    max_new_tokens=2,
    rules=(Rule("own", "Is it day?", threshold=1.0, clear_threshold=0.5),),
)
ALWAYS = Rule(
    "always", "Is anything there?", threshold=0.0, clear_threshold=0.0, min_mass=0, consecutive=1, update_s=0.0
)
RTSP = "rtsp://user:hunter2@127.0.0.1:9/live"


@pytest.fixture(scope="module")
def model(tiny_bundle: Path) -> VideoLLM:
    return VideoLLM.load(tiny_bundle, kv_capacity=2048, prefill_chunk=64)


@pytest.fixture
def another(tiny_bundle: Path) -> VideoLLM:
    """For a second server: a model belongs to one watcher."""
    return VideoLLM.load(tiny_bundle, kv_capacity=2048, prefill_chunk=64)


@pytest.fixture(scope="module")
def served(model: VideoLLM) -> Iterator[Served]:
    options: dict[str, Any] = {"stream_hosts": ("127.0.0.0/8",), "max_cameras": 3, "max_rules": 5}
    with serving(model, [YARD], [ALWAYS], **options) as server:
        wait_for(lambda: server.watcher.events.since())
        yield server


def camera(served: Served, name: str = "yard") -> dict[str, Any]:
    found: dict[str, Any] = served.http.get(f"/v1/live-stream/{name}").json()
    return found


# Cameras


def test_a_camera_tells_what_it_does(served: Served) -> None:
    found = wait_for(lambda: (c := camera(served))["text_time"] and c["alerts"] and c)
    assert found["id"] == "yard" and found["state"] == "online" and found["liveStreamUrl"] == YARD.uri
    assert found["vision_tokens_in"] > found["vision_tokens_kept"] > 0
    assert set(found["alerts"]) == {"always", "own"} and found["alerts"]["always"]["on"]
    assert found["alerts"]["always"]["since"].endswith("Z") and found["text_time"].endswith("Z")
    assert served.http.get("/v1/live-stream").json()[0]["id"] == "yard"


def test_a_picture_of_a_camera(served: Served) -> None:
    """In the camera's own shape, not the model's."""
    wait_for(lambda: served.watcher.snapshot("yard"))
    response = served.http.get("/v1/live-stream/yard/snapshot.jpg")
    assert response.headers["content-type"] == "image/jpeg"
    assert Image.open(io.BytesIO(response.content)).size == (640, 480)
    error(served.http.get("/v1/live-stream/attic/snapshot.jpg"), 404)


def test_a_large_picture_is_1280_wide(another: VideoLLM) -> None:
    wide = Camera("wide", "test://?fps=10&width=2560&height=1080", realtime=True, fps=5.0, window_s=1.0, every_s=60.0)
    with serving(another, [wide]) as served:
        wait_for(lambda: served.watcher.snapshot("wide"))
        response = served.http.get("/v1/live-stream/wide/snapshot.jpg")
        assert Image.open(io.BytesIO(response.content)).size == (1280, 540)


def test_an_alert_has_a_picture_of_when_it_began(served: Served) -> None:
    (first, *_) = [event for event in served.watcher.events.since() if event.type == "alert"]
    path = f"/v1/alerts/recent/{first.alert_id}/snapshot.jpg"
    response = wait_for(lambda: (r := served.http.get(path)).status_code == 200 and r)
    assert response.headers["content-type"] == "image/jpeg"
    assert Image.open(io.BytesIO(response.content)).size == (320, 240)
    assert served.http.get(path).content == response.content, "it does not move on"
    error(served.http.get("/v1/alerts/recent/none/snapshot.jpg"), 404)


def test_pictures_of_alerts_are_few_and_none_where_frames_are_not_shown(another: VideoLLM) -> None:
    with serving(another, [YARD], [ALWAYS], snapshots=False) as served:
        alert = wait_for(lambda: [event for event in served.watcher.events.since() if event.type == "alert"])[0]
        path = f"/v1/alerts/recent/{alert.alert_id}/snapshot.jpg"
        assert error(served.http.get(path), 403)["code"] == "snapshots_off"


def test_old_pictures_of_alerts_go(another: VideoLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dycoke_edge.runtime.serve.thumbnails.KEPT", 2)
    with serving(another, [YARD]) as served:
        wait_for(lambda: served.watcher.snapshot("yard"))
        hub = served.watcher._hub
        for number in range(3):
            hub.emit("alert", "new", "yard", alert_id=f"a{number}", rule_id="x")
        hub.emit("alert", "new", "gone", alert_id="of no camera", rule_id="x")
        hub.emit("alert", "new", "yard", alert_id="a3", rule_id="x")
        paths = [f"/v1/alerts/recent/a{number}/snapshot.jpg" for number in range(4)]
        wait_for(lambda: served.http.get(paths[3]).status_code == 200)
        assert [served.http.get(path).status_code for path in paths] == [404, 404, 200, 200]


def test_a_camera_comes_and_goes(served: Served) -> None:
    new = {"liveStreamUrl": RTSP, "description": "the gate", "id": "gate", "fps": 2, "window_s": 2, "prompt": "What?"}
    response = served.http.post("/v1/live-stream", json=new)
    assert response.status_code == 201 and response.headers["location"] == "/v1/live-stream/gate"
    made = response.json()
    assert (
        made["id"] == "gate"
        and made["description"] == "the gate"
        and made["liveStreamUrl"] == "rtsp://***@127.0.0.1:9/live"
    )
    assert served.watcher.cameras["gate"].uri == RTSP and served.watcher.cameras["gate"].prompt == "What?"
    assert error(served.http.post("/v1/live-stream", json=new), 409)["param"] == "id"
    again = error(served.http.post("/v1/live-stream", json={**new, "id": "other"}), 409)
    assert again["param"] == "liveStreamUrl" and again["code"] == "duplicate"
    unnamed = served.http.post("/v1/live-stream", json={"liveStreamUrl": "rtsp://127.0.0.1:9/2"}).json()["id"]
    full = error(served.http.post("/v1/live-stream", json={"liveStreamUrl": "rtsp://127.0.0.1:9/3"}), 409)
    assert "max_cameras" in full["message"]
    wait_for(lambda: camera(served, "gate")["error"])
    assert "hunter2" not in served.http.get("/v1/live-stream").text
    for name in ("gate", unnamed):
        assert served.http.delete(f"/v1/live-stream/{name}").json() == {"id": name, "deleted": True}
        error(served.http.delete(f"/v1/live-stream/{name}"), 404)
        error(served.http.get(f"/v1/live-stream/{name}"), 404)
    assert list(served.watcher.cameras) == ["yard"]


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ({}, 400, "liveStreamUrl: is missing"),
        ({"liveStreamUrl": RTSP, "speed": 1}, 400, "speed: unknown key"),
        ({"liveStreamUrl": RTSP, "id": "a/b"}, 400, "camera id 'a/b'"),
        ({"liveStreamUrl": RTSP, "fps": 0}, 400, "fps: "),
        ({"liveStreamUrl": RTSP, "fps": 1e9}, 400, "fps=1000000000.0 (--fps) must be between"),
        ({"liveStreamUrl": RTSP, "window_s": 1e5}, 400, "window_s"),
        ({"liveStreamUrl": RTSP, "fps": 1000, "window_s": 1000}, 400, "--memory-frames"),
        ({"liveStreamUrl": "x" * 3000}, 400, "liveStreamUrl: "),
    ],
)
def test_a_camera_that_cannot_be(served: Served, body: dict[str, Any], status: int, said: str) -> None:
    found = error(served.http.post("/v1/live-stream", json=body), status)
    assert said in found["message"] and "hunter2" not in found["message"]
    assert list(served.watcher.cameras) == ["yard"]


def test_pictures_can_be_off(another: VideoLLM) -> None:
    with serving(another, [YARD], snapshots=False) as served:
        assert error(served.http.get("/v1/live-stream/yard/snapshot.jpg"), 403)["code"] == "snapshots_off"


# Rules


def test_a_rule_comes_changes_and_goes(served: Served) -> None:
    new = {
        "stream_id": "yard",
        "alert_type": "missing_ppe",
        "system_prompt": "You watch a yard.",
        "prompt": "Does someone lack a helmet?",
        "chunk_duration": 1.0,
        "chunk_overlap_duration": 0.5,
        "threshold": 0.3,
    }
    response = served.http.post("/v1/alerts", json=new)
    made = response.json()
    assert response.status_code == 201 and set(made) == {"id", "created_at"}
    path = f"/v1/alerts/{made['id']}"
    assert response.headers["location"] == path
    rule = served.watcher.rules[made["id"]]
    assert rule.prompt == "You watch a yard.\nDoes someone lack a helmet?" and rule.cameras == ("yard",)
    assert (rule.threshold, rule.clear_threshold) == (0.3, 0.3)
    shown = served.http.get(path).json()
    assert shown["prompt"] == new["prompt"] and shown["system_prompt"] == new["system_prompt"]
    assert shown["created_at"] == made["created_at"] and shown["stream_id"] == "yard"
    changed = served.http.put(path, json={"prompt": "Is it night?", "consecutive": 3})
    assert changed.status_code == 200 and changed.json()["id"] == made["id"]
    assert served.watcher.rules[made["id"]].consecutive == 3 and served.http.get(path).json()["stream_id"] is None
    error(served.http.put(path, json={"prompt": "Is it?", "threshold": 0.1, "clear_threshold": 0.9}), 400)
    assert served.watcher.rules[made["id"]].prompt == "Is it night?"
    assert {rule["id"] for rule in served.http.get("/v1/alerts").json()} == {"always", "own", made["id"]}
    assert served.http.delete(path).json()["deleted"]
    for method in ("GET", "DELETE"):
        error(served.http.request(method, path), 404)
    error(served.http.put(path, json={"prompt": "Is it?"}), 404)


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ({"prompt": ""}, 400, "prompt: "),
        ({"prompt": " "}, 400, "has no question"),
        ({"prompt": "Is it?", "stream_id": "attic"}, 404, "stream_id: "),
        ({"prompt": "Is it?", "chunk_duration": 30}, 400, "chunk_duration: camera yard has 1"),
        ({"prompt": "Is it?", "threshold": 2}, 400, "threshold: "),
        ({"prompt": "Is it?", "severity": "awful"}, 400, "severity: "),
        ({"prompt": "Is it?", "cooldown": 3}, 400, "cooldown: unknown key"),
    ],
)
def test_a_rule_that_cannot_be(served: Served, body: dict[str, Any], status: int, said: str) -> None:
    assert said in error(served.http.post("/v1/alerts", json=body), status)["message"]
    assert list(served.watcher.rules) == ["always"]


@pytest.mark.parametrize("prompt", ["Is there a fire? <image>", "Is it? " * 280], ids=["placeholder", "long"])
def test_what_cannot_be_asked_is_refused_when_it_is_added(served: Served, prompt: str) -> None:
    said = error(served.http.post("/v1/alerts", json={"prompt": prompt}), 400)["message"]
    assert "prompt" in said and "\n" not in said and list(served.watcher.rules) == ["always"]
    quick = {"prompt": "Is it?", "threshold": 0, "min_mass": 0, "consecutive": 1}
    made = served.http.post("/v1/alerts", json=quick).json()
    wait_for(lambda: camera(served)["alerts"][made["id"]]["on"])
    assert "prompt" in error(served.http.put(f"/v1/alerts/{made['id']}", json={"prompt": prompt}), 400)["message"]
    assert camera(served)["alerts"][made["id"]]["on"]  # a change that is refused ends no alert
    served.http.delete(f"/v1/alerts/{made['id']}")
    stream = {"liveStreamUrl": "rtsp://127.0.0.1:9/x", "prompt": prompt}
    assert "prompt" in error(served.http.post("/v1/live-stream", json=stream), 400)["message"]
    assert list(served.watcher.cameras) == ["yard"]


def test_rules_are_bounded(served: Served) -> None:
    made = [served.http.post("/v1/alerts", json={"prompt": "Is it?"}).json()["id"] for _ in range(3)]
    assert "max_rules" in error(served.http.post("/v1/alerts", json={"prompt": "Is it?"}), 409)["message"]
    for name in made:
        served.http.delete(f"/v1/alerts/{name}")


def test_a_rule_of_the_configuration_stays(served: Served) -> None:
    error(served.http.delete("/v1/alerts/own"), 409)


def test_recent_alerts_newest_first(served: Served) -> None:
    found = wait_for(lambda: len(f := served.http.get("/v1/alerts/recent?limit=3").json()) == 3 and f)
    assert [one["id"] for one in found] == sorted((one["id"] for one in found), reverse=True)
    assert {one["type"] for one in found} == {"alert"} and found[0]["v"] == 1
    assert served.http.get("/v1/alerts/recent?stream_id=attic").json() == []
    error(served.http.get("/v1/alerts/recent?limit=0"), 400)


# Events


def follow(served: Served, count: int, **options: Any) -> list[dict[str, str]]:
    """The first messages of /v1/events that have data."""
    found = list[dict[str, str]]()
    with served.http.stream("GET", "/v1/events", **options) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        block: dict[str, str] = {}
        for line in response.iter_lines():
            if line:
                key, _, value = line.partition(": ")
                block[key] = value
            elif "data" in block:
                found.append(block)
                block = {}
                if len(found) == count:
                    return found
    return found


def test_events_as_they_happen(served: Served) -> None:
    newest = served.watcher.events.latest(1)[0].id
    found = follow(served, 4)
    assert all(message["id"] > newest for message in found)
    for message in found:
        data = json.loads(message["data"])
        assert data["id"] == message["id"] and data["type"] == message["event"] and data["camera"] == "yard"


def test_events_go_on_where_they_broke_off(served: Served) -> None:
    kept = wait_for(lambda: len(k := served.watcher.events.since()) > 6 and k)
    ids = [event.id for event in kept]
    found = follow(served, 5, headers={"Last-Event-ID": ids[0]})
    assert [message["id"] for message in found] == ids[1:6]
    assert [message["id"] for message in follow(served, 2, params={"after": ids[1]})] == ids[2:4]


def test_a_gap_is_told(served: Served) -> None:
    gap, first = follow(served, 2, headers={"Last-Event-ID": "0" * 26})
    oldest = served.watcher.events.since()[0].id
    assert gap["event"] == "gap" and json.loads(gap["data"])["oldest"] == oldest == first["id"]
    error(served.http.get("/v1/events", headers={"Last-Event-ID": "x"}), 400)


def test_events_of_one_camera(served: Served) -> None:
    first = served.watcher.events.since()[0]
    strange = Event("error", "new", "attic", served.watcher._hub.new_id(), first.time)
    served.watcher.events.add(strange)
    found = follow(served, 1, params={"after": first.id, "stream_id": "attic"})
    assert found[0]["id"] == strange.id


def test_readers_of_events_are_bounded(another: VideoLLM) -> None:
    with serving(another, [YARD], max_event_streams=1) as served:
        with served.http.stream("GET", "/v1/events") as first:
            lines = first.iter_lines()
            next(lines)
            refused = served.http.get("/v1/events")
            assert error(refused, 429)["code"] == "busy" and int(refused.headers["retry-after"]) >= 1
        wait_for(lambda: _opens(served))


def _opens(served: Served) -> bool:
    with served.http.stream("GET", "/v1/events") as response:
        return response.status_code == 200


# Health and metrics


def test_health(served: Served) -> None:
    assert served.http.get("/v1/health/live").json() == {"status": "live"}
    assert served.http.get("/v1/health/ready").json() == {"status": "ready", "reasons": []}


def test_ready_says_why_not(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(served.watcher), "_unready", lambda self: ["the model failed: rtsp://a:hunter2@h"])
    response = served.http.get("/v1/health/ready")
    assert error_of(response)["code"] == "not_ready"
    assert response.json()["reasons"] == ["the model failed: rtsp://***@h"]
    assert served.http.get("/v1/health/live").status_code == 200


def error_of(response: httpx.Response) -> dict[str, Any]:
    assert response.status_code == 503
    found: dict[str, Any] = response.json()["error"]
    return found


METRICS = {
    "dycoke_camera_up": {"camera"},
    "dycoke_camera_last_frame_timestamp_seconds": {"camera"},
    "dycoke_camera_frames_total": {"camera"},
    "dycoke_vision_tokens_total": {"camera", "kind"},
    "dycoke_stage_duration_seconds_sum": {"stage"},
    "dycoke_stage_duration_seconds_count": {"stage"},
    "dycoke_answer_age_seconds": {"camera"},
    "dycoke_events_total": {"type", "verdict"},
    "dycoke_alert_state": {"camera", "rule"},
    "dycoke_windows_total": {"camera"},
    "dycoke_questions_total": {"outcome"},
    "dycoke_memory_available_bytes": set[str](),
    "dycoke_ready": set[str](),
}


def test_metrics(served: Served) -> None:
    wait_for(lambda: camera(served)["answer_age_s"])
    response = served.http.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    samples = [sample for family in text_string_to_metric_families(response.text) for sample in family.samples]
    found = {sample.name: set(sample.labels) for sample in samples}
    assert {name: found.get(name) for name in METRICS} == METRICS
    known = {sample.labels["camera"] for sample in samples if "camera" in sample.labels}
    assert known == {"yard"} and "What?" not in response.text and "test://" not in response.text
    values = {(sample.name, *sample.labels.values()): sample.value for sample in samples}
    assert values["dycoke_camera_up", "yard"] == 1 and values["dycoke_alert_state", "yard", "always"] == 1
    assert 0 < values["dycoke_vision_tokens_total", "yard", "kept"] < values["dycoke_vision_tokens_total", "yard", "in"]


def test_metrics_have_bounded_labels() -> None:
    from dycoke_edge.runtime.serve.metrics import MOST, WatcherMetrics

    one: dict[str, Any] = {"state": "online", "decoded_frames": 1, "alerts": {}, "dropped_frames": {}}
    status = {
        "cameras": {f"c{index}": one for index in range(MOST + 5)},
        "seconds": {},
        "events": {},
        "questions": dict.fromkeys(("waiting", "answered", "refused", "failed"), 0),
        "failures": 0,
        "ready": True,
        "sinks": [{"name": "webhook secret.example"}, {"name": "webhook other.example"}],
    }
    metrics = {metric.name: metric.samples for metric in WatcherMetrics(lambda: status).collect()}
    assert len(metrics["dycoke_camera_up"]) == MOST
    assert [sample.labels["sink"] for sample in metrics["dycoke_sink_queue_length"]] == ["webhook", "webhook_2"]


# The end


def test_the_end_does_not_wait_for_readers(another: VideoLLM) -> None:
    read = list[str]()

    def reader(url: str) -> None:
        with httpx.stream("GET", f"{url}/v1/events", trust_env=False) as response:
            read.extend(response.iter_lines())  # ends cleanly, or raises

    with serving(another, [YARD]) as served:
        thread = threading.Thread(target=reader, args=(served.url,))
        thread.start()
        windows = camera(served)["windows"]
        wait_for(lambda: camera(served)["windows"] > windows + 1)
    thread.join(10)
    assert not thread.is_alive() and any(line.startswith("id: ") for line in read)
