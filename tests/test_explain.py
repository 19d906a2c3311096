"""The contact sheet of `run --explain`: what was kept is bright, what was dropped is grey and still to be seen."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from dycoke_edge import Clip
from dycoke_edge.cli import main
from dycoke_edge.runtime.explain import EDGE, MARGIN, SHARP, WIDE, Shown, contact_sheet, edges, lit, open_shown
from tests import clips

RED = np.full((3, 40, 40, 3), (250, 0, 0), np.uint8)
KEPT = np.array([0, 1, 2, 3, 6, 9], np.int32)  # frame 0 whole, one token of each other frame
ACTIVE = np.array([True, True, True, False, True, False])


def middle(frame: Image.Image, row: int, column: int) -> tuple[int, ...]:
    """The colour in the middle of a cell of a grid of two by two."""
    x, y = frame.width * (2 * column + 1) // 4, frame.height * (2 * row + 1) // 4
    return tuple(int(part) for part in np.asarray(frame)[y, x])


def test_kept_is_as_it_is_set_aside_dimmer_dropped_grey() -> None:
    frame = lit(RED[0], np.array([[2, 1], [0, 2]], np.uint8), (200, 100))
    assert frame.size == (200, 100)
    assert middle(frame, 0, 0) == (250, 0, 0) and middle(frame, 0, 1) == (150, 0, 0)
    grey = middle(frame, 1, 0)
    assert len(set(grey)) == 1 and 60 < grey[0] < 160


def test_what_was_dropped_can_still_be_seen() -> None:
    """In dark and in bright scenes: a thing stands out of its background by some levels."""
    for thing, ground in ((70, 10), (250, 200)):
        pixels: NDArray[np.uint8] = np.full((40, 40, 3), ground, np.uint8)
        pixels[:20, :20] = thing
        frame = lit(pixels, np.zeros((2, 2), np.uint8), (200, 200))
        assert middle(frame, 0, 0)[0] - middle(frame, 1, 1)[0] >= 15 and middle(frame, 1, 1)[0] >= 50


def test_a_line_runs_between_kept_and_dropped() -> None:
    kept = np.array([[True, False], [True, True]])
    assert set(edges(kept)) == {((0, 1), (1, 1)), ((1, 1), (1, 2))}
    frame = np.asarray(lit(RED[0], kept.astype(np.uint8), (200, 100)))
    assert tuple(frame[25, 100]) == tuple(frame[50, 150]) == EDGE and tuple(frame[50, 50]) != EDGE
    assert EDGE not in {tuple(pixel) for pixel in np.asarray(lit(RED[0], np.ones((2, 2), np.uint8), (9, 9)))[0]}


def places(sheet: Image.Image) -> int:
    """How many columns of the sheet hold any red."""
    pixels = np.asarray(sheet).astype(int)
    return int(((pixels[..., 0] > 120) & (pixels[..., 1] < 40)).any(0).sum())


@pytest.mark.parametrize(("count", "columns"), [(1, 1), (3, 3), (9, 4), (32, 6)])
@pytest.mark.parametrize("shape", [(1920, 1080), (448, 448), (720, 1280), (40, 4000)])
def test_frames_have_their_own_shape_and_room(count: int, columns: int, shape: tuple[int, int]) -> None:
    shown = Shown(RED[:1].repeat(count, 0), shape, np.arange(count, dtype=np.float64))
    kept = np.arange(4 * count, dtype=np.int32)
    sheet = contact_sheet(shown, kept, np.ones(4 * count, np.bool_), 4, "What?", "Nothing.")
    assert sheet.width <= WIDE + MARGIN
    red = (np.asarray(sheet).astype(int)[..., 0] == 250) & (np.asarray(sheet)[..., 1] == 0)
    row = red[np.flatnonzero(red.any(1))[0]]
    wide = int(row.sum()) / columns
    tall = int(red[:, MARGIN + 1].sum()) / -(-count // columns)
    if shape[0] <= 2 * shape[1] and shape[1] <= 2 * shape[0]:
        assert wide / tall == pytest.approx(shape[0] / shape[1], rel=0.02)
    assert max(wide, tall) >= 250  # to be read


def test_a_sheet_says_what_was_asked_and_answered_and_when() -> None:
    """Every text leaves other pixels."""
    shown = Shown(RED, (40, 40), np.arange(3.0))

    def pixels(shown: Shown = shown, question: str = "What?", answer: str = "Red.") -> bytes:
        return contact_sheet(shown, KEPT, ACTIVE, 4, question, answer).tobytes()

    others = [
        pixels(question="Why?"),
        pixels(answer="Blue."),
        pixels(Shown(RED, (40, 40), np.arange(3.0) + np.float64(0.5))),
    ]
    assert len({pixels(), *others, pixels(Shown(RED, (40, 40), None))}) == 5


def test_long_texts_are_cut(tmp_path: Path) -> None:
    shown = Shown(RED, (40, 40), None)
    long = contact_sheet(shown, KEPT, ACTIVE, 4, "why " * 2000, "because " * 2000)
    one_word = contact_sheet(shown, KEPT, ACTIVE, 4, "w" * 150, "because")
    assert one_word.height > contact_sheet(shown, KEPT, ACTIVE, 4, "w" * 10, "because").height  # on several lines
    assert long.height < 2 * contact_sheet(shown, KEPT, ACTIVE, 4, "why", "because").height


def test_run_writes_the_sheet(tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.png"
    ask = ["run", str(tiny_bundle), "--video", "examples/clip.mp4", "--num-frames", "9", "--prompt", "What?"]
    assert main([*ask, "--max-new-tokens", "3", "--explain", str(out)]) == 0
    with Image.open(out) as sheet:
        assert sheet.width == WIDE and len(np.unique(np.asarray(sheet))) > 50
        grey = (np.ptp(np.asarray(sheet).astype(int), axis=2) == 0) & (np.asarray(sheet)[..., 0] < 200)
        assert grey.mean() > 0.2  # most tokens are dropped
    assert str(out) in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["out.png"]


def test_what_is_shown_are_the_frames_that_were_asked_about(tmp_path: Path) -> None:
    clip = clips.write_clip(tmp_path / "clip.mp4", size=(96, 64))
    shown = open_shown(str(clip), None, Clip(num_frames=4))
    assert shown.shape == (96, 64) and shown.pixels.shape == (4, SHARP, SHARP, 3)
    assert shown.times is not None and len(shown.times) == 4 and shown.times[0] == 0
    Image.new("RGB", (30, 70)).save(tmp_path / "a.png")
    picture = open_shown(None, str(tmp_path / "a.png"), Clip())
    assert picture.shape == (30, 70) and picture.times is None and len(picture.pixels) == 1


@pytest.mark.parametrize(
    ("extra", "hint"),
    [
        (["--video", "examples/clip.mp4", "--explain", "out.jpg"], "--explain out.png"),
        (["--video", "examples/clip.mp4", "--explain", "nowhere/out.png"], "no folder nowhere"),
        (["--explain", "out.png"], "add --video or --image"),
    ],
)
def test_a_sheet_that_cannot_be_is_refused_first(
    tiny_bundle: Path, capsys: pytest.CaptureFixture[str], extra: list[str], hint: str
) -> None:
    assert main(["run", str(tiny_bundle), "--prompt", "What?", *extra]) == 2
    error = capsys.readouterr().err
    assert hint in error and error.count("\n") == 1
