"""Alerts: what a score says, when an alert begins and ends, and that text never decides."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dycoke_edge import Camera, Rule, UsageError
from dycoke_edge.runtime.camera.rules import AlertState, Change, probability, verdict
from tests.cameras import FakeClock, FakeLLM, by_hand, drive

RULE = Rule("person", "Is a person in view?", threshold=0.6, clear_threshold=0.4, consecutive=2, cooldown_s=60)
EVERY = 4.0


def run(rule: Rule, scores: Sequence[float | None], start: float = 0.0) -> list[Change | None]:
    """One change a window, windows EVERY seconds apart."""
    ids = map(str, itertools.count())
    state = AlertState(rule, lambda: next(ids))
    return [state.window(s, start + EVERY * i, (EVERY * i - 7, EVERY * i)) for i, s in enumerate(scores)]


def phases(rule: Rule, scores: Sequence[float | None]) -> str:
    """n, u, e or . for every window."""
    return "".join(change.phase[0] if change else "." for change in run(rule, scores))


@pytest.mark.parametrize(
    ("score", "expected"),
    [
        (1.0, "confirmed"),
        (0.6, "confirmed"),
        (0.5999, "unknown"),
        (0.4, "unknown"),
        (0.3999, "rejected"),
        (0.0, "rejected"),
        (None, "unknown"),
        (math.nan, "unknown"),
        (math.inf, "unknown"),
    ],
)
def test_a_score_between_the_thresholds_says_nothing(score: float | None, expected: str) -> None:
    assert verdict(RULE, score) == expected


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ({"yes": 0.9, "no": 0.1}, 0.9),
        ({"yes": 0.2, "no": 0.2}, 0.5),
        ({"yes": 0.0, "no": 0.0}, None),
        ({"yes": math.nan, "no": 0.1}, None),
        ({}, None),
    ],
)
def test_a_probability_is_yes_among_yes_and_no(scores: dict[str, float], expected: float | None) -> None:
    assert probability(scores) == expected


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([0.9], "."),  # once is not enough
        ([0.9, 0.9], ".n"),
        ([0.9, 0.5, 0.9], "..."),  # not in a row
        ([0.9, None, 0.9], "..."),
        ([0.9, 0.9, 0.5, 0.5, 0.5], ".n..."),  # neither confirmed nor over: it stays open
        ([0.9, 0.9, 0.1, 0.5, 0.1], ".n..."),
        ([0.9, 0.9, 0.1, None, 0.1], ".n..."),
        ([0.9, 0.9, 0.1, 0.1], ".n.e"),
        ([0.9, 0.9, 0.1, 0.1, 0.9, 0.9], ".n.e.."),  # cooldown
        ([0.9, 0.9, 0.1, 0.1] + [0.1] * 15 + [0.9, 0.9], ".n.e" + "." * 15 + ".n"),
        ([0.9, 0.9, 0.1, 0.1] + [0.9] * 20, ".n.e" + "." * 14 + "n....."),  # at once when the cooldown is over
        ([0.9] * 17, ".n" + "." * 7 + "u" + "." * 7),
    ],
)
def test_phases(scores: Sequence[float | None], expected: str) -> None:
    assert phases(RULE, scores) == expected


def test_five_minutes_of_one_thing_are_one_alert() -> None:
    changes = [change for change in run(RULE, [0.1] * 3 + [0.9] * 75 + [0.1] * 20) if change]
    assert [change.phase for change in changes] == ["new"] + ["update"] * 9 + ["end"]
    assert {change.alert_id for change in changes} == {"0"}
    assert {change.start_time for change in changes} == {EVERY * 3 - 7}
    assert changes[-1].end_time == EVERY * 79 and changes[-1].verdict == "rejected"


def test_flicker_around_a_threshold_is_one_alert() -> None:
    assert phases(RULE, [0.9, 0.9] + [0.55, 0.65] * 50).replace(".", "").strip("u") == "n"


def test_an_alert_that_is_closed_says_that_nothing_is_known() -> None:
    state = AlertState(RULE, lambda: "id")
    for i in range(2):
        state.window(0.9, EVERY * i, (0, EVERY * i))
    change = state.close(8.0, 5.0, "paused")
    assert change and (change.phase, change.verdict, change.reason, change.end_time) == (
        "end",
        "unknown",
        "paused",
        5.0,
    )
    assert state.close(8.0, 5.0, "paused") is None and not state.on


SCORES = st.lists(st.one_of(st.none(), st.floats(0, 1)), max_size=80)


@given(SCORES, st.integers(1, 4), st.floats(0, 100), st.floats(0, 1), st.floats(0, 1))
def test_whatever_comes_phases_alternate_and_cooldown_holds(
    scores: Sequence[float | None], consecutive: int, cooldown: float, one: float, other: float
) -> None:
    low, high = sorted((one, other))
    rule = Rule("r", "?", threshold=high, clear_threshold=low, consecutive=consecutive, cooldown_s=cooldown)
    open_id, ended = None, -math.inf
    for i, change in enumerate(run(rule, scores)):
        if change is None:
            continue
        if change.phase == "new":
            assert open_id is None and EVERY * i - ended >= cooldown
            assert all(verdict(rule, s) == "confirmed" for s in scores[i - consecutive + 1 : i + 1])
            open_id = change.alert_id
        else:
            assert change.alert_id == open_id
            assert change.end_time is None or change.end_time >= change.start_time
        if change.phase == "end":
            open_id, ended = None, EVERY * i


# What the model would say does not matter


@pytest.mark.parametrize(
    "said",
    [
        "Yes.",
        "yes, but no person is there",
        "No",
        "",
        "true",
        '```json\n{"answer": "yes"}\n```',
        "I cannot help",
        "答案",
    ],
)
@pytest.mark.parametrize(("yes", "expected"), [(0.9, "confirmed"), (0.1, None)])
def test_an_alert_goes_by_probabilities_never_by_text(said: str, yes: float, expected: str | None) -> None:
    clock = FakeClock()
    llm = FakeLLM(clock)
    llm.words, llm.yes = (said,), lambda prompt, times: yes
    with by_hand(llm, Camera("gate", "rtsp://x", prompt="What?"), rules=[RULE]) as (made, readers):
        readers["gate"].fps = 1
        drive(made, clock, 20)
        alerts = [event for event in made.events.since() if event.type == "alert"]
        assert [event.verdict for event in alerts] == ([expected] if expected else [])
        assert all(event.text == "" for event in alerts)
        assert {event.text for event in made.events.since() if event.type == "description"} == {said}


# Mistakes


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"id": "no spaces"}, "rule id 'no spaces'"),
        ({"id": ""}, "rule id ''"),
        ({"id": "ü"}, "rule id 'ü'"),
        ({"prompt": "  "}, "rule r has no question"),
        ({"threshold": 1.5}, "threshold=1.5 (--threshold) must be between 0 and 1"),
        ({"threshold": "high"}, "threshold='high' (--threshold) must be a number"),
        ({"clear_threshold": 0.7}, "clear_threshold=0.7 (--clear-threshold) of rule r is above threshold=0.6"),
        ({"consecutive": 0}, "consecutive=0 (--consecutive) must be between 1 and 1000"),
        ({"cooldown_s": -1}, "cooldown_s=-1 (--cooldown-s) must be between 0 and 86400"),
        ({"severity": "loud"}, "severity='loud' (--severity) must be one of info, warning, critical"),
    ],
)
def test_a_rule_that_cannot_be(options: dict[str, object], names: str) -> None:
    with pytest.raises(UsageError) as caught:
        Rule(**{"id": "r", "prompt": "Is it?", **options})  # type: ignore[arg-type]
    assert names in str(caught.value) and "\n" not in str(caught.value)
