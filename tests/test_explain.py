"""The contact sheet of `run --explain`: what is bright was kept."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dycoke_edge.cli import main
from dycoke_edge.runtime.explain import CAPTION, GAP, SIDE, Seen, contact_sheet

WHITE = np.full((3, 28, 28, 3), 255, np.uint8)


def _cell(sheet: Image.Image, frame: int, row: int, column: int) -> int:
    """The brightness in the middle of a cell of a grid of two by two."""
    x = GAP + frame * (SIDE + GAP) + column * SIDE // 2 + SIDE // 4
    y = GAP + CAPTION + row * SIDE // 2 + SIDE // 4
    return int(np.asarray(sheet)[y, x].max())


def test_kept_is_bright_set_aside_dimmer_dropped_dark() -> None:
    kept = np.array([0, 1, 2, 3, 6, 9], np.int32)  # frame 0 whole, one token of each other frame
    active = np.array([True, True, True, False, True, False])
    sheet = contact_sheet(Seen(WHITE, kept), active, 4)
    assert [_cell(sheet, 0, *divmod(cell, 2)) for cell in range(4)] == [255, 255, 255, 140]
    assert [_cell(sheet, 1, *divmod(cell, 2)) for cell in range(4)] == [45, 45, 255, 45]
    assert [_cell(sheet, 2, *divmod(cell, 2)) for cell in range(4)] == [45, 140, 45, 45]


def test_run_writes_the_sheet(tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.png"
    ask = ["run", str(tiny_bundle), "--video", "examples/clip.mp4", "--num-frames", "9", "--prompt", "What?"]
    assert main([*ask, "--max-new-tokens", "3", "--explain", str(out)]) == 0
    with Image.open(out) as sheet:
        assert sheet.size == (8 * (SIDE + GAP) + GAP, 2 * (SIDE + CAPTION + GAP) + GAP)
        assert len(np.unique(np.asarray(sheet))) > 50
    assert str(out) in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["out.png"]


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
