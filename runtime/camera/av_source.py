"""AvSource: files, RTSP streams and V4L2 devices through FFmpeg (PyAV), decoded on the CPU."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.container import InputContainer
from av.error import FFmpegError
from av.stream import Disposition
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray
from PIL import Image

from dycoke_edge.config_camera import ReaderSpec
from dycoke_edge.runtime.budget import TooLarge, check_passes, check_size
from dycoke_edge.runtime.camera.av_errors import explain
from dycoke_edge.runtime.camera.clock import Clock
from dycoke_edge.runtime.camera.failure import SourceError
from dycoke_edge.runtime.camera.frame import Frame, SourceInfo, Tally
from dycoke_edge.runtime.camera.picker import Picker, Picture
from dycoke_edge.runtime.camera.picture_units import PictureUnits
from dycoke_edge.runtime.camera.uri import Address
from dycoke_edge.runtime.container import TEXT
from dycoke_edge.runtime.pictures import upright
from dycoke_edge.runtime.video import resize


class AvSource:
    """A file is read as fast as frames are taken. A stream is decoded whole, for pictures depend on each other, and
    only what is picked gets scaled. After a loss nothing is shown until a key frame comes."""

    def __init__(self, address: Address, spec: ReaderSpec, source_id: str, clock: Clock) -> None:
        self.tally = Tally()
        self._address, self._spec, self._clock = address, spec, clock
        self._finite = address.kind == "file"
        self._live = spec.realtime or not self._finite
        self._stop = threading.Event()
        self._picker = Picker(spec, source_id, self._finite, self.tally, clock, self._stop)
        self._container: InputContainer | None = None
        self._drawing, self._draws = VideoReformatter(), threading.Lock()  # of pictures for people, in other threads
        self._reformatter = VideoReformatter()  # one for all frames: one each is never given back (PyAV before 19)
        self._units: PictureUnits | None = None  # of a live H.265 stream
        self._whole = False  # since the last key frame nothing was lost
        self._hidden: int | None = None  # stamp of a key frame since then that is decoded and not shown

    def open(self) -> SourceInfo:
        try:
            self._container = self._opened()
        except (FFmpegError, OSError) as error:
            failure = explain(error, self._address)
        else:
            return self._info(self._stream(self._container))
        raise failure  # not while FFmpeg's own is handled: it would hang on to that, and the password in it

    def _info(self, stream: av.VideoStream) -> SourceInfo:
        if self._stop.is_set():
            raise SourceError("ended", f"{self._address.shown} was interrupted")
        context = stream.codec_context
        rate = float(stream.average_rate) if stream.average_rate else None
        return SourceInfo(
            self._address.shown,
            self._live,
            self._finite,
            context.name,
            context.width or None,
            context.height or None,
            rate,
        )

    def __iter__(self) -> Iterator[Frame]:
        assert self._container is not None, "open() comes first"
        stream = self._stream(self._container)
        packets = iter(self._container.demux(stream))
        while (packet := self._next(packets)) is not None:
            for picture in self._decoded(packet, stream):
                yield from self._picker.offer(picture)
        if self._stop.is_set():
            return
        if self._finite and not self.tally.decoded:
            raise SourceError(
                "unreadable",
                f"{self._address.shown} holds no whole picture, or none of up to {self._spec.max_pixels} pixels "
                "(max_pixels); copy or record it again, or scale it down",
            )
        yield from self._picker.finish()

    def _next(self, packets: Iterator[av.Packet[av.VideoStream]]) -> av.Packet[av.VideoStream] | None:
        """The next packet; None at the end or when interrupted."""
        if self._stop.is_set():
            return None
        try:
            packet = next(packets, None)
        except (FFmpegError, OSError) as error:
            failure = explain(error, self._address)
        else:
            self.tally.last_packet = self._clock.monotonic()
            return packet
        raise failure

    def interrupt(self) -> None:
        self._stop.set()

    def close(self) -> None:
        self._stop.set()
        container, self._container = self._container, None
        if container is not None:
            container.close()

    def _opened(self) -> InputContainer:
        kind, target = self._address.kind, self._address.target
        budget = {"max_pixels": str(self._spec.max_pixels)}  # of the decoder that finds out what the stream is
        if kind == "file" and Path(target).is_fifo():
            raise SourceError("unreadable", f"{self._address.shown} is a pipe; write it to a file first")
        if kind == "file":
            # Without "file:" a colon in the name would be taken for a protocol, and without the option a step back for
            # stamps that ran over, a day ahead.
            return av.open(f"file:{target}", options=budget | {"correct_ts_overflow": "0"}, metadata_errors="replace")
        timeout = self._spec.open_timeout, self._spec.read_timeout
        if kind == "v4l2":
            return av.open(target, format="v4l2", options=budget | _camera(self._address), timeout=timeout)
        # At its timeout FFmpeg hands out a half-read picture first, and reports the stall after another one.
        options = {
            "rtsp_transport": self._spec.transport,
            "fflags": "+genpts+discardcorrupt",
            "allowed_media_types": "video",
            "analyzeduration": "1000000",  # else opening takes 5 s, and begins with pictures that are as old
            "fpsprobesize": "0",
        }
        timeout = (timeout[0], timeout[1] / 2)
        return av.open(target, options=budget | options, timeout=timeout, metadata_errors="replace")

    def _stream(self, container: InputContainer) -> av.VideoStream:
        stream = container.streams.best("video")
        if not isinstance(stream, av.VideoStream) or stream.disposition & Disposition.attached_pic:
            raise SourceError("unreadable", f"{self._address.shown} has no video in it; give one with moving pictures")
        if container.format.name in TEXT:
            raise SourceError("unreadable", f"{self._address.shown} is text, not a video; give a video file")
        if stream.codec_context is None:
            raise SourceError(
                "codec_unsupported", f"{self._address.shown} uses a codec this FFmpeg cannot decode; set H.264 or H.265"
            )
        try:
            check_size(self._address.shown, stream.width, stream.height, self._spec.max_pixels)
        except TooLarge as error:
            raise SourceError("unreadable", str(error)) from None
        options = {"max_pixels": str(self._spec.max_pixels)}  # it may grow on the way
        if self._finite:
            stream.thread_type = "AUTO"
        else:  # more would delay pictures, and keep the H.264 decoder from noticing that parts of them are missing
            stream.codec_context.thread_count = 1
            if stream.codec_context.name == "hevc":  # else it makes up the pictures that others depend on, in grey
                options["err_detect"] = "explode"
                self._units = PictureUnits(stream)
        stream.codec_context.options = options
        return stream

    def _decoded(self, packet: av.Packet[av.VideoStream], stream: av.VideoStream) -> Iterator[Picture]:
        """The whole pictures that a packet completes."""
        if packet.is_corrupt or (stream.codec_context.name == "mjpeg" and self._takes_too_long(packet)):
            self._lose()
            return
        try:
            whole = [packet] if self._units is None else self._units.of(packet)
            frames = [frame for part in whole for frame in stream.codec_context.decode(part)]
        except FFmpegError:
            self._lose()
            return
        if packet.is_keyframe and packet.is_discard and self._hidden is None:
            self._hidden = packet.pts
        for frame in frames:
            if frame.is_corrupt:
                self._lose()
            elif self._whole or frame.key_frame or self._follows(frame):
                self._whole = True
                yield self._picture(frame, stream)
            else:
                self.tally.drop("no_key")

    def _takes_too_long(self, packet: av.Packet[av.VideoStream]) -> bool:
        try:
            check_passes(self._address.shown, bytes(packet), self._spec.max_pixels)
        except TooLarge:
            return True
        return False

    def _follows(self, frame: av.VideoFrame) -> bool:
        """A key frame that is not shown was decoded before this one."""
        return self._hidden is not None and frame.pts is not None and frame.pts > self._hidden

    def _lose(self) -> None:
        self._whole = False
        self._hidden = None
        self.tally.drop("corrupt")

    def _picture(self, frame: av.VideoFrame, stream: av.VideoStream) -> Picture:
        base = frame.time_base or stream.time_base
        tick = float(base) if base else 0.0
        length = float(frame.duration or 0) * tick or 1 / float(stream.average_rate or 25)
        stamp = None if frame.pts is None or not tick else frame.pts * tick
        shape = float(stream.sample_aspect_ratio or 1)  # of a pixel
        develop, draw = (lambda: self._develop(frame)), lambda width: self._draw(frame, shape, width)
        return Picture(develop, stamp, length, (frame.height, frame.width), draw)

    def _develop(self, frame: av.VideoFrame) -> NDArray[np.uint8]:
        image = np.asarray(self._reformatter.reformat(frame, format="rgb24").to_ndarray(), np.uint8)
        if self._spec.size is not None:
            image = resize(image[None], self._spec.size)[0]
        if not self._finite:
            return image
        return np.asarray(upright(frame, Image.fromarray(image)))

    def _draw(self, frame: av.VideoFrame, shape: float, most: int) -> NDArray[np.uint8]:
        """At most so many pixels wide, `shape` being the width of a pixel over its height."""
        width = max(2, min(most, round(frame.width * shape)))
        height = max(2, round(frame.height * width / (frame.width * shape)))
        with self._draws:
            drawn = self._drawing.reformat(frame, width, height, "rgb24", interpolation="AREA")
        image = np.asarray(drawn.to_ndarray(), np.uint8)
        return np.asarray(upright(frame, Image.fromarray(image))) if self._finite else image


def _camera(address: Address) -> dict[str, str]:
    given: dict[str, Any] = dict(address.parameters)
    options = {"framerate": given.get("fps"), "input_format": given.get("format")}
    if "width" in given and "height" in given:
        options["video_size"] = f"{given['width']}x{given['height']}"
    return {key: value for key, value in options.items() if value}
