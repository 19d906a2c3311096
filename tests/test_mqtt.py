"""The MQTT sink and a real broker, which comes and goes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from threading import Semaphore
from types import SimpleNamespace
from typing import Any

import pytest

from dycoke_edge import Camera, Event, Rule, UsageError
from dycoke_edge.runtime.sinks.mqtt import MqttSink
from tests.cameras import FakeLLM, by_hand, drive, wait
from tests.commands import ROOT
from tests.servers.broker import Broker, Listener

EVENT = Event("alert", "new", "gate", "0", 1_790_000_000.0, rule_id="person", verdict="confirmed", score=0.9)
PERSON = Rule("person", "Is a person in view?")


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Broker]:
    made = Broker(tmp_path).start()
    yield made
    made.stop()


@pytest.fixture
def listener(broker: Broker) -> Iterator[Listener]:
    made = Listener(broker.port)
    yield made
    made.close()


def sink_for(broker: Broker, **options: Any) -> MqttSink:
    sink = MqttSink("127.0.0.1", broker.port, **options)
    sink._client.reconnect_delay_set(1, 1)
    return sink


def test_topics(broker: Broker, listener: Listener) -> None:
    sink = sink_for(broker)
    said = [
        replace(EVENT, id="1", type="status", state="connecting"),
        replace(EVENT, id="2", type="status", state="online"),
        replace(EVENT, id="3"),
        replace(EVENT, id="4", type="description", text="a gate, shut — ü"),
        replace(EVENT, id="5", phase="update"),
        replace(EVENT, id="6", phase="end", verdict="rejected"),
        replace(EVENT, id="7", type="error", reason="no memory"),
        replace(EVENT, id="8", type="status", state="disabled"),
    ]
    for event in said:
        sink(event)
    sink.close(30)
    wait(lambda: listener.on("dycoke/available") == ["online", "stopped"])
    assert [json.loads(text) for text in listener.on("dycoke/events")] == [event.to_dict() for event in said]
    assert listener.on("dycoke/gate/status") == ["offline", "online", "disabled"]
    assert listener.on("dycoke/gate/enabled/state") == ["ON", "ON", "OFF"]
    assert listener.on("dycoke/gate/rule/person") == ["ON", "ON", "OFF"]
    assert listener.on("dycoke/gate/description") == ["a gate, shut — ü"]
    assert sink.status() | {"delivered": 8, "dropped": 0, "queued": 0} == sink.status()


def test_what_is_retained_greets_who_comes_later(broker: Broker, listener: Listener) -> None:
    sink = sink_for(broker, prefix="home/cams")
    sink(replace(EVENT, type="status", state="online"))
    sink(EVENT)
    assert sink.flush(30)
    wait(lambda: listener.on("home/cams/gate/rule/person"))
    late = Listener(broker.port)
    expected = {
        "home/cams/available": "online",
        "home/cams/gate/status": "online",
        "home/cams/gate/enabled/state": "ON",
        "home/cams/gate/rule/person": "ON",
    }
    wait(lambda: late.retained == expected)
    late.close()
    sink.close(30)


def test_the_last_will_speaks_for_who_was_killed(broker: Broker, listener: Listener) -> None:
    code = (
        "import sys, time; from tests.test_mqtt import EVENT, MqttSink\n"
        "sink = MqttSink('127.0.0.1', int(sys.argv[1])); sink(EVENT); sink.flush(30); print('on', flush=True)\n"
        "time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(broker.port)], cwd=ROOT, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None and process.stdout.readline() == b"on\n"
        process.kill()
        wait(lambda: listener.on("dycoke/available") == ["online", "offline"])
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("qos", [0, 1])
def test_a_broker_that_was_away_gets_every_event(broker: Broker, listener: Listener, qos: int) -> None:
    sink = sink_for(broker, qos=qos)
    sink(replace(EVENT, id="before"))
    assert sink.flush(30)
    broker.stop()
    wait(lambda: not sink._online)
    for i in range(20):
        sink(replace(EVENT, id=f"away{i:02}"))
    assert sink.status()["queued"] == 20 and "no connection" in str(sink.status()["error"])
    broker.start()
    wait(lambda: listener.connected == 2)
    sink(replace(EVENT, id="after"))
    assert sink.flush(60)
    wait(lambda: any('"after"' in text for text in listener.on("dycoke/events")))
    heard = [json.loads(text)["id"] for text in listener.on("dycoke/events")]
    missed = {f"away{i:02}" for i in range(20)} - set(heard)
    # The listener reconnects at its own time, so it may come after the first ones went out; the sink sent them all.
    assert heard == sorted(set(heard), key=heard.index) and heard[-1] == "after" and len(missed) < 20
    assert (sink.delivered, sink.dropped) == (22, 0)
    sink.close(30)


def test_a_broker_away_for_long_costs_only_the_oldest_events(tmp_path: Path) -> None:
    broker = Broker(tmp_path)
    sink = sink_for(broker, capacity=100, qos=1)
    for i in range(1000):
        sink(replace(EVENT, id=f"{i:04}"))
    assert sink.status()["queued"] <= 101 and sink.dropped >= 899
    broker.start()
    listener = Listener(broker.port)
    assert sink.flush(60)
    sink.close(30)
    assert sink.delivered + sink.dropped == 1000 and sink.delivered >= 100
    wait(lambda: listener.on("dycoke/available")[-1:] == ["stopped"])
    listener.close()
    broker.stop()


def test_close_without_a_broker_counts_what_is_lost(tmp_path: Path) -> None:
    sink = sink_for(Broker(tmp_path))
    for i in range(5):
        sink(replace(EVENT, id=str(i)))
    sink.close(10)
    assert (sink.delivered, sink.dropped) == (0, 5)


def test_a_wrong_password_is_said_and_not_shown(tmp_path: Path) -> None:
    broker = Broker(tmp_path, login=("cams", "right")).start()
    wrong = sink_for(broker, username="cams", password="hunter2")
    right = sink_for(broker, username="cams", password="right")
    for sink in (wrong, right):
        sink(EVENT)
    assert right.flush(30) and not wrong.flush(0.0)
    wait(lambda: "Not authorized" in str(wrong.status()["error"]))
    assert "hunter2" not in str(wrong.status())
    wrong.close(10)
    right.close(10)
    broker.stop()


def test_cameras_are_switched_and_shown_over_mqtt(broker: Broker, listener: Listener) -> None:
    llm = FakeLLM()
    llm.yes = lambda prompt, times: 0.9
    sink = sink_for(broker, discovery="homeassistant")
    camera = Camera("gate", "rtsp://admin:hunter2@cam/1", prompt="What?")
    with by_hand(llm, camera, rules=[PERSON], on_event=sink) as (made, readers):
        wait(lambda: listener.retained.get("dycoke/gate/status") == "online")
        wait(lambda: listener.retained.get("dycoke/gate/rule/person") == "OFF")
        readers["gate"].fps = 1
        drive(made, llm.clock, 20)
        wait(lambda: listener.retained.get("dycoke/gate/rule/person") == "ON")
        listener.say("dycoke/gate/enabled/set", "OFF")
        wait(lambda: listener.retained.get("dycoke/gate/enabled/state") == "OFF")
        wait(lambda: listener.retained.get("dycoke/gate/rule/person") == "OFF")
        assert listener.retained["dycoke/gate/status"] == "disabled"
        for nonsense in ("maybe", "", "ON" * 1000):
            listener.say("dycoke/gate/enabled/set", nonsense)
        listener.say("dycoke/no_such_camera/enabled/set", "OFF")
        wait(lambda: sink.failures)
        assert "there is no camera no_such_camera" in str(sink.error)
        listener.say("dycoke/gate/enabled/set", "ON")
        wait(lambda: listener.retained.get("dycoke/gate/enabled/state") == "ON")
        assert made.status()["cameras"]["gate"]["state"] == "online"
    wait(lambda: listener.retained.get("dycoke/available") == "stopped")
    assert listener.retained["dycoke/gate/status"] == "offline"
    assert not any("hunter2" in payload for _, payload in listener.heard)
    configs = {t: json.loads(p) for t, p in listener.retained.items() if t.startswith("homeassistant/")}
    assert set(configs) == {
        "homeassistant/switch/dycoke_gate/enabled/config",
        "homeassistant/binary_sensor/dycoke_gate/status/config",
        "homeassistant/sensor/dycoke_gate/description/config",
        "homeassistant/binary_sensor/dycoke_gate/rule_person/config",
    }
    rule = configs["homeassistant/binary_sensor/dycoke_gate/rule_person/config"]
    assert rule["state_topic"] == "dycoke/gate/rule/person" and rule["availability_topic"] == "dycoke/available"
    assert len({config["unique_id"] for config in configs.values()}) == 4
    topics = {value for config in configs.values() for key, value in config.items() if key == "state_topic"}
    assert topics <= set(listener.retained)


def test_a_retained_command_switches_nothing(broker: Broker, listener: Listener) -> None:
    """Neither at the start nor after a reconnect; what is said while it listens counts, retained or not."""
    llm = FakeLLM()
    listener.say("dycoke/gate/enabled/set", "OFF", retain=True)
    wait(lambda: listener.on("dycoke/gate/enabled/set"))
    sink = sink_for(broker)
    with by_hand(llm, Camera("gate", "rtsp://x"), on_event=sink) as (made, readers):
        wait(lambda: sink.status()["ignored"] == 1)
        wait(lambda: listener.retained.get("dycoke/gate/enabled/state") == "ON")
        for wanted, retain in (("OFF", False), ("ON", False), ("OFF", True), ("ON", False)):
            listener.say("dycoke/gate/enabled/set", wanted, retain)
            wait(lambda: listener.retained.get("dycoke/gate/enabled/state") == wanted)  # noqa: B023
            wait(lambda: readers["gate"].on == (wanted == "ON"))  # noqa: B023
        sink._client.reconnect()
        wait(lambda: sink.status()["ignored"] == 2)
        assert made.status()["cameras"]["gate"]["state"] == "online" and readers["gate"].on
        states = listener.on("dycoke/gate/enabled/state")
        assert [state for state, before in zip(states, ["", *states], strict=False) if state != before] == [
            *("ON", "OFF", "ON", "OFF", "ON")
        ]
    assert sink.failures == 0


class Slow:
    """A watcher whose cameras are let go and taken up when the test says so."""

    def __init__(self) -> None:
        self.calls, self.there, self.go = list[str](), Semaphore(0), Semaphore(0)

    def status(self) -> dict[str, Any]:
        return {"cameras": {}}

    def pause(self, camera_id: str) -> None:
        self._call(f"{camera_id} off")

    def resume(self, camera_id: str) -> None:
        self._call(f"{camera_id} on")

    def _call(self, name: str) -> None:
        self.calls.append(name)
        self.there.release()
        assert self.go.acquire(timeout=60)


def test_commands_are_carried_out_one_by_one_and_the_newest_counts() -> None:
    sink, slow = MqttSink("127.0.0.1"), Slow()
    sink._controls = slow

    def say(camera: str, wanted: bytes) -> None:
        sink._commanded(None, None, SimpleNamespace(topic=f"dycoke/{camera}/enabled/set", payload=wanted, retain=False))

    say("gate", b"OFF")
    assert slow.there.acquire(timeout=60)
    for wanted in (b"ON", b"OFF", b"ON", b"OFF", b"ON"):  # while the first is being carried out
        say("gate", wanted)
    say("door", b"OFF")  # another camera waits for nobody
    assert slow.there.acquire(timeout=60) and slow.calls == ["gate off", "door off"]
    slow.go.release(2)
    assert slow.there.acquire(timeout=60) and slow.calls == ["gate off", "door off", "gate on"]
    slow.go.release()
    wait(lambda: not sink._switching)
    assert len(slow.calls) == 3 and not sink._wishes
    say("gate", b"OFF")
    assert slow.there.acquire(timeout=60) and slow.calls[-1] == "gate off"
    slow.go.release()
    wait(lambda: not sink._switching)
    sink.close(10)


@pytest.mark.parametrize("options", [{"qos": 3}, {"prefix": ""}, {"prefix": "a/#"}, {"prefix": "/a"}])
def test_settings_that_cannot_be(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(options))):
        MqttSink("127.0.0.1", **options)
