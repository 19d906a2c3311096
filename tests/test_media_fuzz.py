"""Media with changed headers: frames, or one line that says what is wrong, whatever the bytes are."""

from __future__ import annotations

import random
import warnings
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dycoke_edge import InputError
from dycoke_edge.config import Clip
from dycoke_edge.config_serve import ServeSpec
from dycoke_edge.runtime.serve.media import Media, Wanted
from dycoke_edge.runtime.video import open_visual
from tests import clips
from tests.serving import data_url

CASES, HEAD = 80, 4096  # changed copies of each file; bytes that are changed
MOST = 128 * 96 * 4  # pixels
SPEC = ServeSpec(max_pixels=MOST, max_frames=8, max_video_s=60.0)


def film(path: Path) -> Path:
    return clips.cfr(path.parent, {".mp4": "h264-mp4", ".avi": "mjpeg-avi"}[path.suffix], frames=8)


def picture(path: Path) -> Path:
    Image.fromarray(clips.mark(3)).save(path, progressive=True)
    return path


def animation(path: Path) -> Path:
    first, *others = [Image.fromarray(clips.mark(number)) for number in range(4)]
    first.save(path, save_all=True, append_images=others, duration=100)
    return path


FILES: dict[str, Callable[[Path], Path]] = {
    "a.mp4": film,
    "a.avi": film,
    "a.webp": animation,
    "a.gif": animation,
    "a.jpg": picture,
    "a.png": animation,
}


def changed(whole: bytes, dice: random.Random) -> bytes:
    """A copy with one to four changes to its first bytes."""
    data = bytearray(whole)
    for _ in range(dice.randint(1, 4)):
        if not data:
            break
        at, length = dice.randrange(min(HEAD, len(data))), dice.randint(1, 16)
        match dice.randrange(6):
            case 0:
                data[at] ^= 1 << dice.randrange(8)
            case 1:
                data[at : at + length] = dice.choice((b"\0", b"\xff")) * length
            case 2:
                data[at : at + length] = dice.randbytes(length)
            case 3:
                del data[at : at + length]
            case 4:
                data[at:at] = data[at : at + length]
            case 5 if at > 0:
                del data[at:]
    return bytes(data)


def _pixels(path: Path) -> Any:
    return open_visual(path, Clip(num_frames=3, max_pixels=MOST), clips.SIZE).pixels


def _picture(media: Media, url: str) -> Any:
    return media.image(url)[None]


@pytest.mark.parametrize("name", FILES)
def test_no_header_is_too_strange(name: str, tmp_path: Path) -> None:
    whole, dice, seen = FILES[name](tmp_path / name).read_bytes(), random.Random(5), Counter[str]()
    media = Media(SPEC, clips.SIZE)
    path = tmp_path / f"changed{Path(name).suffix}"
    for number in range(CASES):
        path.write_bytes(changed(whole, dice))
        url = data_url(path)
        reads: tuple[Callable[[], Any], ...] = (
            partial(_pixels, path),
            partial(media.video, url, Wanted(num_frames=3)),
            partial(_picture, media, url),
        )
        for read in reads:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # Pillow's and PyAV's own
                    frames = read()
            except InputError as error:
                seen["refused"] += 1
                assert str(error).isprintable(), (number, error)
            else:
                seen["read"] += 1
                assert frames.shape[0] in (1, 2, 3) and frames.shape[1:] == (clips.SIZE, clips.SIZE, 3), number
    assert min(seen["read"], seen["refused"]) > CASES // 10, seen
