"""Events: their JSON, their ids, and the ring that streams resume from."""

from __future__ import annotations

import json
import threading
from dataclasses import fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dycoke_edge import Event
from dycoke_edge.runtime.camera.events import EventRing, Ulids, rfc3339
from dycoke_edge.runtime.camera.hub import Hub
from tests.cameras import FakeClock

EVENT = Event("alert", "new", "gate", "01A", 1_790_000_000.25, start_time=1_789_999_992.0, score=0.75)
# What readers of the JSON were promised.
KEYS = {
    *("v", "id", "type", "phase", "camera", "rule_id", "alert_type", "verdict", "score", "start_time", "end_time"),
    *("time_source", "text", "frames", "vision_tokens_in", "vision_tokens_kept", "latency_ms", "dropped_windows"),
    *("model", "backend"),
}


def test_json_is_one_line_with_every_key() -> None:
    event = replace(EVENT, text="a\nb — ü", reason=None)
    line = event.to_json()
    data = json.loads(line)
    assert "\n" not in line and set(data) >= KEYS and data["v"] == 1
    assert set(data) == {"v", *(field.name for field in fields(Event))}
    assert data["text"] == "a\nb — ü" and data["score"] == 0.75 and data["end_time"] is None
    assert data["time"] == "2026-09-21T14:13:20.250Z" and data["start_time"] == "2026-09-21T14:13:12.000Z"


def test_json_of_numbers_that_json_does_not_have_is_refused() -> None:
    with pytest.raises(ValueError):
        replace(EVENT, score=float("nan")).to_json()


@pytest.mark.parametrize(
    ("event", "line"),
    [
        (
            replace(EVENT, rule_id="person", severity="info", verdict="confirmed"),
            "2026-09-21T14:13:20.250Z gate info alert person new confirmed 0.75",
        ),
        (
            replace(EVENT, rule_id="fire", verdict="unknown", score=None, phase="end", reason="neither\nyes nor no"),
            "2026-09-21T14:13:20.250Z gate alert fire end unknown (neither yes nor no)",
        ),
        (
            Event("description", "new", "gate", "01B", 0.5, text="A red\u2028square\r\nmoves. "),
            "1970-01-01T00:00:00.500Z gate description A red square moves.",
        ),
        (
            Event("status", "new", "gate", "01C", 0, state="offline", reason="refused"),
            "1970-01-01T00:00:00.000Z gate status offline (refused)",
        ),
        (Event("error", "new", "gate", "01D", 0, reason="E: x"), "1970-01-01T00:00:00.000Z gate error (E: x)"),
    ],
)
def test_an_event_is_a_readable_line(event: Event, line: str) -> None:
    assert str(event) == line


@pytest.mark.parametrize(("seconds", "text"), [(None, None), (0, "1970-01-01T00:00:00.000Z")])
def test_times_are_utc(seconds: float | None, text: str | None) -> None:
    assert rfc3339(seconds) == text


@given(st.lists(st.floats(-1e10, 1e10), max_size=30))
def test_ids_only_grow_whatever_the_clock_does(times: list[float]) -> None:
    now = 0.0
    ulid = Ulids(lambda: now)
    made = []
    for now in times:  # noqa: B007 - the lambda reads it
        made.append(ulid())
    assert made == sorted(set(made)) and all(len(one) == 26 for one in made)


def test_an_id_begins_with_its_time() -> None:
    assert Ulids(lambda: 1_469_918_176.385)()[:10] == "01ARYZ6S41"  # the example of the ULID specification


def test_ids_of_many_threads_differ() -> None:
    ulid, made = Ulids(lambda: 1.0), list[str]()
    threads = [threading.Thread(target=lambda: made.extend(ulid() for _ in range(200))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(made)) == 800


def ring_of(*ids: str, size: int = 3) -> EventRing:
    ring = EventRing(size)
    for one in ids:
        ring.add(replace(EVENT, id=one))
    return ring


@pytest.mark.parametrize(
    ("since", "expected"),
    [(None, "CDE"), ("0", "CDE"), ("A", "CDE"), ("C", "DE"), ("D", "E"), ("E", ""), ("Z", "")],
)
def test_a_stream_resumes_after_the_last_id_it_saw(since: str | None, expected: str) -> None:
    assert "".join(event.id for event in ring_of(*"ABCDE").since(since)) == expected


def test_a_stream_waits_for_the_next_event() -> None:
    ring = ring_of("A")
    found = list[str]()
    thread = threading.Thread(target=lambda: found.extend(event.id for event in ring.since("A", timeout=30)))
    thread.start()
    ring.add(replace(EVENT, id="B"))
    thread.join(30)
    assert found == ["B"] and ring.since("B", timeout=0.01) == []


def test_latest() -> None:
    ring = ring_of(*"ABCDE")
    assert ["".join(e.id for e in ring.latest(n)) for n in (0, 1, 2, 9)] == ["", "E", "DE", "CDE"]


class Collecting:
    def __init__(self) -> None:
        self.events = list[Event]()

    def __call__(self, event: Event) -> None:
        self.events.append(event)

    def close(self, timeout: float) -> None:
        self.events.append(replace(EVENT, id="closed"))


def test_every_sink_gets_the_same_events_in_the_same_order_and_none_after_the_end() -> None:
    sinks = [Collecting(), Collecting()]
    hub = Hub("model", "cpu", sinks, FakeClock())

    def emit() -> None:
        for _ in range(100):
            hub.emit("error", "new", "gate", reason="x")

    threads = [threading.Thread(target=emit) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    hub.close(1.0)
    hub.emit("error", "new", "gate")
    first, second = (sink.events for sink in sinks)
    assert first == second and len(first) == 301 and first[-1].id == "closed"
    assert [event.id for event in first[:-1]] == sorted(event.id for event in first[:-1])
    assert hub.numbers()["events"] == {"error/none": 300}


def test_a_sink_that_raises_harms_nobody() -> None:
    class Broken(Collecting):
        def __call__(self, event: Event) -> None:
            raise RuntimeError("no rtsp://admin:hunter2@cam")

    sinks = [Broken(), Collecting()]
    hub = Hub("model", "cpu", sinks, FakeClock())
    hub.emit("error", "new", "gate")
    assert len(sinks[1].events) == 1
    broken, fine = hub.numbers()["sinks"]
    assert broken["name"] == "Broken" and "RuntimeError" in broken["error"] and "hunter2" not in broken["error"]
    assert fine == {"name": "Collecting"}
