"""Alerts: what a score says, when an alert begins and ends, and that text never decides."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dycoke_edge import Camera, Rule, UsageError
from dycoke_edge.runtime.camera.rules import AlertState, Change, Finding, judge
from dycoke_edge.runtime.scores import Scores, scores
from dycoke_edge.runtime.serve.metrics import WatcherMetrics
from tests.cameras import FakeClock, FakeLLM, by_hand, drive

RULE = Rule("person", "Is a person in view?", threshold=0.6, clear_threshold=0.4, consecutive=2, cooldown_s=60)
EVERY = 4.0


def found(rule: Rule, score: float | None) -> Finding:
    """What a probability of yes says; None: the model would say neither yes nor no."""
    yes = 0.99 if score is None else score
    return judge(rule, Scores({"yes": yes, "no": 1 - yes}, 0.0016 if score is None else 1.0))


def run(rule: Rule, scores: Sequence[float | None], start: float = 0.0) -> list[Change | None]:
    """One change a window, windows EVERY seconds apart."""
    ids = map(str, itertools.count())
    state = AlertState(rule, lambda: next(ids))
    return [state.window(found(rule, s), start + EVERY * i, (EVERY * i - 7, EVERY * i)) for i, s in enumerate(scores)]


def phases(rule: Rule, scores: Sequence[float | None]) -> str:
    """n, u, e or . for every window."""
    return "".join(change.phase[0] if change else "." for change in run(rule, scores))


@pytest.mark.parametrize(
    ("yes", "mass", "verdict", "score", "unknown"),
    [
        (1.0, 1.0, "confirmed", 1.0, None),
        (0.6, 0.9, "confirmed", 0.6, None),
        (0.5999, 1.0, "unknown", 0.5999, "between"),
        (0.4, 1.0, "unknown", 0.4, "between"),
        (0.3999, 1.0, "rejected", 0.3999, None),
        (0.0, 0.5, "rejected", 0.0, None),
        (1.0, 0.4999, "unknown", None, "mass"),
        (0.0, 0.0016, "unknown", None, "mass"),
        (math.nan, 1.0, "unknown", None, "failed"),
        (1.0, math.nan, "unknown", None, "failed"),
        (math.inf, 1.0, "unknown", None, "failed"),
    ],
)
def test_what_a_score_says(yes: float, mass: float, verdict: str, score: float | None, unknown: str | None) -> None:
    got = judge(RULE, Scores({"yes": yes, "no": 1 - yes}, mass))
    assert (got.verdict, got.score, got.unknown) == (verdict, score, unknown)
    assert (got.reason is None) == (unknown is None)


def test_the_floor_of_the_mass_is_the_rules_own() -> None:
    scored = Scores({"yes": 1.0, "no": 0.0}, 0.0016)
    assert judge(Rule("r", "?", min_mass=0.001), scored).verdict == "confirmed"
    assert judge(Rule("r", "?", min_mass=0), scored).verdict == "confirmed"
    refused = judge(Rule("r", "?", min_mass=0.002), scored)
    assert refused.reason is not None and "0.0016" in refused.reason and "min_mass=0.002" in refused.reason


def test_shares_are_of_the_answers_and_the_mass_is_of_all_tokens() -> None:
    logits = np.log(np.array([0.02, 0.01, 0.05, 0.02, 0.9], np.float32))
    got = scores(("yes", "no"), [[0, 1], [2]], logits + 5)
    assert dict(got) == pytest.approx({"yes": 0.03 / 0.08, "no": 0.05 / 0.08}) and got["no"] == got.shares["no"]
    assert got.mass == pytest.approx(0.08)
    assert 0.999 < scores(("yes", "no"), [[0, 1, 3, 4], [2]], logits).mass <= 1


@pytest.mark.parametrize("yes", [0.0, 0.99])
def test_a_model_that_says_neither_yes_nor_no_raises_and_ends_no_alert(yes: float) -> None:
    llm = FakeLLM()
    llm.yes = lambda prompt, times: 0.9 if times[-1] < 1030 else yes
    llm.mass = lambda prompt: 1.0 if prompt == RULE.prompt and llm.clock.now < 1030 else 0.0016
    fire = Rule("fire", "Is there a fire?")
    with by_hand(llm, Camera("gate", "rtsp://x"), rules=[RULE, fire]) as (made, readers):
        readers["gate"].fps = 1
        drive(made, llm.clock, 80)
        events = [event for event in made.events.since() if event.type == "alert"]
        alerts = made.status()["cameras"]["gate"]["alerts"]
        metrics = {sample.name: sample for metric in WatcherMetrics(made.status).collect() for sample in metric.samples}
    labels = {"camera": "gate", "rule": "fire", "reason": "mass"}
    assert (metrics["dycoke_rule_unknown_total"].labels, metrics["dycoke_rule_unknown_total"].value) == (labels, 19)
    assert [(event.rule_id, event.phase, event.verdict) for event in events] == [
        ("person", "new", "confirmed"),
        ("person", "update", "unknown"),
        ("person", "update", "unknown"),
    ]
    assert [event.mass for event in events] == [1.0, 0.0016, 0.0016] and events[1].score is None
    assert all("neither yes nor no" in (event.reason or "") for event in events[1:])
    assert alerts["fire"]["unknown"] == {"mass": 19} and alerts["fire"]["verdict"] == "unknown"
    assert not alerts["fire"]["on"] and alerts["fire"]["score"] is None and "0.0016" in alerts["fire"]["reason"]


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
    assert changes[-1].end_time == EVERY * 79 and changes[-1].found.verdict == "rejected"


def test_flicker_around_a_threshold_is_one_alert() -> None:
    assert phases(RULE, [0.9, 0.9] + [0.55, 0.65] * 50).replace(".", "").strip("u") == "n"


def test_an_alert_that_is_closed_says_that_nothing_is_known() -> None:
    state = AlertState(RULE, lambda: "id")
    for i in range(2):
        state.window(found(RULE, 0.9), EVERY * i, (0, EVERY * i))
    change = state.close(8.0, 5.0, "paused")
    assert change and (change.phase, change.found.verdict, change.found.reason, change.end_time) == (
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
            assert all(found(rule, s).verdict == "confirmed" for s in scores[i - consecutive + 1 : i + 1])
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


@pytest.mark.parametrize(("threshold", "clear"), [(0.3, 0.3), (0.0, 0.0), (0.6, 0.4), (0.4, 0.4), (1.0, 0.4)])
def test_the_clear_threshold_follows_a_lower_threshold(threshold: float, clear: float) -> None:
    assert Rule("r", "Is it?", threshold=threshold).clear_threshold == clear


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"id": "no spaces"}, "rule id 'no spaces'"),
        ({"id": ""}, "rule id ''"),
        ({"id": "ü"}, "rule id 'ü'"),
        ({"prompt": "  "}, "rule r has no question"),
        ({"threshold": 1.5}, "threshold=1.5 (--threshold) must be between 0 and 1"),
        ({"threshold": "high"}, "threshold='high' (--threshold) must be a number"),
        ({"min_mass": 1.1}, "min_mass=1.1 (--min-mass) must be between 0 and 1, e.g. --min-mass 0.5"),
        ({"clear_threshold": 1.7}, "clear_threshold=1.7 (--clear-threshold) must be between 0 and 1"),
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
