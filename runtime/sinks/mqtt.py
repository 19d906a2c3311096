"""Events over MQTT, with topics as Frigate has them, and a switch for every camera."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any, Protocol

from dycoke_edge.errors import UsageError
from dycoke_edge.runtime.camera.events import Event
from dycoke_edge.runtime.camera.redact import redact
from dycoke_edge.runtime.sinks import discovery as home_assistant
from dycoke_edge.runtime.sinks.bounded import FOR_EVER, BoundedSink, Transient

LAST_WAIT_S = 1.0  # for a connection, when closing
WAIT_S = 5.0  # for a connection, before a failure is counted


class Controls(Protocol):
    """What a sink needs of a CameraWatcher to say and switch what its cameras do."""

    def status(self) -> dict[str, Any]: ...

    def pause(self, camera_id: str) -> None: ...

    def resume(self, camera_id: str) -> None: ...


class MqttSink(BoundedSink):
    """Publishes below `prefix`:

    available               online, stopped, or offline as the last will; retained
    events                  every event as JSON
    <camera>/status         online, offline, disabled; retained
    <camera>/description    what the camera's prompt was answered
    <camera>/rule/<id>      ON while an alert is open, else OFF; retained
    <camera>/enabled/state  ON or OFF; retained. <camera>/enabled/set takes the same; of many at once the newest counts.
                            One that the broker retained is ignored: a command is for now, and after a restart or a lost
                            connection an old one would switch a camera off again that was switched on since.

    Reconnects for ever; what is retained is published anew after each time. With `discovery`, e.g. "homeassistant",
    Home Assistant finds all of it by itself.
    """

    def __init__(
        self,
        host: str,
        port: int = 1883,
        username: str | None = None,
        password: str | None = None,
        tls: bool = False,
        ca_certs: str | None = None,
        prefix: str = "dycoke",
        discovery: str | None = None,
        qos: int = 0,
        client_id: str = "",
        capacity: int = 1000,
    ) -> None:
        try:
            from paho.mqtt import client as mqtt
            from paho.mqtt.enums import CallbackAPIVersion
        except ImportError:
            raise UsageError("MQTT needs paho-mqtt: pip install 'dycoke-edge[serve]'") from None
        if qos not in (0, 1, 2):
            raise UsageError(f"qos={qos} must be 0, 1 or 2, e.g. qos=0")
        if not prefix or set(prefix) & set("+#") or prefix.startswith("/") or prefix.endswith("/"):
            raise UsageError(f"prefix={prefix!r} must be a topic without + and #, e.g. prefix='dycoke'")
        super().__init__(f"mqtt {host}", capacity, FOR_EVER, backoff=(0.1, 1.0))
        self._prefix, self._discovery, self._qos = prefix, discovery, qos
        self._controls: Controls | None = None
        self.ignored = 0  # commands that the broker had retained
        self._wishes = dict[str, bool]()  # by camera, the newest that was not carried out yet
        self._switching = set[str]()  # cameras that a thread is at
        self._online = self._gave_up = False
        self._why = "no connection to the broker"
        self._client = mqtt.Client(CallbackAPIVersion.VERSION2, client_id=client_id)
        self._client.username_pw_set(username, password)
        if tls:
            self._client.tls_set(ca_certs)
        self._client.will_set(f"{prefix}/available", "offline", retain=True)
        self._client.reconnect_delay_set(1, 60)
        self._client.on_connect = self._connected
        self._client.on_disconnect = self._disconnected
        self._client.on_message = self._commanded
        self._client.connect_async(host, port, keepalive=30)

    def status(self) -> dict[str, Any]:
        """As every sink's, and `ignored`: commands that were retained."""
        return super().status() | {"ignored": self.ignored}

    def bind(self, controls: Controls) -> None:
        """Let MQTT show and switch the cameras of a watcher; it calls this when it starts."""
        with self._changed:
            self._controls, self._errand = controls, self._say_all
            self._start()
            self._changed.notify_all()

    def deliver(self, event: Event) -> None:
        """Publish one event and what it changes; Transient without a connection."""
        with self._changed:
            self._changed.wait_for(lambda: self._online or self._closing, WAIT_S)
            if not self._online and not self._gave_up:  # closing: a connection may just be on its way
                self._gave_up = not self._changed.wait_for(lambda: self._online, LAST_WAIT_S) and self._closing
            if not self._online:
                raise Transient(self._why, 0.0)
        self._run_errand()
        for topic, payload, retained in self._messages(event):
            self._publish(topic, payload, retained)

    def finish(self) -> None:
        """Say that this end is meant, and leave."""
        if self._online:
            self._client.publish(f"{self._prefix}/available", "stopped", retain=True).wait_for_publish(1.0)
        self._online = False  # so that leaving is no failure
        self._client.disconnect()
        self._client.loop_stop()

    def _start(self) -> None:
        if self._thread is None:
            self._client.loop_start()
        super()._start()

    def _messages(self, event: Event) -> list[tuple[str, str, bool]]:
        messages = [(f"{self._prefix}/events", event.to_json(), False)]
        camera = f"{self._prefix}/{event.camera}"
        if event.type == "status":
            messages += self._states(event.camera, event.state or "")
        elif event.type == "description":
            messages.append((f"{camera}/description", event.text, False))
        elif event.type == "alert":
            messages.append((f"{camera}/rule/{event.rule_id}", "OFF" if event.phase == "end" else "ON", True))
        return messages

    def _states(self, camera: str, state: str) -> list[tuple[str, str, bool]]:
        base = f"{self._prefix}/{camera}"
        shown = state if state in ("online", "disabled") else "offline"
        enabled = "OFF" if state == "disabled" else "ON"
        return [(f"{base}/status", shown, True), (f"{base}/enabled/state", enabled, True)]

    def _publish(self, topic: str, payload: str, retained: bool) -> None:
        """Publish and wait until it is out, so that nothing piles up behind paho's back."""
        info = self._client.publish(topic, payload, self._qos, retained)
        while info.rc == 0 and not info.is_published():
            if self._closing and not self._online:
                raise Transient("the broker went away")
            if self._qos == 0 and not self._online:  # paho sends the others again by itself
                raise Transient("the broker went away", 0.0)
            info.wait_for_publish(0.2)
        if info.rc != 0:
            raise Transient(f"not published (paho error {int(info.rc)})")

    def _say_all(self) -> None:
        """Everything that is retained, as it is now; in the sink's thread, so that no event is overtaken."""
        if self._controls is None or not self._online:
            return
        say = self._client.publish
        cameras: Mapping[str, Mapping[str, Any]] = self._controls.status()["cameras"]
        for camera, status in cameras.items():
            for topic, payload, _ in self._states(camera, status["state"]):
                say(topic, payload, retain=True)
            for rule, alert in status["alerts"].items():
                say(f"{self._prefix}/{camera}/rule/{rule}", "ON" if alert["on"] else "OFF", retain=True)
        if self._discovery:
            rules = {camera: list(status["alerts"]) for camera, status in cameras.items()}
            for topic, payload in home_assistant.messages(self._prefix, self._discovery, rules):
                say(topic, payload, retain=True)

    def _connected(self, client: Any, data: Any, flags: Any, reason: Any, properties: Any) -> None:
        if reason.is_failure:
            self._why = self.error = f"the broker refused: {reason}"
            return
        client.subscribe(f"{self._prefix}/+/enabled/set")
        client.publish(f"{self._prefix}/available", "online", retain=True)
        with self._changed:
            self._online, self.error, self._errand = True, None, self._say_all
            self._changed.notify_all()

    def _disconnected(self, client: Any, data: Any, flags: Any, reason: Any, properties: Any) -> None:
        with self._changed:
            if self._online:
                self._why = self.error = f"no connection to the broker: {reason}"
            self._online = False
            self._changed.notify_all()

    def _commanded(self, client: Any, data: Any, message: Any) -> None:
        """enabled/set: in a thread of the camera's own, for letting it go may take a while."""
        camera = message.topic[len(self._prefix) + 1 :].split("/")[0]
        wanted = bytes(message.payload).strip().upper()
        if self._controls is None or wanted not in (b"ON", b"OFF"):
            return
        if message.retain:
            self.ignored += 1
            self.error = f"{message.topic} is retained by the broker, and was ignored; publish commands without retain"
            return
        with self._changed:
            self._wishes[camera] = wanted == b"ON"
            if camera in self._switching:
                return
            self._switching.add(camera)
        threading.Thread(target=self._switch, args=(self._controls, camera), daemon=True).start()

    def _switch(self, controls: Controls, camera: str) -> None:
        """Do what is wished for a camera until nothing new was, one after the other."""
        while True:
            with self._changed:
                if camera not in self._wishes:
                    self._switching.discard(camera)
                    return
                on = self._wishes.pop(camera)
            try:
                (controls.resume if on else controls.pause)(camera)
            except Exception as error:  # e.g. a camera that was removed; the next wish is carried out all the same
                self.failures += 1
                self.error = redact(str(error))
