"""The alerts of one camera: a state a rule, and an event for every change. Safe for any thread."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

from dycoke_edge.config_camera import Rule
from dycoke_edge.runtime.camera.events import TimeSource
from dycoke_edge.runtime.camera.hub import Hub
from dycoke_edge.runtime.camera.look import Look
from dycoke_edge.runtime.camera.rules import AlertState, Change, Finding


class Alerts:
    """Whoever ends them (a stop, a pause) and whoever scores them (the model thread) never mix up an alert's order."""

    def __init__(self, camera: str, hub: Hub, rules: Callable[[], Sequence[Rule]]) -> None:
        self._camera, self._hub, self._rules = camera, hub, rules
        self._states: dict[str, AlertState] = {}
        self._time = self._utc = 0.0  # of the newest window, in the stream's own seconds and in UTC
        self._time_source: TimeSource = "receive"
        self._lock = threading.Lock()
        self._closed = False

    def window(self, rule: Rule, found: Finding, look: Look, time_source: TimeSource) -> None:
        """Take in what a rule found in a window, and report what it changed; nothing of a rule that was removed while
        it was scored."""
        with self._lock:
            if self._closed or rule not in self._rules():
                return
            state = self._states.get(rule.id)
            if state is None or state.rule != rule:
                self._states[rule.id] = state = AlertState(rule, self._hub.new_id)
            self._time, self._utc, self._time_source = look.end, look.window[1], time_source
            change = state.window(found, look.end, look.window)
            if change is not None:
                fields = {
                    "frames": look.frames,
                    "vision_tokens_in": look.tokens_in,
                    "vision_tokens_kept": look.tokens_kept,
                    "latency_ms": dict(look.latency_ms),
                    "dropped_windows": look.dropped,
                }
                self._report(rule, change, fields)

    def close(self, reason: str, rule_id: str | None = None, shut: bool = False) -> None:
        """End what is open, of one rule or of all. `shut`: and let nothing begin before `open`."""
        with self._lock:
            self._closed = self._closed or shut
            for state in list(self._states.values()):
                if rule_id in (None, state.rule.id):
                    change = state.close(self._time, self._utc, reason)
                    if change is not None:
                        self._report(state.rule, change, {})
            if rule_id is not None:
                self._states.pop(rule_id, None)

    def open(self) -> None:
        """Let alerts begin again."""
        with self._lock:
            self._closed = False

    @property
    def any_open(self) -> bool:
        """An alert is open."""
        return any(state.on for state in list(self._states.values()))

    def status(self) -> dict[str, dict[str, Any]]:
        """By rule, of those that hold now, asked already or not."""
        return {rule.id: _status(self._states.get(rule.id) or AlertState(rule, str)) for rule in self._rules()}

    def _report(self, rule: Rule, change: Change, fields: dict[str, Any]) -> None:
        self._hub.emit(
            "alert",
            change.phase,
            self._camera,
            alert_id=change.alert_id,
            rule_id=rule.id,
            alert_type=rule.alert_type,
            severity=rule.severity,
            verdict=change.found.verdict,
            score=change.found.score,
            mass=change.found.mass,
            start_time=change.start_time,
            end_time=change.end_time,
            time_source=self._time_source,
            reason=change.found.reason,
            **fields,
        )


def _status(state: AlertState) -> dict[str, Any]:
    found = state.found
    return {
        "on": state.on,
        "score": found.score if found else None,
        "mass": found.mass if found else None,
        "verdict": found.verdict if found else None,
        "reason": found.reason if found else None,
        "since": state.since,
        "suppressed": state.suppressed,
        "unknown": dict(state.unknown),
    }
