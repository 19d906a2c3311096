"""Where frames come from: URIs, files as `read_video` sees them, broken clocks, the test picture, GStreamer, probe."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from av.container import InputContainer
from PIL import Image

from dycoke_edge.config import Clip
from dycoke_edge.config_camera import ReaderSpec
from dycoke_edge.errors import UsageError
from dycoke_edge.runtime.camera.av_source import AvSource
from dycoke_edge.runtime.camera.clock import SYSTEM
from dycoke_edge.runtime.camera.frame import Frame, Tally
from dycoke_edge.runtime.camera.probe import probe
from dycoke_edge.runtime.camera.source import Source, SourceError, open_source
from dycoke_edge.runtime.camera.timeline import Timeline
from dycoke_edge.runtime.camera.uri import Address, parse_uri
from dycoke_edge.runtime.video import open_visual, read_video
from tests import clips
from tests.clips import read_mark, write_clip
from tests.servers import rtsp

SIZE = clips.SIZE


def read(uri: str | Path, **options: Any) -> list[Frame]:
    """All frames of something that ends."""
    source = open_source(uri, ReaderSpec(size=SIZE, **options))
    return list(frames(source))


def frames(source: Source) -> Iterator[Frame]:
    try:
        source.open()
        yield from source
    finally:
        source.close()


# URIs


@pytest.mark.parametrize(
    ("uri", "kind", "target"),
    [
        ("rtsp://u:p@ss@cam:554/live", "rtsp", "rtsp://u:p@ss@cam:554/live"),
        ("RTSPS://cam/live", "rtsp", "RTSPS://cam/live"),
        ("rtsp://u:1%23p@cam:554/a@b#c", "rtsp", "rtsp://u:1%23p@cam:554/a@b#c"),
        ("rtsp://10.0.0.5:554/user=a&password=b@c", "rtsp", "rtsp://10.0.0.5:554/user=a&password=b@c"),
        ("rtsp://cam/a@b", "rtsp", "rtsp://cam/a@b"),
        ("file:///data/a%20b.mp4", "file", "/data/a b.mp4"),
        ("data/clip:1.mp4", "file", "data/clip:1.mp4"),
        (Path("/data/clip.mp4"), "file", "/data/clip.mp4"),
        (2, "v4l2", "/dev/video2"),
        ("0", "v4l2", "/dev/video0"),
        ("/dev/video1", "v4l2", "/dev/video1"),
        ("v4l2:///dev/video1?fps=5", "v4l2", "/dev/video1"),
        ("csi://1", "csi", "1"),
        ("test://?fps=10&seconds=5", "test", "?fps=10&seconds=5"),
        ("gst://videotestsrc ! videoscale", "gst", "videotestsrc ! videoscale"),
    ],
)
def test_uris(uri: str | int | Path, kind: str, target: str) -> None:
    address = parse_uri(uri)
    assert (address.kind, address.target) == (kind, target)


@pytest.mark.parametrize(
    ("uri", "word"),
    [
        ("", "empty"),
        ("http://cam/live", "scheme"),
        ("exec:///bin/sh", "scheme"),
        ("rtsp://", "host"),
        ("rtsp://cam:99999/live", "port"),
        ("rtsp://u:p/w@cam/live", "%2F"),
        ("rtsp://[::1/live", "host"),
        ("rtsp://admin:12#p w@cam/live", "%20"),
        ("rtsp://admin:1234#secret@cam/live", "%23"),
        ("rtsp://admin:1234#secret@10.0.0.5:554/live", "%23"),
        ("rtsp://10.0.0.5:12#secret@cam/live", "%23"),
        ("rtsp://admin#secret@cam/live", "%23"),
        ("rtsp://admin:12/secret@cam/live", "%2F"),
        ("rtsp://admin:12?secret@cam/live", "%3F"),
        ("rtsp://u:p w@cam/live", "%20"),
        ("test://?frames=3", "frames"),
        ("test://?fps=0", "fps"),
        ("test://?fps=1e9", "fps"),
        ("test://?width=999999", "width"),
        ("csi://front", "csi://0"),
        ("gst://", "pipeline"),
        (-1, "-1"),
    ],
)
def test_uris_that_nobody_understands(uri: str | int, word: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_uri(uri)
    assert word in str(caught.value) and "\n" not in str(caught.value) and "p w@" not in str(caught.value)
    assert "secret" not in str(caught.value)


def test_pipelines_only_where_allowed() -> None:
    with pytest.raises(UsageError, match="allow_gst"):
        open_source("gst://videotestsrc")


@pytest.mark.parametrize("uri", ["rtsp://u:secret@cam/x", "v4l2:///dev/video0"])
def test_addresses_hide_their_credentials(uri: str) -> None:
    assert "secret" not in repr(parse_uri(uri))


# Files


@pytest.mark.parametrize("fps", [3.0, 5.0, 30.0])
@pytest.mark.parametrize(
    "kind", ["h264-mp4", "h264-mkv", "h264-ts", "h264-open-gop", "h265-mp4", "vp9-webm", "mjpeg-avi"]
)
def test_a_file_gives_what_read_video_gives(kind: str, fps: float, tmp_path: Path) -> None:
    path = clips.cfr(tmp_path, kind)
    wanted = read_video(path, Clip(fps=fps), SIZE)
    got = read(path, fps=fps)
    assert [frame.pts_s for frame in got] == pytest.approx(wanted.times.tolist())
    assert all(np.array_equal(frame.image, image) for frame, image in zip(got, wanted.pixels, strict=True))


@pytest.mark.parametrize("kind", ["h264-raw", "h264-avi", "mpeg4-avi", "mpeg2-mpg"])
def test_files_without_usable_stamps(kind: str, tmp_path: Path) -> None:
    got = read(clips.cfr(tmp_path, kind))
    assert [read_mark(frame.image) for frame in got] == list(range(24))


@pytest.mark.parametrize("fps", [0.5, 2.0])
def test_uneven_times(fps: float, tmp_path: Path) -> None:
    path = write_clip(tmp_path / "vfr.mkv", frames=8, times=[0, 0.04, 0.5, 0.51, 3.9, 4.0, 4.0 + 1 / 25, 8])
    wanted = read_video(path, Clip(fps=fps), SIZE)
    assert [read_mark(frame.image) for frame in read(path, fps=fps)] == clips.read_marks(wanted.pixels)


def test_all_frames_as_they_are(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "clip.mp4")
    source = open_source(path)
    info = source.open()
    got = list(source)
    source.close()
    assert (info.codec, info.width, info.height, info.fps) == ("h264", 128, 96, 12)
    assert not info.live and info.finite
    assert [frame.index for frame in got] == list(range(24)) and got[0].image.shape == (96, 128, 3)
    assert source.tally == Tally(24, 0, source.tally.dropped, source.tally.last_packet, source.tally.last_picture)


def test_a_turned_recording_is_upright(tmp_path: Path) -> None:
    path = clips.turned(write_clip(tmp_path / "clip.mp4"), (0, 1, -1, 0))
    wanted = read_video(path, Clip(fps=3), SIZE)
    assert np.array_equal([frame.image for frame in read(path, fps=3)], wanted.pixels)


def test_a_pipe_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "clip.mp4")
    with pytest.raises(SourceError, match="is a pipe; write it to a file first"):
        read(tmp_path / "clip.mp4")


@pytest.mark.parametrize(
    ("content", "code"), [(None, "not_found"), (b"", "unreadable"), (b"no video\n" * 99, "unreadable")]
)
def test_files_that_cannot_be_read(content: bytes | None, code: str, tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SourceError) as caught:
        read(path)
    assert caught.value.code == code and str(path) in str(caught.value)
    assert caught.value.__context__ is None, "FFmpeg's own error, which may hold a password, hangs on to it"


def test_a_folder_and_a_device_that_is_not_there(tmp_path: Path) -> None:
    for uri, code in ((tmp_path, "unreadable"), ("/dev/video250", "not_found")):
        with pytest.raises(SourceError) as caught:
            read(uri)
        assert caught.value.code == code and not caught.value.patient, "it may come back at any moment"


def test_sound_alone_is_no_video(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no video"):
        read(clips.sound_only(tmp_path / "sound.mp4"))


def test_a_title_in_another_encoding_is_no_damage(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.mp4", title="abcdefg", frames=4)
    path.write_bytes(path.read_bytes().replace(b"abcdefg", "Entr\u00e9e.".encode("latin-1")))
    assert clips.marks(path) == [read_mark(frame.image) for frame in read(path)] == [0, 1, 2, 3]


def test_damage_costs_pictures_up_to_the_next_key_frame(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "clip.ts", frames=48, options={"bf": "0", "g": "8", "x264-params": "scenecut=0"})
    data = bytearray(path.read_bytes())
    at = len(data) // 2 // 188 * 188
    data[at : at + 188 * 4] = b""
    path.write_bytes(data)
    source = open_source(path, ReaderSpec(size=SIZE))
    shown = [read_mark(frame.image) for frame in frames(source)]
    lost = sorted(set(range(48)) - set(shown))
    assert lost and len(lost) <= 16 and shown == sorted(shown)
    assert (max(lost) + 1) % 8 == 0, "it began again anywhere but at a key frame"
    assert source.tally.dropped["corrupt"] >= 1


# H.265 as cameras send it: a raw stream stands in for the packets of RTP


class Camera265(AvSource):
    """Reads a raw file as a camera's stream."""

    def _opened(self) -> InputContainer:
        return av.open(self._address.target)


def units(path: Path) -> list[bytes]:
    """The parts of a raw H.265 stream."""
    return [part.rstrip(b"\0") for part in path.read_bytes().split(b"\0\0\1") if part.strip(b"\0")]


def seen(path: Path, parts: list[bytes]) -> tuple[list[int], Tally]:
    """What a camera that sends these parts shows."""
    path.write_bytes(b"".join(b"\0\0\0\1" + part for part in parts))
    source = Camera265(Address("rtsp", str(path), "camera"), ReaderSpec(size=SIZE), "camera", SYSTEM)
    shown = [read_mark(frame.image) for frame in frames(source)]
    return shown, source.tally


def kind(part: bytes) -> int:
    return part[0] >> 1 & 63


@pytest.fixture(scope="module")
def h265(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    params = "log-level=none:keyint=12:min-keyint=12:scenecut=0:bframes=0:repeat-headers=1:open-gop=0:info=0"
    path = tmp_path_factory.mktemp("h265") / "clip.hevc"
    return units(write_clip(path, codec="libx265", options={"x265-params": params}, frames=48))


MESSAGES = {
    "cut short": bytes((39 << 1, 1, 5, 200)) + b"\x55" * 22,
    "cut short behind": bytes((40 << 1, 1, 132, 200)) + b"\x55" * 9,
    "empty": bytes((39 << 1, 1)),
    "timing": bytes((39 << 1, 1, 1, 1, 255, 128)),
    "endless": bytes((39 << 1, 1)) + b"\xff" * 90,
    "delimiter": bytes((35 << 1, 1)),
    "of a vendor": bytes((62 << 1, 1)) + b"\x19\xff\x08" * 30,
}


@pytest.mark.parametrize("message", MESSAGES)
def test_a_broken_message_costs_no_picture(message: str, h265: list[bytes], tmp_path: Path) -> None:
    behind = kind(MESSAGES[message]) in (40, 62)
    parts = []
    for part in h265:
        pair = [part, MESSAGES[message]]
        parts += pair if behind else pair[::-1] if kind(part) < 32 else [part]
    shown, tally = seen(tmp_path / "clip.hevc", parts)
    assert shown == list(range(48)) and not tally.dropped


def test_pictures_without_what_they_depend_on_are_refused(h265: list[bytes], tmp_path: Path) -> None:
    broken = MESSAGES["cut short"]
    slices = [place for place, part in enumerate(h265) if kind(part) < 32]
    parts = [part for place, part in enumerate(h265) if place != slices[15]]
    for sent in (parts, [beside for part in parts for beside in ((broken, part) if kind(part) < 32 else (part,))]):
        shown, tally = seen(tmp_path / "clip.hevc", sent)
        assert shown == [*range(15), *range(24, 48)], "up to the next key frame"
        assert tally.dropped["corrupt"] + tally.dropped["no_key"] == 8


# Clocks that lie


def joined(path: Path, parts: list[Path]) -> Path:
    """Recordings one after another, as one that was never interrupted: their packets are counted on."""
    data = bytearray(b"".join(part.read_bytes() for part in parts))
    counts: dict[bytes, int] = {}
    for at in range(0, len(data), 188):
        key = bytes((data[at + 1] & 0x1F, data[at + 2]))
        if data[at + 3] & 0x10:
            counts[key] = counts.get(key, -1) + 1
        data[at + 3] = (data[at + 3] & 0xF0) | (counts.get(key, 0) & 0x0F)
    path.write_bytes(data)
    return path


def part(folder: Path, name: str, start: float, **options: Any) -> Path:
    """Twelve frames at 12 a second, whose stamps begin at `start`."""
    times = [start + index / 12 for index in range(12)]
    return write_clip(folder / f"{name}.ts", frames=12, times=times, options={"bf": "0"}, **options)


@pytest.mark.parametrize("starts", [(0, 6), (0, 60), (0, 37600)])
def test_a_gap_in_a_file_is_no_jump_in_time(starts: tuple[float, ...], tmp_path: Path) -> None:
    path = joined(tmp_path / "joined.ts", [part(tmp_path, f"p{place}", start) for place, start in enumerate(starts)])
    got, wanted = read(path, fps=4), read_video(path, Clip(fps=4), SIZE)
    assert {frame.segment for frame in got} == {0} and len(got) == 9  # the last one before the gap stays for longer
    assert [frame.pts_s for frame in got] == pytest.approx(wanted.times.tolist(), abs=1e-3)
    assert next(frame.pts_s for frame in got if (frame.pts_s or 0) > 5) == pytest.approx(starts[1], abs=1e-3)


@pytest.mark.parametrize(("starts", "segments"), [((100, 0), 2), ((100, 50, 0), 3), ((0, 1), 1)])
def test_steps_back_of_the_clock_part_segments(starts: tuple[float, ...], segments: int, tmp_path: Path) -> None:
    parts = [part(tmp_path, f"p{place}", start) for place, start in enumerate(starts)]
    got = read(joined(tmp_path / "joined.ts", parts), fps=4)
    assert [frame.segment for frame in got] == [place for place in range(segments) for _ in range(len(got) // segments)]
    assert len(got) == 4 * len(starts)
    for segment in range(segments):
        stamps = [frame.pts_s for frame in got if frame.segment == segment]
        assert all(stamp is not None for stamp in stamps)
        assert stamps == sorted(stamps, key=lambda stamp: stamp or 0) and (stamps[-1] or 0) - (stamps[0] or 0) < 3


def test_another_resolution_is_another_segment(tmp_path: Path) -> None:
    parts = [part(tmp_path, "a", 0), part(tmp_path, "b", 1, size=(256, 144)), part(tmp_path, "c", 2)]
    got = read(joined(tmp_path / "joined.ts", parts))
    assert [frame.segment for frame in got] == [0] * 12 + [1] * 12 + [2] * 12
    assert [read_mark(frame.image) for frame in got] == [*range(12)] * 3


STILL = (480, 640)


def segments(stamps: list[float | None], times: list[float], live: bool = True) -> list[int]:
    timeline = Timeline(5.0, live)
    return [timeline.place(s, 0.1, STILL, t).segment for s, t in zip(stamps, times, strict=True)]


def test_only_a_step_back_parts_the_segments_of_a_file() -> None:
    assert segments([0, 0.1, 37600, 37600.1, 12, None, 11], [0] * 7, live=False) == [0, 0, 0, 0, 1, 1, 2]


@pytest.mark.parametrize(
    ("stamps", "times", "wanted"),
    [
        ([None, 0, 0.1, None, 0.3], [0, 0.1, 0.2, 0.3, 0.4], [0] * 5),  # missing ones are normal
        ([None] * 3, [0, 100, 200], [0] * 3),
        ([0, 60, 120], [0, 60, 120], [0] * 3),  # a picture a minute is no leap
        ([0, 60, 120], [0, 1, 2], [0, 1, 2]),
        ([0, 37600, 37600.1], [0, 0.1, 0.2], [0, 1, 1]),
        ([37600, 0, 0.1], [0, 0.1, 0.2], [0, 1, 1]),  # backwards
        ([0, 0.1, 8.1, 8.2], [0, 0.1, 8.1, 8.1], [0] * 4),  # a stall, made up for at once
        ([0, 0, 0], [0, 0.1, 0.2], [0] * 3),  # a clock that stands still
        ([47721.8, 0.0, 0.1], [0, 0.1, 0.2], [0, 1, 1]),  # RTP's 32 bits ran over
    ],
)
def test_segments_of_live_clocks(stamps: list[float | None], times: list[float], wanted: list[int]) -> None:
    assert segments(stamps, times) == wanted


def test_times_never_fall_within_a_segment() -> None:
    draw = np.random.default_rng(0)
    timeline = Timeline(5.0, True)
    places = []
    for step in range(2000):
        stamp = None if draw.random() < 0.2 else float(draw.choice([step / 10, draw.normal(0, 50), step / 10 + 37600]))
        places.append(timeline.place(stamp, 0.1, STILL, step / 10))
    for before, after in pairwise(places):
        assert after.segment in (before.segment, before.segment + 1)
        assert after.segment > before.segment or after.time >= before.time


# The test picture


def test_the_pattern_is_the_same_every_time() -> None:
    first, second = (
        read("test://?fps=10&seconds=2&noise=2&seed=3&width=160&height=120"),
        read("test://?fps=10&seconds=2&noise=2&seed=3&width=160&height=120"),
    )
    other = read("test://?fps=10&seconds=2&noise=2&seed=4&width=160&height=120")
    assert len(first) == 20 and all(np.array_equal(a.image, b.image) for a, b in zip(first, second, strict=True))
    assert not np.array_equal(first[0].image, other[0].image)
    assert first[0].image.shape == (SIZE, SIZE, 3) and [f.pts_s for f in first] == [k / 10 for k in range(20)]


def test_what_moves_in_the_pattern() -> None:
    still, moving = read("test://?seconds=2&motion=0"), read("test://?seconds=2")
    assert all(np.array_equal(still[0].image, frame.image) for frame in still)
    changed = [np.mean(a.image != b.image) for a, b in pairwise(moving)]
    assert min(changed) > 0 and max(changed) < 0.5
    cut = read("test://?seconds=2&motion=0&cut=1")
    assert [np.mean(a.image != b.image) > 0.5 for a, b in pairwise(cut)] == [k == 9 for k in range(19)]


def test_an_endless_pattern_ends_when_interrupted() -> None:
    source = open_source("test://?fps=100", ReaderSpec(size=SIZE))
    taken = 0
    for frame in frames(source):
        taken = frame.index
        if taken == 50:
            source.interrupt()
    assert taken == 50


# GStreamer, where its bindings are: in Debian's Python, with our packages beside

GST = """
import sys, numpy
sys.path.append("/usr/lib/python3/dist-packages")
from dycoke_edge.config_camera import ReaderSpec
from dycoke_edge.runtime.camera.source import open_source, SourceError
source = open_source(sys.argv[1], ReaderSpec(size=48, allow_gst=True, read_timeout=1, open_timeout=2))
try:
    info = source.open()
    images = [frame.image for frame in source]
    print(info.live, info.width, info.height, info.fps, images[0].shape, images[0].dtype, images[0][:, 24].tolist()[5])
except SourceError as error:
    print("SourceError", error.code, error)
finally:
    source.close()
"""


def gst(uri: str) -> str:
    rtsp.need()
    if sys.version_info[:2] != _debians_python():
        pytest.skip("GStreamer's bindings are built for another Python")
    done = subprocess.run([sys.executable, "-c", GST, uri], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def _debians_python() -> tuple[int, ...]:
    code = "import sys; print(*sys.version_info[:2])"
    done = subprocess.run([rtsp.PYTHON, "-c", code], capture_output=True, text=True)
    return tuple(int(number) for number in done.stdout.split())


def test_a_pipeline_is_a_source() -> None:
    blue = "videotestsrc num-buffers=5 pattern=blue ! video/x-raw,format=RGB,width=64,height=32,framerate=5/1"
    assert gst(f"gst://{blue}") == "True 64 32 5.0 (48, 48, 3) uint8 [0, 0, 255]"


@pytest.mark.parametrize(
    ("pipeline", "code"),
    [
        ("nosuchelement", "unreadable"),
        ("filesrc location=/nowhere ! decodebin", "unreadable"),
        ("appsrc ! video/x-raw,format=RGBA,width=4,height=4", "timeout"),
        ("rtspsrc location=rtsp://u:c4n4ry@127.0.0.1:1/x ! decodebin", "unreadable"),
    ],
)
def test_pipelines_that_fail(pipeline: str, code: str) -> None:
    printed = gst(f"gst://{pipeline}")
    assert printed.startswith(f"SourceError {code}") and "c4n4ry" not in printed


def test_without_the_bindings_the_error_says_what_to_install() -> None:
    code = "import sys; sys.modules['gi'] = None\n" + GST.replace("sys.path.append", "str")
    done = subprocess.run([sys.executable, "-c", code, "csi://0"], capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 1 and "python3-gst-1.0" in done.stderr.splitlines()[-1]


# Pixels


def test_a_source_decodes_no_picture_of_too_many_pixels(tmp_path: Path) -> None:
    parts = [write_clip(tmp_path / f"{width}.h264", size=(width, 96), frames=4) for width in (128, 256)]
    both = tmp_path / "both.h264"
    both.write_bytes(b"".join(part.read_bytes() for part in parts))
    assert len(read(both)) == 8
    source = open_source(both, ReaderSpec(max_pixels=128 * 96))
    assert {frame.image.shape for frame in frames(source)} == {(96, 128, 3)}
    assert source.tally.dropped["corrupt"] >= 1
    Image.new("L", (640, 480)).save(tmp_path / "a.jpg")
    for path in (parts[1], tmp_path / "a.jpg", clips.cfr(tmp_path, "h264-mp4", size=(256, 96))):
        with pytest.raises(SourceError, match="max_pixels"):
            read(path, max_pixels=128 * 96)


# Animations


LENGTHS = [125] * 3 + [1000] + [0] * 4 + [125] * 4  # milliseconds; 0 is 100, as browsers show it


def animated(path: Path) -> Path:
    """An animation of 12 marks."""
    drawn = [Image.fromarray(clips.mark(k)) for k in range(12)]
    drawn[0].save(path, save_all=True, append_images=drawn[1:], duration=LENGTHS, lossless=True)
    return path


@pytest.mark.parametrize("name", ["clip.webp", "clip.png", "clip.bin.webp"])
@pytest.mark.parametrize("fps", [2.0, 30.0])
def test_an_animation_gives_what_run_sees(name: str, fps: float, tmp_path: Path) -> None:
    path = animated(tmp_path / name)
    wanted = open_visual(path, Clip(fps=fps), SIZE)
    got = read(path, fps=fps)
    assert [frame.pts_s for frame in got] == pytest.approx(wanted.times.tolist())
    assert all(np.array_equal(frame.image, image) for frame, image in zip(got, wanted.pixels, strict=True))


@pytest.mark.parametrize(("name", "codec"), [("clip.webp", "webp"), ("clip.png", "apng")])
def test_an_animation_says_what_it_is(name: str, codec: str, tmp_path: Path) -> None:
    report = probe(animated(tmp_path / name))
    assert (report.codec, report.width, report.height, report.live) == (codec, 128, 96, False)
    assert (report.frames, report.pts_breaks, report.pts_largest_step) == (12, 0, 1.0)
    assert report.fps_measured == pytest.approx(11 / 2.15, abs=1e-3)  # without the last


def test_animations_that_cannot_be_played(tmp_path: Path) -> None:
    path = animated(tmp_path / "clip.png")
    with pytest.raises(SourceError, match="at most 100 in all"):
        read(path, max_pixels=100)
    cut = tmp_path / "cut.png"
    cut.write_bytes(path.read_bytes()[: path.stat().st_size * 6 // 10])
    with pytest.raises(SourceError, match="cannot be read") as caught:
        read(cut)
    assert caught.value.code == "unreadable"


def test_a_still_picture_of_an_animation_is_shown_to_people(tmp_path: Path) -> None:
    source = open_source(animated(tmp_path / "clip.webp"), ReaderSpec(size=SIZE))
    assert len(list(frames(source))) == 12 and source.tally.decoded == 12
    assert source.tally.draw is not None and source.tally.draw(64).shape == (48, 64, 3)


# Probe


def test_probe_says_what_a_file_holds(tmp_path: Path) -> None:
    parts = [part(tmp_path, f"p{place}", start) for place, start in enumerate((0, 37600, 0))]
    report = probe(joined(tmp_path / "joined.ts", parts))
    assert (report.codec, report.width, report.height, report.live) == ("h264", 128, 96, False)
    assert (report.frames, report.pts_breaks, report.pts_missing, report.frames_dropped) == (36, 1, 0, {})
    assert report.pts_largest_step == pytest.approx(37600 - 11 / 12, abs=1e-3)
    assert 0 <= report.seconds_to_open <= report.seconds_to_first_frame


def test_probe_of_an_image(tmp_path: Path) -> None:
    for name in ("a.tif", "a.png", "a.jpg", "a.webp"):
        Image.fromarray(clips.mark(1)).save(tmp_path / name)
        report = probe(tmp_path / name)
        assert (report.width, report.height, report.frames) == (128, 96, 1)


def test_probe_of_what_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="does not exist"):
        probe(tmp_path / "none.mp4")
