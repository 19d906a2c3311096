"""A picture of what compression did: every frame of a clip in its own shape, the tokens that were dropped grey, those
that were set aside dim; and what was asked and answered."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from dycoke_edge.config import Clip
from dycoke_edge.errors import UsageError
from dycoke_edge.runtime.video import open_visual, read_image

SHARP = 448  # pixels a side that frames are read at for the picture, whatever the model reads them at
WIDE = 1680  # pixels of a sheet with several columns
LARGEST, LEAST = 480, 820  # widest frame, narrowest sheet
MARGIN, GAP, CAPTION = 24, 16, 34
DROPPED, PARKED, ACTIVE = 0, 1, 2  # what became of a token
LIGHT = np.array((0.4, 0.6, 1.0), np.float32)  # brightness of each
HAZE = 60  # levels of 255 that dropped tokens are lighter by, to be seen in dark scenes too
SWATCH, HAZY = (64, 160, 255), (110, 110, 110)
EDGE = (255, 176, 0)  # around what was kept
INK, PALE, PAPER = (20, 20, 20), (95, 95, 95), (255, 255, 255)
LARGE, SMALL, TINY = 32, 24, 22  # pixels of a letter
LINES = 4  # of a question or an answer, at most
LEGEND = (
    (ACTIVE, "attended to at the end"),
    (PARKED, "kept by merge, set aside by keep"),
    (DROPPED, "dropped by merge"),
)


@dataclass(frozen=True)
class Seen:
    """What entered the decoder: frames uint8 [F, R, R, 3], and which of their F * N tokens, int32 [M]."""

    frames: NDArray[np.uint8]
    kept: NDArray[np.int32]


@dataclass(frozen=True)
class Shown:
    """What is drawn of a clip: `pixels` uint8 [F, S, S, 3], squeezed from `shape` (width, height), and `times`, seconds
    [F]; None for a picture."""

    pixels: NDArray[np.uint8]
    shape: tuple[int, int]
    times: NDArray[np.float64] | None


def open_shown(video: str | None, image: str | None, clip: Clip) -> Shown:
    """The frames that were asked about, read again, large enough to look at."""
    if video is None:
        assert image is not None, "there is something to show"
        picture = read_image(image, SHARP, clip.max_pixels)
        return Shown(picture.pixels, picture.shape, None)
    frames = open_visual(video, clip, SHARP)
    return Shown(frames.pixels, frames.shape, frames.times)


def sheet_path(name: str) -> Path:
    """Where a sheet can be written; UsageError before any work if it cannot."""
    path = Path(name)
    if path.suffix.lower() != ".png":
        raise UsageError(f"{name} (--explain) is not a PNG file's name; use e.g. --explain out.png")
    if not path.parent.is_dir():
        raise UsageError(f"{name} (--explain): there is no folder {path.parent}; make it or use --explain {path.name}")
    return path


def states(kept: NDArray[np.int32], active: NDArray[np.bool_], count: int) -> NDArray[np.uint8]:
    """Of each of a clip's `count` tokens. `active` bool [M]: whether deep layers attended to a kept one at the end."""
    found = np.full(count, DROPPED, np.uint8)
    found[kept] = np.where(active, ACTIVE, PARKED)
    return found


def contact_sheet(
    shown: Shown,
    kept: NDArray[np.int32],
    active: NDArray[np.bool_],
    tokens_per_frame: int,
    question: str = "",
    answer: str = "",
) -> Image.Image:
    """The frames in reading order, with what happened to each token, below a question, its answer and a legend."""
    grid, count = math.isqrt(tokens_per_frame), len(shown.pixels)
    assert grid * grid == tokens_per_frame and active.shape == kept.shape
    cells = states(kept, active, count * tokens_per_frame).reshape(count, grid, grid)
    columns = min(count, 4 if count <= 16 else 6)
    box = _box(shown.shape, columns)
    wide = max(columns * (box[0] + GAP) - GAP, LEAST) + 2 * MARGIN
    sums = _sums(len(kept), int(active.sum()), count, cells.size)
    head = _head(wide, question, answer, sums, [pair for pair in LEGEND if pair[0] in cells])
    rows = math.ceil(count / columns)
    sheet = Image.new("RGB", (wide, head.height + rows * (box[1] + CAPTION + GAP) + MARGIN), PAPER)
    sheet.paste(head, (0, 0))
    draw, small = ImageDraw.Draw(sheet), ImageFont.load_default(TINY)
    for number, (frame, own) in enumerate(zip(shown.pixels, cells, strict=True)):
        row, column = divmod(number, columns)
        x, y = MARGIN + column * (box[0] + GAP), head.height + row * (box[1] + CAPTION + GAP)
        sheet.paste(lit(frame, own, box), (x, y))
        time = "" if shown.times is None else f"{shown.times[number]:.1f} s"
        total = int((own != DROPPED).sum())
        draw.text((x, y + box[1] + 4), time, fill=INK, font=small)
        draw.text(
            (x + box[0], y + box[1] + 4), f"{total} of {tokens_per_frame} kept", fill=PALE, font=small, anchor="ra"
        )
    return sheet


def lit(frame: NDArray[np.uint8], cells: NDArray[np.uint8], box: tuple[int, int]) -> Image.Image:
    """A frame [S, S, 3] at the size of a box, with the states of its cells [grid, grid]; dropped ones are grey. A line
    runs between kept and dropped cells."""
    picture = Image.fromarray(frame).resize(box)
    colour = np.asarray(picture, np.float32)
    grey = np.asarray(picture.convert("L"), np.float32)[..., None]
    state = np.asarray(Image.fromarray(cells).resize(box, Image.Resampling.NEAREST))[..., None]
    pixels = np.where(state == DROPPED, grey * LIGHT[DROPPED] + HAZE, colour * LIGHT[state])
    image = Image.fromarray(pixels.astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for start, end in edges(cells != DROPPED):
        line = [(round(x * box[0] / len(cells)), round(y * box[1] / len(cells))) for y, x in (start, end)]
        draw.line(line, EDGE, 2)
    return image


def edges(kept: NDArray[np.bool_]) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """The lines between kept and other cells [grid, grid], from (row, column) to (row, column) of their corners."""
    down = [((y + 1, x), (y + 1, x + 1)) for y, x in np.argwhere(kept[1:] != kept[:-1])]
    across = [((y, x + 1), (y + 1, x + 1)) for y, x in np.argwhere(kept[:, 1:] != kept[:, :-1])]
    return down + across


def _box(shape: tuple[int, int], columns: int) -> tuple[int, int]:
    """Width and height of a frame on the sheet, in its own shape."""
    wide = min(LARGEST, (WIDE - 2 * MARGIN + GAP) // columns - GAP)
    ratio = min(max(shape[1] / shape[0], 1 / 8), 2.0)
    return (wide, max(1, round(wide * ratio))) if ratio <= 1 else (round(wide / ratio), wide)


def _sums(kept: int, active: int, frames: int, count: int) -> str:
    text = f"{frames} frame{'s' * (frames != 1)}, {count} visual tokens: {kept} kept ({kept / count:.0%})"
    return text if active == kept else f"{text}, {active} attended to at the end ({active / count:.0%})"


def _head(wide: int, question: str, answer: str, sums: str, legend: list[tuple[int, str]]) -> Image.Image:
    """What stands above the frames."""
    large, small = ImageFont.load_default(LARGE), ImageFont.load_default(SMALL)
    lines = [(line, LARGE, PALE) for line in _wrapped(question, large, wide - 2 * MARGIN)]
    lines += [(line, LARGE, INK) for line in _wrapped(answer, large, wide - 2 * MARGIN)]
    lines += [(sums, SMALL, PALE)]
    bottom = MARGIN + sum(round(size * 1.4) for _, size, _ in lines) + 10
    head = Image.new("RGB", (wide, bottom + 46), PAPER)
    draw, y = ImageDraw.Draw(head), MARGIN
    for line, size, ink in lines:
        draw.text((MARGIN, y), line, fill=ink, font=large if size == LARGE else small)
        y += round(size * 1.4)
    x = MARGIN
    for state, meaning in legend:
        swatch = HAZY if state == DROPPED else tuple(round(part * LIGHT[state]) for part in SWATCH)
        draw.rectangle((x, bottom + 2, x + 24, bottom + 26), swatch)
        draw.text((x + 34, bottom), meaning, fill=INK, font=small)
        x += 34 + round(small.getlength(meaning)) + 36
    return head


def _wrapped(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, wide: int) -> list[str]:
    """A text in lines that fit, at most `LINES`; what is left out is three dots."""
    lines = list[str]()
    for part in (part for word in text.split() for part in _pieces(word, font, wide)):
        if lines and font.getlength(f"{lines[-1]} {part}") <= wide:
            lines[-1] += f" {part}"
        else:
            lines.append(part)
    return lines if len(lines) <= LINES else [*lines[: LINES - 1], f"{lines[LINES - 1]} ..."]


def _pieces(word: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, wide: int) -> list[str]:
    """A word in parts that fit, for a language without spaces or an answer without sense."""
    most = max(1, int(wide / font.getlength("W")))
    if font.getlength(word) <= wide:
        return [word]
    return [word[start : start + most] for start in range(0, len(word), most)]
