"""What is asked about a scene, and the answer that its plan gives. Nothing is asked where the answer is not clear."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from benchmarks.scenes.world import FROM, Scene, Thing

NUMBERS = ("zero", "one", "two", "three", "four")
TAIL = 4  # the last quarter of the frames counts as "the last frames"
Asked = tuple[str, str] | None  # question, answer


@dataclass(frozen=True)
class Question:
    """One question with its answer."""

    kind: str
    text: str
    answer: str


def ask(scene: Scene, seed: int) -> list[Question]:
    """One question of every kind that has a clear answer for this scene, in random order."""
    random = np.random.default_rng([seed, 3])
    asked = []
    for kind, make in KINDS.items():
        found = make(scene, random)
        if found is not None:
            asked.append(Question(kind, *found))
    return [asked[i] for i in random.permutation(len(asked))]


def how_many(scene: Scene, random: np.random.Generator) -> Asked:
    return "How many objects are there?", NUMBERS[len(scene.things)]


def which_colour(scene: Scene, random: np.random.Generator) -> Asked:
    thing = _pick(random, [t for t in scene.things if _alone(scene, t, "shape")])
    return (f"Which colour is the {thing.shape}?", thing.colour) if thing else None


def which_shape(scene: Scene, random: np.random.Generator) -> Asked:
    thing = _pick(random, [t for t in scene.things if _alone(scene, t, "colour")])
    return (f"Which shape is the {thing.colour} object?", thing.shape) if thing else None


def direction(scene: Scene, random: np.random.Generator) -> Asked:
    thing = _pick(random, [t for t in scene.things if t.motion not in ("still", "turn")])
    return (f"In which direction does the {thing.name} move?", thing.direction) if thing else None


def enters(scene: Scene, random: np.random.Generator) -> Asked:
    thing = _pick(random, list(scene.things))
    return (f"Does the {thing.name} enter?", _yes(thing.motion in ("enter", "cross"))) if thing else None


def leaves(scene: Scene, random: np.random.Generator) -> Asked:
    thing = _pick(random, list(scene.things))
    return (f"Does the {thing.name} leave?", _yes(thing.motion in ("leave", "cross"))) if thing else None


def who_first(scene: Scene, random: np.random.Generator) -> Asked:
    came = [t for t in scene.things if t.motion in ("enter", "cross")]
    pairs = [(a, b) for a in came for b in came if a is not b and abs(_arrival(a) - _arrival(b)) >= 2]
    if not pairs:
        return None
    a, b = pairs[random.integers(len(pairs))]
    return f"Which came first, the {a.name} or the {b.name}?", min(a, b, key=_arrival).name


def where_stops(scene: Scene, random: np.random.Generator) -> Asked:
    thing = _pick(random, [t for t in scene.things if t.motion in ("enter", "stop")])
    return (f"Where does the {thing.name} stop?", thing.place) if thing else None


def anything_moving(scene: Scene, random: np.random.Generator) -> Asked:
    return "Is anything moving?", _yes(any(t.motion != "still" for t in scene.things))


def what_changed(scene: Scene, random: np.random.Generator) -> Asked:
    before = scene.frames - max(2, scene.frames // TAIL)
    if scene.cut is not None and scene.cut >= before - 1:
        return None
    came = [f"the {t.name} came" for t in scene.things if t.seen[-1] and not t.seen[before]]
    left = [f"the {t.name} left" for t in scene.things if t.seen[before] and not t.seen[-1]]
    changes = came + left
    if len(changes) > 1:
        return None
    return "What came or left in the last frames?", changes[0] if changes else "nothing"


def needle(scene: Scene, random: np.random.Generator) -> Asked:
    if scene.spark is None:
        return "Which colour is the spark?", "there is none"
    return "Which colour is the spark?", scene.spark.colour


def scene_change(scene: Scene, random: np.random.Generator) -> Asked:
    return "Does the scene change?", _yes(scene.cut is not None)


def describe(scene: Scene, random: np.random.Generator) -> Asked:
    return "Describe the video.", description(scene)


def description(scene: Scene) -> str:
    """25 words or more: what is there, in order of what begins first."""
    count = len(scene.things)
    opening = f"The video shows a place with {NUMBERS[count]} object{'' if count == 1 else 's'} in view of the camera."
    sentences = [opening]
    words = ("First", "Then", "After that", "Finally")
    for word, thing in zip(words, sorted(scene.things, key=lambda t: (t.start, t.name)), strict=False):
        sentences.append(f"{word}, a {thing.size} {thing.name} {_does(thing)}.")
    if not count:
        sentences.append("It is empty, and nothing moves.")
    change = "The scene changes once" if scene.cut is not None else "The scene stays the same"
    return " ".join([*sentences, f"{change} from the beginning to the end of the video."])


def slots(text: str) -> set[str]:
    """The facts a description states: count, scene, each object with its colour, motion, direction, place and order."""
    found = set(re.findall(r"with (\w+) objects?", text)) | set(re.findall(r"scene (changes|stays)", text))
    for order, (size, name, does) in enumerate(re.findall(r", a (\w+) (\w+ \w+) ([^.]+)\.", text)):
        found |= {name, f"{order} {name}", f"{name} {size}"}
        found |= {f"{name} {word}" for word in does.split() if word in SLOT_WORDS}
    return found


SLOT_WORDS = frozenset(
    ("left", "right", "up", "down", "top", "bottom", "middle", "stands", "enters", "leaves", "stops", "turns", "moves")
)


def _does(thing: Thing) -> str:
    side, way = FROM.get(thing.direction, ""), thing.direction
    return {
        "still": "stands still",
        "cross": f"enters from the {side}, moves {way} and leaves",
        "enter": f"enters from the {side}, moves {way} and stops at the {thing.place}",
        "leave": f"moves {way} and leaves",
        "move": f"moves {way} all the time",
        "turn": f"moves {way} and turns back",
        "stop": f"moves {way} and stops at the {thing.place}",
    }[thing.motion]


def _pick(random: np.random.Generator, things: list[Thing]) -> Thing | None:
    return things[random.integers(len(things))] if things else None


def _alone(scene: Scene, thing: Thing, attribute: str) -> bool:
    return [getattr(other, attribute) for other in scene.things].count(getattr(thing, attribute)) == 1


def _arrival(thing: Thing) -> int:
    """The first frame in which it is seen."""
    return int(thing.seen.argmax())


def _yes(fact: bool) -> str:
    return "yes" if fact else "no"


KINDS: dict[str, Callable[[Scene, np.random.Generator], Asked]] = {
    "count": how_many,
    "colour": which_colour,
    "shape": which_shape,
    "direction": direction,
    "enter": enters,
    "leave": leaves,
    "first": who_first,
    "stop": where_stops,
    "moving": anything_moving,
    "changed": what_changed,
    "needle": needle,
    "cut": scene_change,
    "describe": describe,
}
