"""Plans a scene (who moves where, when) and draws it: a still textured background, noise, slow light, 0 to 4 things."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

SIDE = 112  # pixels
COLOURS = {
    "red": (215, 45, 45),
    "green": (45, 175, 70),
    "blue": (55, 85, 225),
    "yellow": (235, 210, 50),
    "purple": (155, 60, 195),
    "white": (240, 240, 240),
    "orange": (240, 125, 20),
    "pink": (250, 150, 200),
    "cyan": (60, 215, 220),
    "black": (15, 15, 15),
}
SHAPES = ("ball", "box", "triangle", "cross", "ring")
SIZES = {"small": 9, "large": 15}  # half side in pixels
SPARK = 6  # likewise
MOTIONS = ("still", "cross", "enter", "leave", "move", "turn", "stop")
ODDS = (0.14, 0.22, 0.22, 0.12, 0.1, 0.1, 0.1)
HELD_OUT = frozenset({("red", "ring"), ("blue", "triangle"), ("yellow", "cross"), ("white", "box")})  # test only
STEP = {"left": (-1.0, 0.0), "right": (1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0)}
PLACES = {"left": (0.17, 0.5), "right": (0.83, 0.5), "top": (0.5, 0.17), "bottom": (0.5, 0.83), "middle": (0.5, 0.5)}
FROM = {"right": "left", "left": "right", "down": "top", "up": "bottom"}  # moving right, one comes from the left
NOISE = 4.0  # levels of 255; what training shows
OUTSIDE = 0.2  # how far beyond the edge a thing begins or ends, as a share of the side
Split = Literal["train", "test"]
Frames = NDArray[np.uint8]
Pixels = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]


@dataclass(frozen=True)
class Thing:
    """One object of a scene, and what it does."""

    colour: str
    shape: str
    size: str
    motion: str
    direction: str  # of the first move; for a still thing the empty string
    place: str  # where it stands or stops, else the empty string
    shot: int  # 0 before a hard cut, 1 after it
    start: int  # the frame in which it begins to move or to enter; a still thing's shot's first
    track: NDArray[np.float32]  # [F, 2] centre as a share of the side; NaN while it is not in this shot

    @property
    def name(self) -> str:
        """Colour and shape, unique in a scene."""
        return f"{self.colour} {self.shape}"

    @property
    def seen(self) -> NDArray[np.bool_]:
        """[F]: its centre is in the picture."""
        inside = (self.track > 0) & (self.track < 1)
        return np.asarray(inside.all(1), np.bool_)


@dataclass(frozen=True)
class Spark:
    """A detail that is there in one frame only."""

    colour: str
    frame: int
    centre: tuple[float, float]


@dataclass(frozen=True)
class Scene:
    """A clip before it is drawn. `cut` is the first frame after a hard scene change."""

    seed: int
    frames: int
    things: tuple[Thing, ...]
    cut: int | None
    spark: Spark | None

    def shot(self, number: int) -> range:
        """The frames of a shot."""
        if self.cut is None:
            return range(self.frames)
        return range(self.cut) if number == 0 else range(self.cut, self.frames)


def plan(seed: int, split: Split, frames: int | None = None) -> Scene:
    """A random scene. Train and test differ in seeds (even and odd streams) and in colour-shape pairs."""
    random = np.random.default_rng([seed, ("train", "test").index(split)])
    count = frames or int(random.integers(8, 33))
    cut = int(random.integers(count // 3, 2 * count // 3 + 1)) if random.random() < 0.2 else None
    pairs = _pairs(random, split, int(random.choice(5, p=(0.08, 0.27, 0.3, 0.2, 0.15))))
    shots = [0] * len(pairs) if cut is None else [int(random.integers(2)) for _ in pairs]
    lanes = random.permutation(4)
    scene = Scene(seed, count, (), cut, _spark(random, count))
    things = tuple(
        _thing(random, pair, int(lane), scene.shot(shot), shot, count)
        for pair, lane, shot in zip(pairs, lanes, shots, strict=False)
    )
    return Scene(seed, count, things, cut, scene.spark)


def _pairs(random: np.random.Generator, split: Split, count: int) -> list[tuple[str, str]]:
    every = [(colour, shape) for colour in COLOURS for shape in SHAPES]
    held, free = [p for p in every if p in HELD_OUT], [p for p in every if p not in HELD_OUT]
    chosen = [free[i] for i in random.permutation(len(free))[:count]]
    if split == "test" and chosen and random.random() < 0.5:
        chosen[0] = held[random.integers(len(held))]
    return chosen


def _spark(random: np.random.Generator, frames: int) -> Spark | None:
    if random.random() > 0.35:
        return None
    colour = list(COLOURS)[random.integers(len(COLOURS))]
    x, y = random.uniform(0.12, 0.88, 2)
    return Spark(colour, int(random.integers(1, frames)), (float(x), float(y)))


def _thing(
    random: np.random.Generator, pair: tuple[str, str], lane: int, frames: range, shot: int, total: int
) -> Thing:
    motion = str(random.choice(MOTIONS, p=ODDS)) if len(frames) >= 4 else "still"
    direction = list(STEP)[random.integers(4)] if motion != "still" else ""
    place = list(PLACES)[random.integers(5)] if motion in ("still", "enter", "stop") else ""
    if motion in ("enter", "stop"):  # it stops where its way leads
        place = "middle" if random.random() < 0.5 else {"up": "top", "down": "bottom"}.get(direction, direction)
    latest = {"still": 1, "enter": len(frames) // 2, "cross": len(frames) // 2}.get(motion, len(frames) // 3)
    start = frames.start + int(random.integers(0, max(1, latest)))
    track = np.full((total, 2), np.nan, np.float32)
    way = _way(
        motion,
        direction,
        place,
        lane,
        np.arange(len(frames)) - (start - frames.start),
        len(frames),
        start - frames.start,
    )
    track[frames.start : frames.stop] = way
    size = list(SIZES)[random.integers(2)]
    return Thing(pair[0], pair[1], size, motion, direction, place, shot, start, track)


def _way(
    motion: str, direction: str, place: str, lane: int, clock: NDArray[np.int64], frames: int, start: int
) -> NDArray[np.float32]:
    """Centres [n, 2] over a shot. `clock` counts frames from the start of the move, negative before it."""
    aside = 0.2 + 0.2 * lane  # each thing keeps to a lane of its own, so that none hides another for long
    if motion == "still":
        x, y = PLACES[place]
        across = (0.0, aside - 0.5) if place in ("left", "right") else (aside - 0.5, 0.0)
        return np.tile(np.array((x + 0.6 * across[0], y + 0.6 * across[1]), np.float32), (len(clock), 1))
    step = np.array(STEP[direction], np.float32)
    begin, end = _ends(motion, direction, place)
    length = max(2, frames - start - 1)
    share = np.clip(clock / (length * (0.6 if motion in ("enter", "stop") else 1.0)), 0.0, 1.0)
    if motion == "turn":
        share = 1 - np.abs(2 * share - 1)
    along = begin + (end - begin) * share  # along the direction, 0 at the side it comes from
    line = along if step.sum() > 0 else 1 - along
    other = np.full_like(line, aside)
    return np.stack((line, other) if step[0] else (other, line), axis=1).astype(np.float32)


def _ends(motion: str, direction: str, place: str) -> tuple[float, float]:
    """Where a move begins and ends along its direction: 0 and 1 are the edges."""
    stop = 0.5 if place == "middle" else 0.83
    return {
        "cross": (-OUTSIDE, 1 + OUTSIDE),
        "enter": (-OUTSIDE, stop),
        "leave": (0.35, 1 + OUTSIDE),
        "move": (0.15, 0.85),
        "turn": (0.2, 0.8),
        "stop": (0.12, stop),
    }[motion]


def draw(scene: Scene, side: int = SIDE, noise: float = NOISE) -> Frames:
    """uint8 [F, side, side, 3]; `noise` is the standard deviation of every pixel's luminance, in levels of 255."""
    random = np.random.default_rng([scene.seed, 2])
    video = np.empty((scene.frames, side, side, 3), np.float32)
    for number in range(1 if scene.cut is None else 2):
        video[scene.shot(number).start : scene.shot(number).stop] = _background(random, side)
    for thing in scene.things:
        video[covered(thing, side)] = COLOURS[thing.colour]
    if scene.spark is not None:
        video[covered(scene.spark, side)] = COLOURS[scene.spark.colour]
    phase, speed = random.uniform(0, 2 * np.pi), random.uniform(0.05, 0.2)
    light = 10 * np.sin(phase + speed * np.arange(scene.frames, dtype=np.float32))
    grain = noise * random.standard_normal(video.shape[:3], np.float32)  # one draw a pixel
    video += (grain + light[:, None, None])[..., None]
    return video.clip(0, 255, out=video).astype(np.uint8)


def covered(what: Thing | Spark, side: int = SIDE) -> Pixels:
    """The pixels that something covers in a clip: frame, row and column of each."""
    if isinstance(what, Spark):
        centre = np.array([what.centre], np.float32) * side
        frame, row, column = _pixels("spark", centre, SPARK * side / SIDE, side)
        return frame + what.frame, row, column
    present = np.flatnonzero(~np.isnan(what.track[:, 0]))
    frame, row, column = _pixels(what.shape, what.track[present] * side, SIZES[what.size] * side / SIDE, side)
    return present[frame], row, column


def _background(random: np.random.Generator, side: int) -> NDArray[np.float32]:
    """A muted texture [side, side, 3]: a coarse pattern, bilinear, and a fine one."""
    coarse = random.uniform(60, 130, (8, 8, 3)).astype(np.float32)
    at = np.linspace(0, 6.999, side)
    low, part = at.astype(int), (at % 1).astype(np.float32)
    rows = coarse[low] * (1 - part)[:, None, None] + coarse[low + 1] * part[:, None, None]
    smooth = rows[:, low] * (1 - part)[:, None] + rows[:, low + 1] * part[:, None]
    fine = random.normal(0, 5, (side // 4 + 1, side // 4 + 1, 1)).repeat(4, 0).repeat(4, 1)[:side, :side]
    return np.asarray(smooth + fine, np.float32)


def _pixels(shape: str, centres: NDArray[np.float32], half: float, side: int) -> Pixels:
    """Which of n shapes around centres [n, 2] covers which pixel; only a square around each is looked at."""
    corner = np.floor(centres - half).astype(int)
    along = corner[:, None, :] + np.arange(int(2 * half) + 2)[None, :, None]  # [n, width, 2]
    offset = (along + 0.5 - centres[:, None, :]).astype(np.float32)
    inside = (along >= 0) & (along < side)
    mask = _mask(shape, offset[:, None, :, 0], offset[:, :, None, 1], half)
    number, y, x = np.nonzero(mask & inside[:, None, :, 0] & inside[:, :, None, 1])
    return number, along[number, y, 1], along[number, x, 0]


def _mask(shape: str, dx: NDArray[np.float32], dy: NDArray[np.float32], half: float) -> NDArray[np.bool_]:
    """Where a shape is, by the offset from its centre in pixels."""
    ax, ay = np.abs(dx), np.abs(dy)
    if shape == "box":
        return np.asarray((ax < 0.88 * half) & (ay < 0.88 * half))
    if shape == "triangle":
        return np.asarray((ay < half) & (ax < 0.55 * (dy + half)))
    if shape == "cross":
        return np.asarray(((ax < half / 3) & (ay < half)) | ((ay < half / 3) & (ax < half)))
    if shape == "spark":
        return np.asarray(ax + ay < half)
    distance = dx * dx + dy * dy
    ring = shape == "ring"
    return np.asarray((distance < half * half) & (distance > (0.55 * half) ** 2 if ring else True))
