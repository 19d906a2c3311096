"""The scenes that accuracy is measured on: reproducible, disjoint, and their answers are what the pixels show."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from benchmarks.scenes import questions, world
from benchmarks.scenes.world import HELD_OUT, Scene, draw, plan

SCENES = [plan(seed, "train") for seed in range(400)]
HELD = [plan(seed, "test") for seed in range(400)]


def test_a_seed_gives_the_same_clip() -> None:
    a, b = plan(7, "train", frames=12), plan(7, "train", frames=12)
    assert np.array_equal(draw(a), draw(b))
    assert questions.ask(a, 7) == questions.ask(b, 7)
    assert not np.array_equal(draw(a), draw(plan(8, "train", frames=12)))


def test_train_and_test_are_disjoint() -> None:
    def pairs(scenes: list[Scene]) -> set[tuple[str, str]]:
        return {(thing.colour, thing.shape) for scene in scenes for thing in scene.things}

    assert not pairs(SCENES) & HELD_OUT
    assert pairs(HELD) >= HELD_OUT
    assert not np.array_equal(draw(plan(7, "train", 8)), draw(plan(7, "test", 8)))


def test_every_kind_is_asked_often_and_no_answer_rules() -> None:
    asked = [question for seed, scene in enumerate(SCENES) for question in questions.ask(scene, seed)]
    kinds = Counter(question.kind for question in asked)
    assert set(kinds) == set(questions.KINDS) and min(kinds.values()) > 40
    for kind in kinds:
        answers = Counter(question.answer for question in asked if question.kind == kind)
        assert max(answers.values()) < 0.9 * kinds[kind], (kind, answers.most_common(2))


@pytest.mark.parametrize("frames", [8, 17, 32])
def test_a_clip_has_its_form(frames: int) -> None:
    video = draw(plan(1, "train", frames))
    assert video.shape == (frames, world.SIDE, world.SIDE, 3) and video.dtype == np.uint8


def _seen_in_pixels(scene: Scene, thing: world.Thing) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """[F]: its colour stands at its centre, wherever nothing else is near."""
    video, side = draw(scene).astype(int), world.SIDE
    found = np.zeros(scene.frames, np.bool_)
    for frame in np.flatnonzero(thing.seen):
        x, y = (thing.track[frame] * side).astype(int)
        offset = int(0.78 * world.SIZES[thing.size]) if thing.shape == "ring" else 0  # a ring's middle is empty
        column = min(max(x + offset, 0), side - 1)
        found[frame] = np.abs(video[frame, y, column] - world.COLOURS[thing.colour]).max() < 45
    return found


def test_things_are_drawn_where_the_plan_says() -> None:
    alone = [scene for scene in SCENES if len(scene.things) == 1][:40]
    for scene in alone:
        (thing,) = scene.things
        inside = ((thing.track > 0.15) & (thing.track < 0.85)).all(1)
        assert _seen_in_pixels(scene, thing)[inside].mean() > 0.9


def test_answers_follow_the_track() -> None:
    for scene in SCENES:
        for thing in scene.things:
            shot = scene.shot(thing.shot)
            first, last = thing.seen[shot.start], thing.seen[shot.stop - 1]
            assert first == (thing.motion not in ("enter", "cross")), thing
            assert last == (thing.motion not in ("leave", "cross")), thing
            assert thing.seen.any(), thing
            if thing.motion not in ("still", "turn"):
                way = thing.track[shot.stop - 1] - thing.track[shot.start]
                step = np.array(world.STEP[thing.direction])
                assert way @ step > 0.25 and abs(way @ step[::-1]) < 1e-3, thing
            if thing.motion in ("enter", "stop"):
                along = np.array(world.STEP[thing.direction]) @ (thing.track[shot.stop - 1] - 0.5)
                assert (abs(along) < 0.05) == (thing.place == "middle"), thing


def test_a_spark_is_in_one_frame_only() -> None:
    scene = next(s for s in SCENES if s.spark is not None and not s.things and s.cut is None)
    assert scene.spark is not None
    x, y = (np.array(scene.spark.centre) * world.SIDE).astype(int)
    close = np.abs(draw(scene)[:, y, x].astype(int) - world.COLOURS[scene.spark.colour]).max(1) < 30
    assert np.flatnonzero(close).tolist() == [scene.spark.frame]


def test_things_do_not_share_a_lane() -> None:
    for scene in SCENES:
        for a in scene.things:
            for b in scene.things:
                if a is not b and a.motion != "still" != b.motion and a.direction == b.direction and a.shot == b.shot:
                    both = ~np.isnan(a.track[:, 0])
                    assert np.abs(a.track[both] - b.track[both]).max(1).min() > 0.15


def test_a_description_is_long_and_scores_itself() -> None:
    for scene in SCENES:
        text = questions.description(scene)
        assert len(text.split()) >= 25
        found = questions.slots(text)
        assert len(found) >= 2 + 4 * len(scene.things)
        for thing in scene.things:
            assert thing.name in found
            if thing.direction:
                assert f"{thing.name} {thing.direction}" in found


def test_a_wrong_description_scores_less() -> None:
    scene = next(s for s in SCENES if len(s.things) == 2 and s.things[0].direction == "left")
    text = questions.description(scene)
    wrong = text.replace(scene.things[0].colour, "beige").replace("left", "right")
    assert len(questions.slots(text) & questions.slots(wrong)) < len(questions.slots(text))
