"""What a video file says it holds: when each of its frames is shown, and whether the file is whole.

Knows FFmpeg (through PyAV) and nothing of models. `pictures.py` decodes, `video.py` is the way in.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import BinaryIO, NamedTuple

import av
import numpy as np
from av.container import InputContainer
from av.error import FFmpegError
from av.stream import Disposition
from numpy.typing import NDArray

from dycoke_edge.errors import InputError
from dycoke_edge.runtime.budget import check_passes, check_size

HEAD = 32  # B-frames are reordered by 16 at most, so these packets hold the frame shown first
TEXT = frozenset({"tty", "bin", "xbin", "adf", "idf"})  # FFmpeg plays any .txt as a film of letters
BOXES = frozenset((b"ftyp", b"moov", b"mdat", b"moof", b"free", b"skip", b"wide", b"styp", b"sidx"))
CHUNKS = (b"LIST", b"JUNK", b"idx1")  # of an AVI, on the outside
SLACK = 16  # bytes; a frame that is cut short is found by its own size
REPAIR = "copy or record it again, or convert it with ffmpeg"


class Stamp(NamedTuple):
    """What a packet says of its frame; times in ticks of the stream."""

    pts: int | None
    dts: int | None
    duration: int
    key: bool
    shown: bool
    corrupt: bool


@dataclass(frozen=True)
class Index:
    """The frames of a file in the order they are shown: `times` float64 [n] and `duration` in
    seconds from the first frame. With `ticks` int64 [n] frames are known by their time stamps
    and only the stretches that are needed get decoded: `packets` int64 [m] and `keys` bool [m]
    are stamps and keyframes in decoding order, `seek` the stamp to jump to. Without `ticks`
    frames are counted from the first."""

    times: NDArray[np.float64]
    duration: float
    ticks: NDArray[np.int64] | None = None
    packets: NDArray[np.int64] | None = None
    keys: NDArray[np.bool_] | None = None
    seek: int | None = None


@contextmanager
def opened(path: Path, most: int) -> Iterator[tuple[InputContainer, av.VideoStream]]:
    """The file and its main video stream, whose decoder takes pictures of `most` pixels: a few kilobytes can claim to
    be of far more. Raises InputError for everything FFmpeg cannot read."""
    try:
        # Without "file:" a colon in the name would be taken for a protocol.
        with av.open(f"file:{path}", options={"max_pixels": str(most)}, metadata_errors="replace") as container:
            yield container, picture(path, container, most)
    except (FFmpegError, OSError) as error:
        reason = " ".join((error.strerror or str(error)).split())
        raise InputError(f"{path} (--video) cannot be read as a video ({reason}); {REPAIR}") from error


def picture(path: Path, container: InputContainer, most: int) -> av.VideoStream:
    """The main video stream of an open file. Raises InputError if there is none that can be decoded."""
    stream = container.streams.best("video")
    if not isinstance(stream, av.VideoStream) or stream.disposition & Disposition.attached_pic:
        raise InputError(f"{path} (--video) has no video stream; give a file with moving pictures")
    if container.format.name in TEXT:
        raise InputError(f"{path} (--video) is text, not a video; give a video file")
    if stream.codec_context is None:
        raise InputError(f"{path} (--video) uses a codec this FFmpeg cannot decode; convert it to H.264")
    check_size(f"{path} (--video)", stream.width, stream.height, most)
    stream.thread_type = "AUTO"
    stream.codec_context.options = {"max_pixels": str(most)}  # the size may change on the way
    return stream


def check_packet(path: Path, stream: av.VideoStream, packet: av.Packet[av.VideoStream], most: int) -> None:
    """Raises TooLarge for a packet that takes far longer to decode than it is large."""
    if stream.codec_context.name == "mjpeg" and packet.size:
        check_passes(f"{path} (--video)", bytes(packet), most)


def empty(path: Path) -> InputError:
    """The error for a file without frames."""
    return InputError(f"{path} (--video) holds no video frames; {REPAIR}")


def broken(path: Path, frames: int, seconds: float, safe: float) -> InputError:
    """The error for a file damaged after so many frames; all before `safe` seconds is whole."""
    safe = math.floor(safe * 100) / 100
    part = f"use --end {safe:.2f} for the part before, or " if safe >= 0.01 else ""
    return InputError(
        f"{path} (--video) is damaged: it breaks at {seconds:.2f} s, after {frames} frames; {part}{REPAIR}"
    )


def seconds(stream: av.VideoStream, ticks: NDArray[np.int64]) -> NDArray[np.float64]:
    """Ticks of a stream as seconds."""
    base = stream.time_base
    assert base is not None
    return ticks * base.numerator / base.denominator


def scan(path: Path, most: int, start: float = 0.0, end: float | None = None, seek: bool = True) -> Index | None:
    """The frames shown in [start, end) seconds, and some around them, from the packets alone.
    None if they carry no usable time stamps. Raises InputError for a file that is unreadable,
    without frames or cut short before `end`."""
    with opened(path, most) as (container, stream):
        base = stream.time_base
        if base is None or (container.format.name == "avi" and stream.codec_context.has_b_frames):
            return None  # AVI has room for decoding times only
        stamps = _stamps(container, stream)
        listed = _head(stamps)
        zero = _zero(listed)
        seek = seek and start > 0 and _straight(container, stream)
        target = zero + int(start / base) if seek and zero is not None else None
        if target is not None and not _jump(container, stream, target, listed):
            return scan(path, most, start, end, seek=False)
        limit = None if end is None or zero is None else zero + end / base
        whole = _read(_stamps(container, stream) if target is not None else stamps, listed, limit)
        if not listed:
            raise empty(path)
        if whole:
            _check_end(path, stream, listed, limit, zero or 0)
        return None if zero is None else _index(stream, listed, zero, target)


def _stamps(container: InputContainer, stream: av.VideoStream) -> Iterator[Stamp]:
    for p in container.demux(stream):
        if p.size:
            yield Stamp(p.pts, p.dts, p.duration or 0, p.is_keyframe, not p.is_discard, p.is_corrupt)


def _head(stamps: Iterator[Stamp]) -> list[Stamp]:
    """The packets up to the first that is shown, however many a trimmed file hides before it, and HEAD more."""
    listed = []
    for stamp in stamps:
        listed.append(stamp)
        if stamp.shown:
            break
    return listed + list(islice(stamps, HEAD))


def _zero(listed: list[Stamp]) -> int | None:
    """The stamp of the first frame that can be shown. A recording may begin in the middle of a group of pictures, which
    nothing can decode; a trimmed one begins with a keyframe that is decoded and not shown."""
    key = next((s.pts for s in listed if s.key and s.pts is not None), None)
    shown = [s.pts for s in listed if s.shown and s.pts is not None]
    return min((pts for pts in shown if key is None or pts >= key), default=None)


def _straight(container: InputContainer, stream: av.VideoStream) -> bool:
    """FFmpeg finds any time in the file. Most formats have no index, and stamps that change after a jump; in an MP4 of
    several edits stamps fall, and the place found is a wrong one."""
    if not container.format.name.startswith("mov,"):
        return container.format.name.startswith("matroska,")
    entries = getattr(stream, "index_entries", None)  # PyAV before 17 has none
    return entries is not None and bool((np.diff([entry.timestamp for entry in entries]) > 0).all())


def _jump(container: InputContainer, stream: av.VideoStream, target: int, listed: list[Stamp]) -> bool:
    """Goes to the keyframe before `target`, which becomes the only one listed. False if the file
    cannot do that."""
    listed.clear()
    with suppress(FFmpegError):  # False has the whole file read instead
        container.seek(target, stream=stream)
        for stamp in _stamps(container, stream):
            if stamp.key:
                listed.append(stamp)
                return stamp.pts is not None and stamp.pts <= target
    return False


def _read(stamps: Iterable[Stamp], listed: list[Stamp], limit: float | None) -> bool:
    """Lists the packets up to the one decoded at `limit`; True if the file ended first."""
    for stamp in stamps:
        listed.append(stamp)
        if limit is not None and stamp.shown and stamp.dts is not None and stamp.dts >= limit:
            return False
    return True


def _check_end(path: Path, stream: av.VideoStream, listed: list[Stamp], limit: float | None, zero: int) -> None:
    """Raises InputError if the file stops before its own header says, and the clip needs what is
    missing."""
    if not any(s.corrupt for s in listed[-2:]) and path.stat().st_size >= declared(path):
        return
    whole = max((s.pts for s in listed if s.pts is not None and not s.corrupt), default=zero)
    safe = next((s.pts for s in reversed(listed) if s.key and s.pts is not None), zero)
    safe = min(whole, max(safe, listed[-1].dts or safe))
    if limit is None or limit > safe:
        times = seconds(stream, np.array([whole, safe]) - zero)
        raise broken(path, sum(not s.corrupt for s in listed), times[0], times[1])


def declared(path: Path) -> int:
    """Bytes that an MP4, Matroska or RIFF file must have by its own headers; 0 if unknown."""
    with path.open("rb") as file:
        head = file.read(4096)
        if head[4:8] in BOXES:
            return _boxes(file)
        if head.startswith(b"RIFF"):
            return _frames_end(file) - SLACK
    at = head.find(b"\x18\x53\x80\x67") + 4
    return _segment(head, at) if head.startswith(b"\x1a\x45\xdf\xa3") and at >= 4 else 0


def _boxes(file: BinaryIO) -> int:
    end = size = 0
    while True:
        file.seek(end)
        head = file.read(16)
        if head[4:8] not in BOXES:
            return end
        size = int.from_bytes(head[:4], "big")
        end += size if size != 1 else int.from_bytes(head[8:], "big")
        if size == 0:
            return end


def _frames_end(file: BinaryIO) -> int:
    """Where the last list of frames of an AVI ends. The size of the whole is often wrong by some bytes."""
    at = end = 0
    while True:
        file.seek(at)
        head = file.read(12)
        size = int.from_bytes(head[4:8], "little")
        if head[:4] == b"RIFF":
            at += 12
        elif head[:4] in CHUNKS and size < 0xFFFFFFFF:
            at += 8 + size + size % 2
            end = at if head[8:] == b"movi" else end
        else:
            return end


def _segment(head: bytes, at: int) -> int:
    width = 9 - (head[at] if at < len(head) else 0).bit_length()
    unknown = (1 << 7 * width) - 1
    size = int.from_bytes(head[at : at + width], "big") & unknown
    return at + width + size if size < unknown else 0


def _index(stream: av.VideoStream, listed: list[Stamp], zero: int, seek: int | None) -> Index | None:
    if any(s.pts is None for s in listed):
        return None
    packets = np.array([s.pts for s in listed], np.int64)
    shown = np.array([s.shown for s in listed]) & (packets >= zero)
    ticks = np.sort(packets[shown])
    if (np.diff(np.sort(packets)) == 0).any() or not len(ticks):
        return None
    last = next(s for s in listed if s.pts == ticks[-1])
    span = seconds(stream, np.array([ticks[-1] - zero + last.duration]))[0]
    if not last.duration:
        span += 1 / float(stream.average_rate or 25)
    keys = np.array([s.key for s in listed])
    return Index(seconds(stream, ticks - zero), float(span), ticks, packets, keys, seek)
