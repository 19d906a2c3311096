"""Home Assistant's MQTT discovery: what it must be told so that cameras and rules appear there by themselves."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping

Message = tuple[str, str]  # topic, payload; both to be retained


def messages(prefix: str, discovery: str, rules: Mapping[str, Iterable[str]]) -> Iterator[Message]:
    """The entities of every camera: a switch, its connection, what was last described, and one for each rule.

    `prefix` is where our own topics begin, `discovery` where Home Assistant looks, `rules` the rule ids by camera id.
    """
    for camera, ids in rules.items():
        base = f"{prefix}/{camera}"
        yield _entity(
            prefix,
            discovery,
            camera,
            "switch",
            "enabled",
            name="Enabled",
            state_topic=f"{base}/enabled/state",
            command_topic=f"{base}/enabled/set",
        )
        yield _entity(
            prefix,
            discovery,
            camera,
            "binary_sensor",
            "status",
            name="Connection",
            device_class="connectivity",
            state_topic=f"{base}/status",
            payload_on="online",
            payload_off="offline",
        )
        yield _entity(
            prefix,
            discovery,
            camera,
            "sensor",
            "description",
            name="Description",
            state_topic=f"{base}/description",
            value_template="{{ value[:255] }}",
        )
        for rule in ids:
            yield _entity(
                prefix,
                discovery,
                camera,
                "binary_sensor",
                f"rule_{rule}",
                name=rule,
                state_topic=f"{base}/rule/{rule}",
            )


def _entity(prefix: str, discovery: str, camera: str, component: str, key: str, **config: str) -> Message:
    unique = f"{prefix}_{camera}_{key}".replace("/", "_")
    node = f"{prefix}_{camera}".replace("/", "_")
    whole = {
        "unique_id": unique,
        "availability_topic": f"{prefix}/available",
        "device": {"identifiers": [node], "name": camera, "manufacturer": "dycoke-edge"},
        **config,
    }
    return f"{discovery}/{component}/{node}/{key}/config", json.dumps(whole)
