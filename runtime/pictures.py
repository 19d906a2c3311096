"""Decodes the frames of an `Index` that are asked for, and turns them the way up a person
expects."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.container import InputContainer
from av.error import FFmpegError
from av.sidedata.sidedata import Type
from numpy.typing import NDArray
from PIL import Image

from dycoke_edge.runtime.container import Index, broken, check_packet, declared, empty, opened, seconds

Chosen = NDArray[np.int64]


class Contradiction(Exception):
    """The decoder does not put out what the packets announced; `count` finds out what is true."""


def decode(path: Path, index: Index, chosen: Chosen, most: int) -> Iterator[av.VideoFrame]:
    """The frames at the increasing places `chosen` int64 [k] of the index, in order, one at a
    time. Raises Contradiction if the index came from `scan` and one of them is not there,
    InputError if it came from `count` and one is damaged."""
    return (_by_order if index.ticks is None else _by_stamp)(path, index, chosen, most)


def count(path: Path, end: float | None, most: int) -> Index:
    """The frames up to `end` seconds, found by decoding every one: slow, but true whatever the
    packets say. Raises InputError for a file without frames or damaged before `end`."""
    stamps: list[int | None] = []
    key = 0
    with opened(path, most) as (container, stream):
        step = _step(stream)
        for frame in _all(path, container, stream, most):
            key = len(stamps) if frame.key_frame else key
            stamps.append(frame.pts)
            times = _clock(stamps[:1] + stamps[-1:], stream)
            if end is not None and min(times[-1], (len(stamps) - 1) * step) >= end:
                break
        else:
            if not stamps:
                raise empty(path)
            if path.stat().st_size < declared(path):
                raise broken(path, len(stamps), (len(stamps) - 1) * step, key * step)
        times = _clock(stamps, stream)
    return Index(times, float(times[-1]) + step)


def _step(stream: av.VideoStream) -> float:
    return 1 / float(stream.average_rate or 25)


def _clock(stamps: list[int | None], stream: av.VideoStream) -> NDArray[np.float64]:
    """Seconds from the first frame: by the stamps where all are there and rise, else by the
    frame rate."""
    known = np.array([pts for pts in stamps if pts is not None], np.int64)
    if len(known) == len(stamps) and (np.diff(known) > 0).all():
        return seconds(stream, known - known[0])
    return np.arange(len(stamps), dtype=np.float64) * _step(stream)


def _all(path: Path, container: InputContainer, stream: av.VideoStream, most: int) -> Iterator[av.VideoFrame]:
    """Every frame from the first on. A recording may begin with packets that cannot be decoded;
    later, they are damage."""
    done, early = 0, None
    for packet in container.demux(stream):
        check_packet(path, stream, packet, most)
        try:
            for frame in packet.decode():
                yield frame
                done += 1
        except FFmpegError as error:
            if done:
                step = _step(stream)
                raise broken(path, done, done * step, (done - 1) * step) from error
            early = error
    if early is not None and not done:
        raise broken(path, 0, 0.0, 0.0) from early


def _by_order(path: Path, index: Index, chosen: Chosen, most: int) -> Iterator[av.VideoFrame]:
    left, bad = chosen.tolist()[::-1], False
    with opened(path, most) as (container, stream):
        for place, frame in enumerate(_all(path, container, stream, most)):
            bad = frame.is_corrupt or (bad and not frame.key_frame)
            if place != left[-1]:
                continue
            if bad:
                break
            yield frame
            left.pop()
            if not left:
                return
    seconds_whole = float(index.times[left[-1]])
    raise broken(path, left[-1], seconds_whole, seconds_whole)


def _by_stamp(path: Path, index: Index, chosen: Chosen, most: int) -> Iterator[av.VideoFrame]:
    assert index.ticks is not None
    left = index.ticks[chosen].tolist()[::-1]
    shown, bad = None, False
    for frame in _stretches(path, index, _needed(index, chosen), most):
        if frame.pts is None or (shown is not None and frame.pts <= shown) or frame.pts > left[-1]:
            raise Contradiction
        shown = frame.pts
        bad = frame.is_corrupt or (bad and not frame.key_frame)
        if frame.pts == left[-1]:
            if bad:
                raise Contradiction
            yield frame
            left.pop()
        if not left:
            return
    raise Contradiction


def _needed(index: Index, chosen: Chosen) -> set[int]:
    """Stamps of the packets to decode: from the keyframe a frame depends on to the frame itself."""
    assert index.ticks is not None and index.packets is not None and index.keys is not None
    wanted = index.ticks[chosen]
    sorter = np.argsort(index.packets)
    places = sorter[np.searchsorted(index.packets, wanted, sorter=sorter)]
    starts = np.flatnonzero(index.keys)
    needed = np.zeros(len(index.packets), bool)
    for stamp, place in zip(wanted, places, strict=True):
        # A picture after a keyframe in the file but before it on the screen needs the one before.
        usable = starts[(starts <= place) & (index.packets[starts] <= stamp)]
        needed[(usable[-1] if len(usable) else 0) : place + 1] = True
    return set(index.packets[needed].tolist())


def _stretches(path: Path, index: Index, needed: set[int], most: int) -> Iterator[av.VideoFrame]:
    """Decodes the packets with the stamps `needed` and nothing else."""
    with opened(path, most) as (container, stream):
        if index.seek is not None:
            container.seek(index.seek, stream=stream)
        fed = False
        for packet in container.demux(stream):
            if packet.size and packet.pts in needed:
                needed.discard(packet.pts)
                fed = True
                check_packet(path, stream, packet, most)
                yield from _frames(stream, packet)
            elif fed:
                fed = False
                yield from _frames(stream, None)
                stream.codec_context.flush_buffers()
            if not needed:
                break
        yield from _frames(stream, None)


def _frames(stream: av.VideoStream, packet: av.Packet[av.VideoStream] | None) -> list[av.VideoFrame]:
    try:
        return stream.codec_context.decode(packet)
    except FFmpegError as error:
        raise Contradiction from error


def _unnamed(kinds: type[Type], value: int) -> Type:
    """A kind of side data that FFmpeg knows and PyAV does not, such as EXIF. Without a name for each that a frame holds
    PyAV gives none of them."""
    kind = object.__new__(kinds)
    kind._name_ = f"UNNAMED_{value}"
    kind._value_ = value  # type: ignore[assignment]
    return kind


Type._missing_ = classmethod(_unnamed)  # type: ignore[assignment,method-assign]


def upright(frame: av.VideoFrame, image: Image.Image) -> Image.Image:
    """A square image of the frame, turned and mirrored as the display matrix of the recording
    says."""
    sides: Any = frame.side_data  # typed wrongly in PyAV 18
    data = sides.get("DISPLAYMATRIX")
    if data is None:
        return image
    a, b, _, c, d = np.frombuffer(bytes(data), np.int32)[:5].astype(float)
    if abs(b) + abs(c) > abs(a) + abs(d):
        image = image.transpose(Image.Transpose.TRANSPOSE)
        a, d = c, b
    if a < 0:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return image.transpose(Image.Transpose.FLIP_TOP_BOTTOM) if d < 0 else image
