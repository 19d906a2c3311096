"""From scores to alerts: threshold, hysteresis, windows in a row, cooldown. Knows no camera, no model, no clock."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from dycoke_edge.config_camera import Rule
from dycoke_edge.runtime.camera.events import Phase, Verdict
from dycoke_edge.runtime.scores import Scores

Unknown = Literal["between", "mass", "failed"]  # the two thresholds; neither yes nor no; the model raised something


@dataclass(frozen=True)
class Finding:
    """What a rule found in one window. `score` is the probability of yes among yes and no, None where it says nothing;
    `mass` that of yes and no together. Of an unknown verdict, `unknown` says why in a word, `reason` in a line."""

    verdict: Verdict
    score: float | None = None
    mass: float | None = None
    unknown: Unknown | None = None
    reason: str | None = None


def judge(rule: Rule, scores: Scores) -> Finding:
    """What scores of yes and no say. Nothing between the two thresholds, nor where the model would say neither."""
    yes, mass = scores["yes"], scores.mass
    if not (math.isfinite(yes) and math.isfinite(mass)):
        return Finding("unknown", unknown="failed", reason="the model computed no number")
    if mass < rule.min_mass:
        reason = f"the model says neither yes nor no: both together have {mass:.2g}, below min_mass={rule.min_mass:g}"
        return Finding("unknown", None, mass, "mass", reason)
    if yes >= rule.threshold:
        return Finding("confirmed", yes, mass)
    if yes < rule.clear_threshold:
        return Finding("rejected", yes, mass)
    reason = f"{yes:.2f} is between clear_threshold={rule.clear_threshold:g} and threshold={rule.threshold:g}"
    return Finding("unknown", yes, mass, "between", reason)


@dataclass(frozen=True)
class Change:
    """What one window did to an alert, for its event. Times are UTC."""

    phase: Phase
    alert_id: str
    found: Finding
    start_time: float
    end_time: float | None = None


class AlertState:
    """One rule on one camera."""

    def __init__(self, rule: Rule, new_id: Callable[[], str]) -> None:
        self.rule = rule
        self.found: Finding | None = None  # in the newest window
        self.unknown = Counter[Unknown]()  # windows that said nothing, by why
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

    def window(self, found: Finding, time: float, utc: tuple[float, float]) -> Change | None:
        """Take in what was found in a window, when that was in the stream's own seconds, and its first and last frame
        in UTC."""
        self.found = found
        if found.unknown is not None:
            self.unknown[found.unknown] += 1
        if self._alert_id is None:
            return self._open(found, time, utc)
        return self._go_on(self._alert_id, found, time, utc)

    def close(self, time: float, utc: float, reason: str) -> Change | None:
        """End an open alert because nothing more is known about it."""
        if self._alert_id is None:
            self._streak = 0
            return None
        score, mass = (self.found.score, self.found.mass) if self.found else (None, None)
        return self._end(self._alert_id, Finding("unknown", score, mass, reason=reason), time, utc)

    def _open(self, found: Finding, time: float, utc: tuple[float, float]) -> Change | None:
        if found.verdict != "confirmed":
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
        return Change("new", self._alert_id, found, self._since)

    def _go_on(self, alert_id: str, found: Finding, time: float, utc: tuple[float, float]) -> Change | None:
        self._streak = self._streak + 1 if found.verdict == "rejected" else 0
        if self._streak >= self.rule.consecutive:
            return self._end(alert_id, found, time, utc[1])
        if time - self._updated < self.rule.update_s:
            return None
        self._updated = time
        return Change("update", alert_id, found, self._since)

    def _end(self, alert_id: str, found: Finding, time: float, utc: float) -> Change:
        self._alert_id, self._streak, self._quiet_until = None, 0, time + self.rule.cooldown_s
        return Change("end", alert_id, found, self._since, max(utc, self._since))
