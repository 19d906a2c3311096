"""Which frames are read from a clip, and how they are turned, coloured and scaled."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from dycoke_edge.config import Clip
from dycoke_edge.runtime import pictures, video
from dycoke_edge.runtime.camera.frame import Frame
from dycoke_edge.runtime.camera.source import open_source
from dycoke_edge.runtime.container import Index
from dycoke_edge.runtime.video import read_video, sample_fps, sample_indices
from tests import clips
from tests.clips import SIZE, marks

UNTIMED = (
    "h264-raw",
    "mjpeg-raw",
)  # no times in the file: FFmpeg plays these at 25 frames a second


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A clip of 60 frames, 12 a second, of one of clips.KINDS; written once."""
    folder, done = tmp_path_factory.mktemp("clips"), dict[str, Path]()

    def make(kind: str) -> Path:
        if kind not in done:
            done[kind] = clips.cfr(folder, kind, frames=60)
        return done[kind]

    return make


# Which frames: the rule


@settings(deadline=None)
@given(st.integers(1, 100_000), st.integers(1, 512))
def test_sample_indices_is_the_rule_of_transformers(total: int, num_frames: int) -> None:
    video_utils = pytest.importorskip("transformers.video_utils")
    ours = sample_indices(total, num_frames)
    if num_frames > total:  # they raise; we take every frame once
        assert ours.tolist() == list(range(total))
        return
    metadata = video_utils.VideoMetadata(total_num_frames=total, fps=25.0)
    theirs = video_utils.default_sample_indices_fn(metadata, num_frames=num_frames)
    assert ours.tolist() == theirs.tolist()


def test_sample_indices_is_the_rule_of_earlier_transformers_without_its_rounding() -> None:
    torch = pytest.importorskip("torch")
    differing = 0
    for total in range(1, 200):
        for num_frames in range(1, total + 1):
            theirs = torch.arange(0, total, total / num_frames).int().tolist()[:num_frames]
            gap = np.abs(sample_indices(total, num_frames) - np.array(theirs))
            assert gap.max() <= 1  # a product that should be whole and came out just below it
            differing += gap.any()
    assert differing < 0.05 * 200 * 100


@pytest.mark.parametrize(
    ("rate", "fps", "expected"),
    [
        (12, 4, [0, 3, 6, 9, 12, 15, 18, 21]),
        (12, 12, list(range(24))),
        (12, 100, list(range(24))),
        (12, 5, [0, 2, 4, 7, 9, 12, 14, 16, 19, 21]),
        (12, 0.1, [0]),
    ],
)
def test_sample_fps_takes_what_is_on_the_screen(rate: int, fps: float, expected: list[int]) -> None:
    times = np.arange(24) / rate
    assert sample_fps(times, fps, 0, 2).tolist() == expected
    assert sample_fps(times.round(3), fps, 0, 2).tolist() == expected  # as Matroska stores them
    assert sample_fps(times + 7, fps, 7, 9).tolist() == expected


def test_sample_fps_follows_the_times_of_a_variable_rate() -> None:
    times = np.array([0, 0.1, 0.15, 1, 1.01, 3])
    assert sample_fps(times, 2, 0, 4).tolist() == [0, 2, 3, 4, 5]
    assert sample_fps(times, 1.9, 0, 4).tolist() == [0, 2, 4, 5]


# Which frames: the file


@pytest.mark.parametrize("kind", clips.KINDS)
def test_exactly_the_frames_asked_for(kind: str, made: Callable[[str], Path]) -> None:
    rate = 25 if kind in UNTIMED else 12
    path = made(kind)
    frames = read_video(path, Clip(num_frames=7), SIZE)
    expected = sample_indices(60, 7)
    assert clips.read_marks(frames.pixels) == expected.tolist()
    np.testing.assert_allclose(frames.times, expected / rate, atol=0.01)
    assert marks(path, num_frames=60) == list(range(60))
    assert marks(path, num_frames=500) == list(range(60))
    assert marks(path, num_frames=1) == [0]


@pytest.mark.parametrize("kind", clips.KINDS)
def test_start_and_end_to_the_frame(kind: str, made: Callable[[str], Path]) -> None:
    rate = 25 if kind in UNTIMED else 12
    path, first, last = made(kind), int(np.ceil(1.5 * rate)), int(np.ceil(2.25 * rate))
    inside = np.arange(first, last)
    assert marks(path, start=1.5, end=2.25, num_frames=99) == inside.tolist()
    picked = inside[sample_indices(len(inside), 4)]
    assert marks(path, start=1.5, end=2.25, num_frames=4) == picked.tolist()
    if rate == 12:
        assert marks(path, start=1.5, end=2.5, fps=4) == [18, 21, 24, 27]
        assert marks(path, start=4.95, num_frames=3) == [59]  # nothing new appears: the last one
        assert marks(path, start=4.5, end=1e6, num_frames=99) == list(range(54, 60))


def test_variable_frame_rate(tmp_path: Path) -> None:
    path = clips.write_clip(tmp_path / "v.mkv", frames=6, times=[0, 0.1, 0.15, 1, 1.01, 3])
    assert marks(path, num_frames=6) == [0, 1, 2, 3, 4, 5]
    assert marks(path, fps=1.9) == [0, 2, 4]  # the last one is on for 1/12 s
    assert marks(path, fps=2) == [0, 2, 3, 4, 5]
    assert marks(path, start=0.5, end=2) == [3, 4]
    assert marks(path, start=2, end=2.5) == [4]  # on the screen from 1.01 to 3


def test_a_recording_whose_times_do_not_begin_at_zero(tmp_path: Path) -> None:
    times = [100 + index / 12 for index in range(24)]
    for suffix in (".mkv", ".ts", ".mp4"):
        path = clips.write_clip(tmp_path / f"late{suffix}", times=times, options=clips.H264)
        frames = read_video(path, Clip(start=0.5, end=1.0), SIZE)
        assert clips.read_marks(frames.pixels) == list(range(6, 12))
        np.testing.assert_allclose(frames.times, np.arange(6, 12) / 12, atol=0.002)


def test_a_recording_that_begins_between_keyframes(tmp_path: Path) -> None:
    data = clips.cfr(tmp_path, "h264-ts", frames=40).read_bytes()
    path = tmp_path / "joined.ts"
    path.write_bytes(data[188 * 20 :])
    seen = marks(path, num_frames=99)
    assert seen == list(range(seen[0], 40)) and 0 < seen[0] <= 16


GOPS = {
    "one": (
        "libx264",
        {"g": "250", "bf": "2", "x264-params": "scenecut=0"},
    ),  # more than HEAD pictures before the start
    "open": ("libx264", {"g": "12", "bf": "3", "x264-params": "open-gop=1:b-adapt=0:scenecut=0"}),
    "hevc": ("libx265", {"x265-params": "log-level=none:keyint=20:bframes=3"}),
    "plain": ("mpeg4", {"g": "20"}),
}


@pytest.mark.parametrize("suffix", [".mp4", ".mov"])
@pytest.mark.parametrize("kind", GOPS)
def test_a_trimmed_file_begins_where_its_edit_list_says(kind: str, suffix: str, tmp_path: Path) -> None:
    codec, options = GOPS[kind]
    whole = clips.write_clip(tmp_path / "whole.mp4", codec=codec, options=options, frames=72)
    for start, first in ((0.42, 6), (2.3, 28), (3.95, 48)):
        path = clips.trimmed(whole, start, suffix)
        frames = read_video(path, Clip(num_frames=500), SIZE)
        assert clips.read_marks(frames.pixels) == list(range(first, 72))
        np.testing.assert_allclose(frames.times, np.arange(72 - first) / 12, atol=0.001)
        assert marks(path, start=0.5, end=1.0, num_frames=99) == list(range(first + 6, first + 12))
        assert clips.read_marks(np.stack([frame.image for frame in _source(path)])) == list(range(first, 72))


@pytest.mark.parametrize("kind", GOPS)
def test_edits(kind: str, tmp_path: Path) -> None:
    codec, options = GOPS[kind]
    whole = clips.write_clip(tmp_path / "whole.mp4", codec=codec, options=options, frames=72)
    for edits, expected in (
        ([(0.5, None), (6.0, 0.0)], range(72)),  # shown half a second late
        ([(0.5, None), (5.0, 0.42)], range(6, 66)),
        ([(1.5, 0.42)], range(6, 24)),
    ):
        path = clips.edited(whole, edits)
        frames = read_video(path, Clip(num_frames=500), SIZE)
        assert clips.read_marks(frames.pixels) == list(expected)
        np.testing.assert_allclose(frames.times, np.arange(len(expected)) / 12, atol=0.001)
        assert marks(path, start=1.0, end=1.5, num_frames=99) == list(expected[12:18])
        assert clips.read_marks(np.stack([frame.image for frame in _source(path)])) == list(expected)


def test_several_edits(tmp_path: Path) -> None:
    options = {"g": "25", "bf": "0", "x264-params": "scenecut=0"}
    whole = clips.write_clip(tmp_path / "whole.mp4", options=options, frames=72)
    for starts in ((0.5, 3.0), (3.0, 0.5), (1.0, 1.0)):
        path = clips.edited(whole, [(1.0, start) for start in starts])
        first, second = (list(range(int(start * 12), int(start * 12) + 12)) for start in starts)
        assert marks(path, num_frames=99) == first + second
        assert marks(path, start=0.5, end=1.5, num_frames=99) == first[6:] + second[:6]
        assert clips.read_marks(np.stack([frame.image for frame in _source(path)])) == first + second


def _source(path: Path) -> list[Frame]:
    source = open_source(path)
    source.open()
    try:
        return list(source)
    finally:
        source.close()


@pytest.mark.parametrize("lie", [0, 7, 1000])
def test_the_count_in_the_header_is_not_believed(tmp_path: Path, lie: int) -> None:
    path = clips.cfr(tmp_path, "mjpeg-avi", frames=24)
    data = bytearray(path.read_bytes())
    for field in (data.index(b"avih") + 24, data.index(b"strh") + 40):
        data[field : field + 4] = lie.to_bytes(4, "little")
    path.write_bytes(data)
    assert marks(path, num_frames=4) == [0, 6, 12, 18]


def test_packets_that_promise_frames_the_decoder_does_not_give(
    made: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Path] = []
    count = pictures.count

    def counting(path: Path, end: float | None, most: int) -> Index:
        calls.append(path)
        return count(path, end, most)

    monkeypatch.setattr(video, "count", counting)
    path = made("h264-refresh")  # its "keyframes" show nothing until a few frames later
    assert marks(path, num_frames=4) == [0, 15, 30, 45] and calls == [path]
    assert marks(made("h264-mp4"), num_frames=4) == [0, 15, 30, 45] and calls == [path]


def test_sound_does_not_matter(tmp_path: Path) -> None:
    path = clips.write_clip(tmp_path / "loud.mp4", audio=True)
    assert marks(path, num_frames=3) == [0, 8, 16]


def test_a_name_that_looks_like_a_protocol(tmp_path: Path) -> None:
    path = clips.write_clip(tmp_path / "cam:12:30.mp4", codec="mpeg4", frames=4)
    assert marks(path) == [0, 1, 2, 3]
    assert clips.read_marks(read_video(str(path), Clip(), SIZE).pixels) == [0, 1, 2, 3]


def test_progress_is_told(made: Callable[[str], Path]) -> None:
    told: list[tuple[int, int]] = []
    read_video(made("h264-mp4"), Clip(num_frames=3), 8, lambda *step: told.append(step))
    assert told == [(0, 3), (1, 3), (2, 3), (3, 3)]


# What a frame looks like

TURNS: dict[tuple[int, ...], Callable[[NDArray[np.uint8]], NDArray[np.uint8]]] = {
    (1, 0, 0, 1): lambda image: image,
    (0, 1, -1, 0): lambda image: np.rot90(image, -1),  # a phone held upright
    (-1, 0, 0, -1): lambda image: np.rot90(image, 2),
    (0, -1, 1, 0): lambda image: np.rot90(image, 1),
    (-1, 0, 0, 1): np.fliplr,
    (1, 0, 0, -1): np.flipud,
    (0, 1, 1, 0): lambda image: np.swapaxes(image, 0, 1),
    (0, -1, -1, 0): lambda image: np.rot90(np.swapaxes(image, 0, 1), 2),
}


@pytest.mark.parametrize("matrix", TURNS)
def test_frames_stand_upright(matrix: tuple[int, ...], tmp_path: Path) -> None:
    path = clips.write_clip(tmp_path / "r.mp4", codec="mpeg4", frames=12)
    straight = read_video(path, Clip(start=0.9), SIZE).pixels[-1]
    turned = read_video(clips.turned(path, matrix), Clip(start=0.9), SIZE).pixels[-1]
    np.testing.assert_array_equal(turned, TURNS[matrix](straight))


@pytest.mark.parametrize("suffix", [".avi", ".mkv", ".mov"])
def test_side_data_that_nobody_asked_for_does_not_matter(suffix: str, tmp_path: Path) -> None:
    path = clips.write_jpegs(tmp_path / f"exif{suffix}")
    assert marks(path) == list(range(12))
    assert clips.read_marks(np.stack([frame.image for frame in _source(path)])) == list(range(12))


def test_a_quarter_turn_is_the_one_ffmpeg_means(tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    path = clips.turned(clips.write_clip(tmp_path / "r.mp4", codec="mpeg4"), (0, 1, -1, 0))
    with av.open(str(path)) as container:
        assert next(container.decode(video=0)).rotation == -90  # counterclockwise


@pytest.mark.parametrize("kind", ["h264-mp4", "mjpeg-avi", "vp9-webm"])
def test_colours_and_range(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    colours = np.array([(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)], np.uint8)

    def flat(index: int, width: int, height: int) -> NDArray[np.uint8]:
        return np.tile(colours[index], (height, width, 1))

    monkeypatch.setattr(clips, "mark", flat)
    pixels = read_video(clips.cfr(tmp_path, kind, frames=5), Clip(), SIZE).pixels
    assert np.abs(pixels[:, 24, 24].astype(int) - colours).max() <= 12


def test_memory_does_not_follow_resolution_or_length(tmp_path: Path) -> None:
    def peak(path: Path) -> int:
        tracemalloc.start()
        try:
            read_video(path, Clip(num_frames=8), SIZE)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    large = clips.write_clip(tmp_path / "l.mp4", codec="mpeg4", frames=24, size=(1280, 960))
    long = clips.write_clip(tmp_path / "n.mp4", codec="mpeg4", frames=240, size=(1280, 960))
    one_frame = 1280 * 960 * 3
    assert peak(large) < 4 * one_frame
    assert peak(long) < peak(large) + one_frame / 4
