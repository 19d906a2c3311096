"""What stands in each visual token's part of the picture, and where it goes: what is taught beside the answers.

Answers alone teach colours and numbers within minutes, directions not at all (5,500 steps: 25 % right, the chance).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from benchmarks.scenes.world import COLOURS, SHAPES, SIDE, SIZES, STEP, Scene, Spark, Thing, covered

GRID = 7  # visual tokens along a side
PLACES = tuple(f"{line} {number}" for line in ("row", "column") for number in range(GRID))
FACTS = (*COLOURS, *SHAPES, *SIZES, *(f"{colour} spark" for colour in COLOURS), *PLACES)
MOTIONS = (*STEP, "stands", "came")
SHARE = 0.1  # of a cell's pixels; a smaller part of a thing is not named
Cells = NDArray[np.uint8]


def facts(scene: Scene) -> Cells:
    """uint8 [F, GRID * GRID, len(FACTS)]: what one frame shows in a cell, and where the cell is."""
    cells = np.zeros((scene.frames, GRID * GRID, len(FACTS)), np.uint8)
    seen: list[Thing | Spark] = [*scene.things, *([scene.spark] if scene.spark else [])]
    for thing in seen:
        cells[_filled(thing, scene.frames)] |= _marks(FACTS, _names(thing))
    row, column = np.divmod(np.arange(GRID * GRID), GRID)
    for cell, (y, x) in enumerate(zip(row, column, strict=True)):
        cells[:, cell] |= _marks(FACTS, (f"row {y}", f"column {x}"))
    return cells


def motions(scene: Scene) -> Cells:
    """uint8 [F, GRID * GRID, len(MOTIONS)]: what the frames up to this one show that the thing in a cell does."""
    cells = np.zeros((scene.frames, GRID * GRID, len(MOTIONS)), np.uint8)
    for thing in scene.things:
        filled = _filled(thing, scene.frames)
        for frame in np.flatnonzero(filled.any(1)):
            cells[frame, filled[frame]] |= _marks(MOTIONS, _does(thing, int(frame)))
    return cells


def _does(thing: Thing, frame: int) -> tuple[str, ...]:
    came = ("came",) if thing.motion in ("enter", "cross") else ()
    if frame == 0 or np.isnan(thing.track[frame - 1, 0]):
        return came
    moved = thing.track[frame] - thing.track[frame - 1]
    if np.abs(moved).max() < 1e-4:
        return (*came, "stands")
    return (*came, max(STEP, key=lambda way: float(moved @ np.array(STEP[way]))))


def _filled(thing: Thing | Spark, frames: int) -> NDArray[np.bool_]:
    """bool [F, GRID * GRID], True where a thing fills more than SHARE of a cell."""
    frame, row, column = covered(thing)
    width = SIDE // GRID
    cell = (frame * GRID + row // width) * GRID + column // width
    counts = np.bincount(cell, minlength=frames * GRID * GRID).reshape(frames, GRID * GRID)
    return np.asarray(counts > SHARE * width * width)


def _names(thing: Thing | Spark) -> tuple[str, ...]:
    return (f"{thing.colour} spark",) if isinstance(thing, Spark) else (thing.colour, thing.shape, thing.size)


def _marks(words: tuple[str, ...], true: tuple[str, ...]) -> Cells:
    return np.array([word in true for word in words], np.uint8)
