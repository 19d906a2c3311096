"""What is said of videos that cannot be read, and how images are read."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from dycoke_edge.config import Clip
from dycoke_edge.errors import DycokeEdgeError, InputError, UsageError
from dycoke_edge.runtime.budget import TooLarge, passes
from dycoke_edge.runtime.video import open_visual, read_image
from tests import clips
from tests.clips import SIZE, marks

CUTTABLE = ("h264-mkv", "h264-avi", "mpeg4-avi", "mpeg2-mpg", "vp9-webm", "mjpeg-avi")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A clip of 60 frames, 12 a second, of one of clips.KINDS; written once."""
    folder, done = tmp_path_factory.mktemp("clips"), dict[str, Path]()

    def make(kind: str) -> Path:
        if kind not in done:
            done[kind] = clips.cfr(folder, kind, frames=60)
        return done[kind]

    return make


def complaint(kind: type[DycokeEdgeError], path: Path, **options: float) -> str:
    with pytest.raises(kind) as caught:
        marks(path, **options)
    assert type(caught.value) is kind
    text = str(caught.value)
    assert "\n" not in text and path.name in text
    return text


# What cannot be read


def test_paths_that_are_no_file(tmp_path: Path) -> None:
    (tmp_path / "empty.mp4").touch()
    for name, word in [("no.mp4", "does not exist"), ("", "folder"), ("empty.mp4", "empty")]:
        assert word in (text := complaint(InputError, tmp_path / name)) and "--video" in text


def test_files_that_are_no_video(tmp_path: Path) -> None:
    text = "a line of text\n" * 200
    (tmp_path / "text.mp4").write_text(text)
    (tmp_path / "text.txt").write_text(text)
    (tmp_path / "noise.mkv").write_bytes(np.random.default_rng(0).bytes(5000))
    clips.sound_only(tmp_path / "sound.mp4")
    clips.no_frames(tmp_path / "none.avi")
    for name, word in [
        ("text.mp4", "cannot be read"),
        ("text.txt", "text"),
        ("noise.mkv", "cannot be read"),
        ("sound.mp4", "no video stream"),
        ("none.avi", "no video frames"),
    ]:
        assert word in (told := complaint(InputError, tmp_path / name)) and "--video" in told


def test_an_mp4_without_its_index(made: Callable[[str], Path]) -> None:
    path = clips.cut(made("h264-mp4"), 0.5)
    assert "cannot be read" in complaint(InputError, path, num_frames=4)


@pytest.mark.parametrize("kind", [*CUTTABLE, "faststart"])
def test_a_file_cut_short_says_where_and_its_advice_works(
    kind: str, made: Callable[[str], Path], tmp_path: Path
) -> None:
    if kind == "faststart":
        whole = clips.b_frames(tmp_path / "f.mp4", frames=60, mux={"movflags": "faststart"})
        path = clips.cut(whole, 0.8)
    else:
        path = clips.cut(made(kind), 0.7)
    text = complaint(InputError, path, num_frames=4)
    assert "breaks at" in text and "frames" in text
    end = float(text.split("use --end ")[1].split()[0])
    assert end > 0.5
    expected = list(range(int(np.ceil(end * 12 - 0.02))))
    assert marks(path, num_frames=99, end=end) == expected


def test_damage_in_the_middle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rough, mark = np.random.default_rng(0), clips.mark

    def noisy(index: int, width: int, height: int) -> NDArray[np.uint8]:
        grain = rough.integers(0, 40, (height, width, 3))
        return (mark(index, width, height) * 0.8 + grain).astype(np.uint8)

    monkeypatch.setattr(clips, "mark", noisy)
    path = clips.cfr(tmp_path, "h264-ts", frames=60)
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 3000] = rough.bytes(3000)
    path.write_bytes(data)
    text = complaint(InputError, path, num_frames=60)
    assert "breaks at" in text and "--end" in text
    assert marks(path, num_frames=99, end=1) == list(range(12))


# Pipes, addresses


def test_a_pipe_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "clip.mp4")  # nobody writes to it
    assert "is a pipe" in complaint(InputError, tmp_path / "clip.mp4")
    ours, theirs = os.pipe()
    try:
        with pytest.raises(InputError, match="is a pipe, and its beginning is needed twice; write it to a file"):
            open_visual(f"/dev/fd/{ours}", Clip(), SIZE)
        with pytest.raises(InputError, match="is a pipe"):
            read_image(f"/dev/fd/{ours}", SIZE)
    finally:
        os.close(ours)
        os.close(theirs)
    assert "is a device" in complaint(InputError, Path("/dev/zero"))


@pytest.mark.parametrize("address", ["rtsp://admin:secret@cam/live", "https://host/secret.mp4", "RTSPS://h/secret"])
def test_an_address_is_no_file(address: str) -> None:
    for given in (address, Path(address)):
        with pytest.raises(InputError) as caught:
            open_visual(given, Clip(), SIZE)
        assert "--video takes a file" in str(caught.value) and "watch or ask" in str(caught.value)
        assert "secret" not in str(caught.value)


# Animations, and sizes that are wrong


@pytest.mark.parametrize("name", ["clip.webp", "clip.png"])
def test_animations_that_pillow_plays(name: str, tmp_path: Path) -> None:
    drawn = [Image.fromarray(clips.mark(k)) for k in range(12)]
    lengths = [125] * 3 + [1000] + [0] * 4 + [125] * 4  # milliseconds; 0 is 100, as browsers show it
    drawn[0].save(tmp_path / name, save_all=True, append_images=drawn[1:], duration=lengths, lossless=True)
    times = np.cumsum([0.0] + [length / 1000 or 0.1 for length in lengths])
    frames = open_visual(tmp_path / name, Clip(num_frames=99), SIZE)
    assert clips.read_marks(frames.pixels) == list(range(12))
    np.testing.assert_allclose(frames.times, times[:-1])
    assert clips.read_marks(open_visual(tmp_path / name, Clip(num_frames=3), SIZE).pixels) == [0, 4, 8]
    assert clips.read_marks(open_visual(tmp_path / name, Clip(fps=2), SIZE).pixels) == [0, 3, 5, 9]
    assert clips.read_marks(open_visual(tmp_path / name, Clip(start=0.2, end=1.6), SIZE).pixels) == [2, 3, 4, 5, 6]
    with pytest.raises(UsageError, match="--start"):
        open_visual(tmp_path / name, Clip(start=9), SIZE)
    with pytest.raises(InputError, match="cannot be read"):
        open_visual(clips.cut(tmp_path / name, 0.6), Clip(num_frames=99), SIZE)


def test_the_picture_for_programs_that_know_no_animations_is_none(tmp_path: Path) -> None:
    drawn = [Image.fromarray(clips.mark(k)) for k in range(4)]
    drawn[0].save(tmp_path / "a.png", save_all=True, append_images=drawn[1:], duration=100, default_image=True)
    assert clips.read_marks(open_visual(tmp_path / "a.png", Clip(), SIZE).pixels) == [1, 2, 3]


@pytest.mark.parametrize("off", [-8, -1, 1, 2, 8])
def test_a_riff_size_that_is_off_by_some_bytes_is_no_damage(off: int, tmp_path: Path) -> None:
    drawn = [Image.fromarray(clips.mark(k)) for k in range(3)]
    drawn[0].save(tmp_path / "still.webp", lossless=True)
    drawn[0].save(tmp_path / "a.webp", save_all=True, append_images=drawn[1:], lossless=True)
    for path, frames in (
        (clips.cfr(tmp_path, "mpeg4-avi"), 24),
        (clips.write_jpegs(tmp_path / "exif.avi"), 12),
        (tmp_path / "still.webp", 1),
        (tmp_path / "a.webp", 3),
    ):
        data = bytearray(path.read_bytes())
        data[4:8] = (int.from_bytes(data[4:8], "little") + off).to_bytes(4, "little")
        path.write_bytes(data)
        shown = open_visual(path, Clip(num_frames=99), SIZE)
        assert clips.read_marks(shown.pixels) == list(range(frames))


# Pixels


def more_passes(path: Path, passes: int) -> Path:
    """A JPEG whose last scan is there so many times more."""
    data = path.read_bytes()
    scan, end = data.rindex(b"\xff\xda"), data.rindex(b"\xff\xd9")
    path.write_bytes(data[:end] + data[scan:end] * passes + data[end:])
    return path


def test_a_picture_of_too_many_pixels_is_not_decoded(tmp_path: Path, made: Callable[[str], Path]) -> None:
    drawn = Image.fromarray(clips.mark(1, 640, 480))
    drawn.save(tmp_path / "a.png")
    drawn.quantize().save(tmp_path / "b.gif")
    screen = bytearray((tmp_path / "b.gif").read_bytes())
    screen[6:10] = bytes((8, 0, 8, 0))  # the screen is smaller than what is shown on it
    (tmp_path / "b.gif").write_bytes(screen)
    for path in (tmp_path / "a.png", tmp_path / "b.gif"):
        assert len(open_visual(path, Clip(max_pixels=640 * 480), SIZE).pixels) == 1
        with pytest.raises(InputError, match="is 640 x 480 pixels; at most 307199 in all"):
            open_visual(path, Clip(max_pixels=640 * 480 - 1), SIZE)
        with pytest.raises(InputError, match="is 640 x 480 pixels; at most 307199 in all"):
            read_image(path, SIZE, max_pixels=640 * 480 - 1)
    assert "is 128 x 96 pixels; at most 12287" in complaint(TooLarge, made("h264-mp4"), max_pixels=128 * 96 - 1)
    assert marks(made("h264-mp4"), max_pixels=128 * 96, num_frames=1) == [0]
    Image.new("1", (20_000, 20_000)).save(tmp_path / "bomb.png")
    with pytest.raises(InputError, match="has more than 36000000 pixels"):
        read_image(tmp_path / "bomb.png", SIZE)


def test_a_stream_that_grows_beyond_its_pixels(tmp_path: Path) -> None:
    parts = [clips.write_clip(tmp_path / f"{width}.h264", size=(width, 96), frames=4) for width in (128, 256)]
    both = tmp_path / "both.h264"
    both.write_bytes(b"".join(part.read_bytes() for part in parts))
    assert len(marks(both)) == 8
    assert "damaged" in complaint(InputError, both, max_pixels=128 * 96)


def test_a_jpeg_that_goes_over_its_pixels_too_often(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    Image.fromarray(clips.mark(7)).save(path, progressive=True, quality=95)
    count, pixels = passes(path.read_bytes())
    assert 1 < count < 16 and pixels == 128 * 96
    assert passes(more_passes(path, 100).read_bytes()) == (count + 100, pixels)
    most = 128 * 96 * 4
    with pytest.raises(InputError, match=f"goes over 12288 pixels {count + 100} times"):
        read_image(path, SIZE, max_pixels=most)
    assert clips.read_marks(read_image(path, SIZE).pixels) == [7]  # a small picture, far from a minute's work
    row = tmp_path / "row.mjpeg"
    row.write_bytes(path.read_bytes() * 3)
    assert len(marks(row)) == 3
    assert f"{count + 100} times" in complaint(TooLarge, row, max_pixels=most)


def test_what_stands_beside_a_jpeg_is_no_pass_over_it(tmp_path: Path) -> None:
    inside, exif = tmp_path / "thumbnail.jpg", Image.Exif()
    Image.fromarray(clips.mark(7)).save(inside, progressive=True)
    exif[0x9286] = more_passes(inside, 200).read_bytes()  # a comment
    Image.fromarray(clips.mark(7)).save(tmp_path / "a.jpg", exif=exif)
    data = (tmp_path / "a.jpg").read_bytes()
    assert data.count(b"\xff\xda") > 200 and passes(data + b"\xff\xda" * 999) == (1, 128 * 96)


def test_start_behind_the_end(made: Callable[[str], Path]) -> None:
    for kind in clips.KINDS:
        text = complaint(UsageError, made(kind), start=5.5)
        assert "--start" in text and ("5.0" in text or kind.endswith("raw"))


# Images


def test_an_image_is_a_clip_of_one_frame(tmp_path: Path) -> None:
    Image.fromarray(clips.mark(77)).save(tmp_path / "a.png")
    frames = read_image(tmp_path / "a.png", SIZE)
    assert frames.pixels.shape == (1, SIZE, SIZE, 3) and frames.pixels.dtype == np.uint8
    assert clips.read_marks(frames.pixels) == [77] and frames.times.tolist() == [0.0]


def test_exif_orientation(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn a quarter clockwise to see it upright
    Image.fromarray(clips.mark(5)).save(tmp_path / "a.jpg", exif=exif, quality=100)
    Image.fromarray(clips.mark(5)).save(tmp_path / "b.jpg", quality=100)
    turned, straight = (read_image(tmp_path / name, SIZE).pixels[0] for name in ("a.jpg", "b.jpg"))
    assert np.abs(turned.astype(int) - np.rot90(straight, -1)).max() <= 2


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1", "I;16", "LA"])
def test_images_of_every_mode(mode: str, tmp_path: Path) -> None:
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    if mode == "I;16":
        Image.fromarray(clips.mark(9)[..., 0].astype(np.uint16) * 256).save(path)
    else:
        Image.fromarray(clips.mark(9)).convert(mode).save(path)
    assert clips.read_marks(read_image(path, SIZE).pixels) == [9]


def test_images_that_cannot_be_read(tmp_path: Path) -> None:
    Image.fromarray(clips.mark(9)).save(tmp_path / "a.png")
    clips.cut(tmp_path / "a.png", 0.6)
    (tmp_path / "text.jpg").write_text("text")
    (tmp_path / "empty.jpg").touch()
    for name in ("cut-a.png", "text.jpg", "empty.jpg", "none.jpg", ""):
        with pytest.raises(InputError) as caught:
            read_image(tmp_path / name, SIZE)
        assert "--image" in str(caught.value) and "\n" not in str(caught.value)


def test_content_decides_what_is_a_video(made: Callable[[str], Path], tmp_path: Path) -> None:
    def seen(path: Path) -> list[int]:
        return clips.read_marks(open_visual(path, Clip(num_frames=2), SIZE).pixels)

    Image.fromarray(clips.mark(3)).save(tmp_path / "a.png")
    (tmp_path / "a.png").rename(tmp_path / "image.mp4")
    (tmp_path / "video.jpg").write_bytes(made("h264-mp4").read_bytes())
    Image.fromarray(clips.mark(4)).save(tmp_path / "still.gif")
    assert seen(tmp_path / "image.mp4") == [3]
    assert seen(tmp_path / "video.jpg") == [0, 30]
    assert seen(tmp_path / "still.gif") == [4]
    for kind in ("gif", "mpeg2-mpg", "mjpeg-raw"):
        assert seen(made(kind)) == [0, 30]
    with pytest.raises(InputError, match="does not exist"):
        seen(tmp_path / "none")
