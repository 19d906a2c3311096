"""A real MQTT broker (Debian's mosquitto) that tests start and stop, and a client that remembers what it heard."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from paho.mqtt import client as mqtt
from paho.mqtt.enums import CallbackAPIVersion

from tests.cameras import wait

MOSQUITTO = shutil.which("mosquitto") or "/usr/sbin/mosquitto"


def require_mosquitto() -> None:
    """Skips a test where the broker is not installed; with CI=true it fails."""
    if not Path(MOSQUITTO).exists():
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)("no mosquitto: make services")


class Broker:
    """On a port of its own on loopback; `login` is a user and a password that it then insists on."""

    def __init__(self, folder: Path, login: tuple[str, str] | None = None) -> None:
        require_mosquitto()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = int(free.getsockname()[1])
        self._config = folder / "mosquitto.conf"
        text = f"listener {self.port} 127.0.0.1\nallow_anonymous {'false' if login else 'true'}\n"
        if login:
            passwords = folder / "passwords"
            subprocess.run(["mosquitto_passwd", "-b", "-c", passwords, *login], check=True, timeout=30)
            passwords.chmod(0o644)
            text += f"password_file {passwords}\n"
        self._config.write_text(text + "user root\n" if os.getuid() == 0 else text)
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> Broker:
        """Run it, with nothing retained from before."""
        quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self._process = subprocess.Popen([MOSQUITTO, "-c", str(self._config)], **quiet)
        wait(self._listens)
        return self

    def stop(self) -> None:
        """End it at once, as a crash would."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(30)
            self._process = None

    def _listens(self) -> bool:
        assert self._process is not None and self._process.poll() is None, "mosquitto ended"
        try:
            socket.create_connection(("127.0.0.1", self.port), 1).close()
        except OSError:
            time.sleep(0.01)
            return False
        return True


class Listener:
    """Hears everything on a broker. Reconnects, so that it outlives the broker."""

    def __init__(self, port: int, login: tuple[str, str] | None = None) -> None:
        self.heard = list[tuple[str, str]]()
        self.retained = dict[str, str]()  # the newest of every topic that was retained or said while listening
        self.connected = 0
        self._client = mqtt.Client(CallbackAPIVersion.VERSION2)
        if login:
            self._client.username_pw_set(*login)
        self._client.on_connect = self._on_connect
        self._client.on_message = self._on_message
        self._client.reconnect_delay_set(1, 1)
        self._client.connect("127.0.0.1", port)
        self._client.loop_start()
        wait(lambda: self.connected)

    def on(self, topic: str) -> list[str]:
        """What was heard on a topic."""
        return [payload for where, payload in list(self.heard) if where == topic]

    def say(self, topic: str, payload: str, retain: bool = False) -> None:
        """Publish."""
        self._client.publish(topic, payload, retain=retain).wait_for_publish(30)

    def close(self) -> None:
        """Leave."""
        self._client.disconnect()
        self._client.loop_stop()

    def _on_connect(self, client: Any, data: Any, flags: Any, reason: Any, properties: Any) -> None:
        assert not reason.is_failure, reason
        client.on_subscribe = lambda *arguments: setattr(self, "connected", self.connected + 1)
        client.subscribe("#")

    def _on_message(self, client: Any, data: Any, message: Any) -> None:
        self.heard.append((message.topic, message.payload.decode()))
        self.retained[message.topic] = message.payload.decode()
