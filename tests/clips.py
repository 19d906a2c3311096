"""Writes small test clips with PyAV. Frame k of every clip shows k as eight black or white bars,
so that a test can say which frames it got."""

from __future__ import annotations

import io
import struct
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, cast

import av
import av.video.frame
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dycoke_edge.config import Clip
from dycoke_edge.runtime.video import read_video

BITS = 8
SIZE = 48  # that tests read clips at


def mark(index: int, width: int = 128, height: int = 96) -> NDArray[np.uint8]:
    """uint8 [height, width, 3]: bar b is white where bit b of `index` is set, the leftmost bar
    being bit 0."""
    bits: NDArray[np.int64] = (index >> np.arange(BITS)) & 1
    row = np.repeat(np.where(bits, 235, 16), -(-width // BITS))[:width].astype(np.uint8)
    image: NDArray[np.uint8] = np.broadcast_to(row[None, :, None], (height, width, 3)).copy()
    return image


def read_mark(image: NDArray[np.uint8]) -> int:
    """The index that `mark` drew into an image of any size, uint8 [H, W, 3]."""
    edges = np.linspace(0, image.shape[1], BITS + 1)
    centres = ((edges[:-1] + edges[1:]) / 2).astype(int)
    bits = image[:, centres].mean(axis=(0, 2)) > 127
    return int((bits << np.arange(BITS)).sum())


def read_marks(images: NDArray[np.uint8]) -> list[int]:
    """`read_mark` of every image, uint8 [F, H, W, 3]."""
    return [read_mark(image) for image in images]


def marks(path: Path, **options: float) -> list[int]:
    """Which frames `read_video` takes with these options of Clip."""
    clip = Clip(**options)  # type: ignore[arg-type]
    return read_marks(read_video(path, clip, SIZE).pixels)


def write_clip(
    path: Path,
    codec: str = "libx264",
    frames: int = 24,
    rate: int = 12,
    size: tuple[int, int] = (128, 96),
    options: dict[str, str] | None = None,
    times: Sequence[float] | None = None,
    mux: dict[str, str] | None = None,
    pix_fmt: str = "yuv420p",
    audio: bool = False,
    title: str = "",
) -> Path:
    """Marked frames at `rate` a second, or at `times` (seconds), in the container that the
    suffix of `path` names."""
    with av.open(str(path), "w", options=mux or {}) as out:
        out.metadata.update({"title": title} if title else {})
        stream = cast(av.VideoStream, out.add_stream(codec, rate=rate, options=options or {}))
        stream.width, stream.height, stream.pix_fmt = *size, pix_fmt
        stream.codec_context.time_base = Fraction(1, rate) if times is None else Fraction(1, 1000)
        sound = cast(av.AudioStream, out.add_stream("aac", rate=8000)) if audio else None
        for index in range(frames):
            frame = av.VideoFrame.from_ndarray(mark(index, *size), format="rgb24")
            frame.pts = index if times is None else round(times[index] * 1000)
            frame.time_base = stream.codec_context.time_base
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
        if sound is not None:
            write_sound(out, sound, seconds=frames / rate)
    return path


def write_jpegs(path: Path, frames: int = 12, rate: int = 12) -> Path:
    """Marked frames as JPEGs with an EXIF block each, as cameras write them."""
    exif = Image.Exif()
    exif[0x010F] = "Maker"
    with av.open(str(path), "w") as out:
        stream = cast(av.VideoStream, out.add_stream("mjpeg", rate=rate))
        stream.width, stream.height, stream.pix_fmt = 128, 96, "yuvj420p"
        for index in range(frames):
            buffer = io.BytesIO()
            Image.fromarray(mark(index)).save(buffer, "JPEG", exif=exif)
            packet = av.Packet(buffer.getvalue())
            packet.stream, packet.time_base = stream, Fraction(1, rate)
            packet.pts = packet.dts = index
            packet.is_keyframe = True
            out.mux(packet)
    return path


def write_sound(out: Any, stream: Any, seconds: float) -> None:
    """Silence for `seconds` into a stream of an open container."""
    for start in range(0, int(seconds * 8000), 1024):
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.rate, frame.pts, frame.time_base = 8000, start, Fraction(1, 8000)
        out.mux(stream.encode(frame))
    out.mux(stream.encode(None))


def b_frames(path: Path, **more: Any) -> Path:
    """H.264 with B-frames and a keyframe every 8 frames."""
    options = {"bf": "3", "g": "8", "x264-params": "b-adapt=0:scenecut=0"}
    return write_clip(path, options=options, **more)


def cfr(folder: Path, kind: str, **more: Any) -> Path:
    """One of KINDS at a constant rate, 12 frames a second unless `rate` says otherwise."""
    suffix, codec, options, pix_fmt = KINDS[kind]
    path = folder / f"{kind}{suffix}"
    return write_clip(path, codec=codec, options=options, pix_fmt=pix_fmt, **more)


H264 = {"bf": "2", "g": "8", "x264-params": "b-adapt=0:scenecut=0"}
KINDS: dict[str, tuple[str, str, dict[str, str], str]] = {
    "h264-mp4": (".mp4", "libx264", H264, "yuv420p"),
    "h264-mkv": (".mkv", "libx264", H264, "yuv420p"),
    "h264-ts": (".ts", "libx264", H264, "yuv420p"),
    "h264-open-gop": (
        ".mkv",
        "libx264",
        {**H264, "x264-params": "open-gop=1:b-adapt=0"},
        "yuv420p",
    ),
    "h264-raw": (".h264", "libx264", H264, "yuv420p"),
    "h264-avi": (".avi", "libx264", H264, "yuv420p"),
    "h264-flv": (".flv", "libx264", H264, "yuv420p"),
    "h264-refresh": (".mp4", "libx264", {"x264-params": "intra-refresh=1:keyint=8"}, "yuv420p"),
    "h265-mp4": (".mp4", "libx265", {"x265-params": "log-level=none"}, "yuv420p"),
    "mpeg4-avi": (".avi", "mpeg4", {"bf": "2", "g": "8"}, "yuv420p"),
    "mpeg4-packed-avi": (".avi", "mpeg4", {"bf": "2", "g": "8"}, "yuv420p"),
    "mpeg2-mpg": (".mpg", "mpeg2video", {"bf": "2", "g": "8"}, "yuv420p"),
    "vp8-webm": (
        ".webm",
        "libvpx",
        {"auto-alt-ref": "1", "lag-in-frames": "12", "deadline": "good"},
        "yuv420p",
    ),
    "vp9-webm": (".webm", "libvpx-vp9", {"lag-in-frames": "12", "cpu-used": "8"}, "yuv420p"),
    "av1-mkv": (".mkv", "libsvtav1", {"preset": "12"}, "yuv420p"),
    "mjpeg-avi": (".avi", "mjpeg", {}, "yuvj420p"),
    "mjpeg-raw": (".mjpeg", "mjpeg", {}, "yuvj420p"),
    "gif": (".gif", "gif", {}, "rgb8"),
}


def sound_only(path: Path) -> Path:
    """A clip with sound and no picture."""
    with av.open(str(path), "w") as out:
        write_sound(out, out.add_stream("aac", rate=8000), seconds=1)
    return path


def no_frames(path: Path) -> Path:
    """A clip whose video stream holds nothing."""
    with av.open(str(path), "w") as out:
        stream = cast(av.VideoStream, out.add_stream("libx264", rate=12))
        stream.width, stream.height, stream.pix_fmt = 128, 96, "yuv420p"
        out.start_encoding()
    return path


def cut(path: Path, share: float) -> Path:
    """A copy of `path` that ends after `share` of its bytes."""
    data = path.read_bytes()
    short = path.with_name("cut-" + path.name)
    short.write_bytes(data[: int(len(data) * share)])
    return short


def trimmed(path: Path, start: float, suffix: str = ".mp4") -> Path:
    """What `ffmpeg -ss start -c copy` makes of a clip: it holds the pictures from the key frame before `start` on, and
    an edit list that shows them from `start` on."""
    copy = path.with_name(f"from-{start}-{path.stem}{suffix}")
    with av.open(str(path)) as source, av.open(str(copy), "w") as out:
        stream = source.streams.video[0]
        target = out.add_stream_from_template(stream)
        base = stream.time_base
        assert base is not None
        packets = [packet for packet in source.demux(stream) if packet.size]
        keys = [place for place, packet in enumerate(packets) if packet.is_keyframe and packet.pts * base <= start]
        for packet in packets[keys[-1] :]:
            assert packet.pts is not None and packet.dts is not None
            packet.pts -= int(start / base)
            packet.dts -= int(start / base)
            packet.stream = target
            out.mux(packet)
    return copy


def edited(path: Path, edits: Sequence[tuple[float, float | None]]) -> Path:
    """A copy of an mp4 of one track, which shows these parts of it one after another: seconds, and from which second
    on; None is nothing at all."""
    data = bytearray(path.read_bytes())
    moov = data.rindex(b"moov") - 4
    trak, edts = data.index(b"trak", moov) - 4, data.index(b"edts", moov) - 4
    scale, ticks = (_number(data, data.index(name, moov) + 16) for name in (b"mvhd", b"mdhd"))
    first = _number(data, edts + 28)
    entries = b"".join(
        struct.pack(">IiI", round(length * scale), -1 if start is None else first + round(start * ticks), 1 << 16)
        for length, start in edits
    )
    old = _number(data, edts)
    new = struct.pack(">I4sI4sII", 24 + len(entries), b"edts", 16 + len(entries), b"elst", 0, len(edits)) + entries
    data[edts : edts + old] = new
    for box in (moov, trak):
        data[box : box + 4] = struct.pack(">I", _number(data, box) + len(new) - old)
    copy = path.with_name(f"edited-{len(edits)}-{path.name}")
    copy.write_bytes(data)
    return copy


def _number(data: bytearray, at: int) -> int:
    return int.from_bytes(data[at : at + 4], "big")


def turned(path: Path, matrix: Sequence[int]) -> Path:
    """A copy of an mp4 with the display matrix (a, b, c, d) in its track header."""
    a, b, c, d = (value * 65536 for value in matrix)
    values = np.array([a, b, 0, c, d, 0, 0, 0, 1 << 30], ">i4").tobytes()
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 44
    data[at : at + 36] = values
    copy = path.with_name(f"turned-{a}{b}{c}{d}-{path.name}")
    copy.write_bytes(data)
    return copy
