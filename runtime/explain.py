"""A picture of what compression did: every frame of a clip, kept tokens bright and dropped ones dim."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from dycoke_edge.errors import UsageError

COLUMNS = 8
SIDE = 160  # pixels of a frame on the sheet
CAPTION, GAP = 14, 4  # pixels
ACTIVE, PARKED, DROPPED = 1.0, 0.55, 0.18  # brightness


@dataclass(frozen=True)
class Seen:
    """What entered the decoder: frames uint8 [F, R, R, 3], and which of their F * N tokens, int32 [M]."""

    frames: NDArray[np.uint8]
    kept: NDArray[np.int32]


def sheet_path(name: str) -> Path:
    """Where a sheet can be written; UsageError before any work if it cannot."""
    path = Path(name)
    if path.suffix.lower() != ".png":
        raise UsageError(f"{name} (--explain) is not a PNG file's name; use e.g. --explain out.png")
    if not path.parent.is_dir():
        raise UsageError(f"{name} (--explain): there is no folder {path.parent}; make it or use --explain {path.name}")
    return path


def contact_sheet(seen: Seen, active: NDArray[np.bool_], tokens_per_frame: int) -> Image.Image:
    """The frames in reading order. `active` bool [M]: whether the deep layers attended to a kept token at the end;
    those set aside by keep are half as bright."""
    grid = math.isqrt(tokens_per_frame)
    assert grid * grid == tokens_per_frame and active.shape == seen.kept.shape
    light = np.full(len(seen.frames) * tokens_per_frame, DROPPED, np.float32)
    light[seen.kept] = np.where(active, ACTIVE, PARKED)
    rows = math.ceil(len(seen.frames) / COLUMNS)
    columns = min(COLUMNS, len(seen.frames))
    sheet = Image.new("RGB", (columns * (SIDE + GAP) + GAP, rows * (SIDE + CAPTION + GAP) + GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (frame, cells) in enumerate(zip(seen.frames, light.reshape(-1, grid, grid), strict=True)):
        row, column = divmod(number, COLUMNS)
        x, y = GAP + column * (SIDE + GAP), GAP + row * (SIDE + CAPTION + GAP)
        kept = int((cells > DROPPED).sum())
        draw.text((x, y), f"{number + 1}: {kept} of {tokens_per_frame}", fill="black")
        sheet.paste(_lit(frame, cells), (x, y + CAPTION))
    return sheet


def _lit(frame: NDArray[np.uint8], cells: NDArray[np.float32]) -> Image.Image:
    """A frame [R, R, 3] with the brightness of its cells [grid, grid]."""
    picture = np.asarray(Image.fromarray(frame).resize((SIDE, SIDE)), np.float32)
    light = np.asarray(Image.fromarray(cells).resize((SIDE, SIDE), Image.Resampling.NEAREST))
    return Image.fromarray((picture * light[..., None]).astype(np.uint8))
