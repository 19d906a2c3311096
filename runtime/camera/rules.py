"""From scores to alerts: threshold, hysteresis, windows in a row, cooldown. Knows no camera, no model, no clock."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from dycoke_edge.config_camera import Rule
from dycoke_edge.runtime.camera.events import Phase, Verdict


@dataclass(frozen=True)
class Change:
    """What one window did to an alert, for its event. Times are UTC."""

    phase: Phase
    alert_id: str
    verdict: Verdict
    score: float | None
    start_time: float
    end_time: float | None = None
    reason: str | None = None


def probability(scores: dict[str, float]) -> float | None:
    """The probability of yes among yes and no; None where the model gave neither one."""
    yes, no = scores.get("yes", math.nan), scores.get("no", math.nan)
    if not (math.isfinite(yes) and math.isfinite(no) and yes + no > 0):
        return None
    return yes / (yes + no)


def verdict(rule: Rule, score: float | None) -> Verdict:
    """What a probability of yes says. Between the two thresholds, and without a score, nothing is known."""
    if score is None or not math.isfinite(score):
        return "unknown"
    if score >= rule.threshold:
        return "confirmed"
    return "rejected" if score < rule.clear_threshold else "unknown"


class AlertState:
    """One rule on one camera."""

    def __init__(self, rule: Rule, new_id: Callable[[], str]) -> None:
        self.rule = rule
        self.score: float | None = None
        self.verdict: Verdict | None = None
        self.suppressed = 0  # windows that would have begun an alert during the cooldown
        self._new_id = new_id
        self._alert_id: str | None = None
        self._since = 0.0  # UTC of the first of the windows in a row
        self._streak = 0  # windows in a row that speak for a change: for an alert when there is none, else against it
        self._updated = 0.0
        self._quiet_until = -math.inf

    @property
    def on(self) -> bool:
        """An alert is open."""
        return self._alert_id is not None

    @property
    def since(self) -> float | None:
        """UTC of an open alert's beginning."""
        return self._since if self.on else None

    def window(self, score: float | None, time: float, utc: tuple[float, float]) -> Change | None:
        """Take in a window: its score, when it was in the stream's own seconds, its first and last frame in UTC."""
        self.score, self.verdict = score, verdict(self.rule, score)
        return self._open(time, utc) if self._alert_id is None else self._go_on(self._alert_id, time, utc)

    def close(self, time: float, utc: float, reason: str) -> Change | None:
        """End an open alert because nothing more is known about it."""
        if self._alert_id is None:
            self._streak = 0
            return None
        return self._end(self._alert_id, time, utc, "unknown", reason)

    def _open(self, time: float, utc: tuple[float, float]) -> Change | None:
        if self.verdict != "confirmed":
            self._streak = 0
            return None
        if self._streak == 0:
            self._since = utc[0]
        self._streak += 1
        if self._streak < self.rule.consecutive:
            return None
        if time < self._quiet_until:
            self.suppressed += 1
            return None
        self._alert_id, self._streak, self._updated = self._new_id(), 0, time
        return Change("new", self._alert_id, "confirmed", self.score, self._since)

    def _go_on(self, alert_id: str, time: float, utc: tuple[float, float]) -> Change | None:
        self._streak = self._streak + 1 if self.verdict == "rejected" else 0
        if self._streak >= self.rule.consecutive:
            return self._end(alert_id, time, utc[1], "rejected", None)
        if time - self._updated < self.rule.update_s:
            return None
        self._updated = time
        return Change("update", alert_id, self.verdict or "unknown", self.score, self._since)

    def _end(self, alert_id: str, time: float, utc: float, said: Verdict, reason: str | None) -> Change:
        self._alert_id, self._streak, self._quiet_until = None, 0, time + self.rule.cooldown_s
        return Change("end", alert_id, said, self.score, self._since, max(utc, self._since), reason)
