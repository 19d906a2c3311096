"""Single pictures of things in colours without a name, of which shape, size and place are taught: what a shape is
should not hang on the colours that it was seen in. No pair of a colour and a shape that is held out is among them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from benchmarks.scenes import cells, world
from benchmarks.scenes.world import COLOURS, SHAPES, SIDE, SIZES, Thing

APART = 75.0  # least distance of a colour from every named one and from the background's grey, of 255
GREY = (95, 95, 95)
NAMED = np.array([*COLOURS.values(), GREY], np.float32)
TAUGHT = np.array([fact in (*SHAPES, *SIZES, *cells.PLACES) for fact in cells.FACTS])


def draw(random: np.random.Generator, count: int) -> tuple[NDArray[np.uint8], cells.Cells]:
    """`count` pictures uint8 [count, R, R, 3] and their facts [count, N, facts], of which only TAUGHT ones count."""
    drawn = [_one(random) for _ in range(count)]
    return np.stack([picture for picture, _ in drawn]), np.stack([facts for _, facts in drawn])


def _one(random: np.random.Generator) -> tuple[NDArray[np.uint8], cells.Cells]:
    picture = world._background(random, SIDE)[None]
    things = []
    for lane in random.permutation(4)[: random.integers(1, 4)]:
        place = np.array([[random.uniform(0.1, 0.9), 0.2 + 0.2 * lane]], np.float32)
        shape, size = (list(words)[random.integers(len(words))] for words in (SHAPES, SIZES))
        thing = Thing("", shape, size, "still", "", "", 0, 0, place)
        picture[world.covered(thing)] = _colour(random)
        things.append(thing)
    noise = 4 * random.standard_normal(picture.shape[:3], np.float32) + random.uniform(-10, 10)
    facts = cells.facts(world.Scene(0, 1, tuple(things), None, None))
    return (picture + noise[..., None]).clip(0, 255).astype(np.uint8)[0], facts[0]


def _colour(random: np.random.Generator) -> NDArray[np.float32]:
    while True:
        colour = random.uniform(0, 255, 3).astype(np.float32)
        if np.linalg.norm(NAMED - colour, axis=1).min() > APART:
            return colour
