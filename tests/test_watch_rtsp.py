"""Cameras over real RTSP, a real model, rules and sinks, all at once: a surveillance clip, and a server that dies."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from dycoke_edge import Camera, CameraWatcher, Rule, VideoLLM
from dycoke_edge.config_camera import ReaderSpec
from dycoke_edge.runtime.sinks.jsonl import JsonlSink
from tests.cameras import wait
from tests.servers import rtsp
from tests.servers.rtsp import RtspServer

VTEST = Path(__file__).resolve().parents[1] / ".venv" / "vtest.avi"
QUICK = ReaderSpec(open_timeout=2, read_timeout=1, stall_timeout=5, retry_first=0.1, retry_most=0.5)
# The tiny random model says yes to everything, at 0.99 or more.
ALWAYS = Rule("always", "Is a person in view?", threshold=0.5, clear_threshold=0.1, min_mass=0, update_s=1000)
CANARY = "c4n4ry"


@pytest.fixture(scope="module")
def street(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 seconds of Debian's surveillance clip in H.264."""
    rtsp.need()
    if not VTEST.exists():
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)("no vtest.avi: make services")
    return rtsp.transcode(VTEST, tmp_path_factory.mktemp("street") / "street.mp4", frames=300, size=(384, 288))


@pytest.fixture
def server(street: Path) -> Iterator[RtspServer]:
    with RtspServer("--file", str(street), user="admin", password=CANARY) as running:
        yield running


def test_a_street_is_watched_through_a_power_cut(server: RtspServer, tiny_bundle: Path, tmp_path: Path) -> None:
    uri = server.url.replace("://", f"://admin:{CANARY}@")
    camera = Camera("street", uri, fps=4, window_s=2, every_s=1, prompt="What?", max_new_tokens=4)
    path = tmp_path / "events.jsonl"
    llm = VideoLLM.load(tiny_bundle)
    with CameraWatcher(llm, [camera], [ALWAYS], JsonlSink(path), reading=QUICK) as watcher:

        def counted() -> int:
            return int(watcher.status()["cameras"]["street"]["windows"])

        wait(lambda: counted() >= 3)
        assert watcher.ask("street", "What is there?").status == "ok"
        server.kill()
        wait(lambda: watcher.status()["cameras"]["street"]["state"] == "offline")
        before = counted()
        server.start()
        wait(lambda: counted() >= before + 3)
        status = watcher.status()
        assert status["ready"] and status["cameras"]["street"]["reconnects"]
    events = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    states = [event["state"] for event in events if event["type"] == "status"]
    assert states[:3] == ["connecting", "online", "offline"] and states[-2:] == ["online", "stopped"]
    alerts = [event for event in events if event["type"] == "alert"]
    assert [event["phase"] for event in alerts] == ["new", "end"]  # it outlives a short absence
    assert len({event["alert_id"] for event in alerts}) == 1
    cut = next(event["time"] for event in events if event["state"] == "offline")
    described = [event for event in events if event["type"] == "description"]
    for event in described:  # no window has frames from before the cut and after it
        assert event["frames"] >= 6 and not event["start_time"] < cut < event["end_time"]
    assert any(event["start_time"] > cut for event in described)
    assert CANARY not in path.read_text(encoding="utf-8") + json.dumps(status)


def test_a_wrong_password_is_a_state_and_not_a_storm(server: RtspServer, tiny_bundle: Path) -> None:
    uri = server.url.replace("://", f"://admin:wrong{CANARY}@")
    with CameraWatcher(VideoLLM.load(tiny_bundle), [Camera("street", uri)], [ALWAYS], reading=QUICK) as watcher:
        wait(lambda: watcher.status()["cameras"]["street"]["error"])
        status = watcher.status()
        assert "street" in status["cameras"] and CANARY not in json.dumps(status)
        assert status["cameras"]["street"]["state"] == "offline" and status["ready"]
        assert watcher.ask("street", "What?").status == "stale"
