"""From a URL in a request to frames: data URLs, allowed files and hosts, nothing decoded before it is known to be small
enough."""

from __future__ import annotations

import base64
import binascii
import errno
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Literal, cast
from urllib.parse import unquote

import av
import numpy as np
from av.container import InputContainer
from av.error import FFmpegError
from numpy.typing import NDArray

from dycoke_edge.config import Clip
from dycoke_edge.config_serve import ServeSpec
from dycoke_edge.errors import DycokeEdgeError, InputError, UsageError
from dycoke_edge.runtime import images
from dycoke_edge.runtime.container import picture
from dycoke_edge.runtime.serve.fetch import Fetcher
from dycoke_edge.runtime.serve.files import AllowedFiles
from dycoke_edge.runtime.serve.hosts import AllowedHosts
from dycoke_edge.runtime.video import open_visual, read_image

Frames = NDArray[np.uint8]
Kind = Literal["video", "image"]

# FFmpeg also plays lists that name other files and hosts. These formats hold all they show.
FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,ogg,asf,gif,mjpeg,h264,hevc,ivf"
PICTURES = "data:video/jpeg;base64,"  # and pictures with commas between them
URL_SAFE = str.maketrans("-_", "+/")
PACKETS = 100_000  # of a video; each takes some memory and time, however small
DECODED_PIXELS = 2e10  # of a whole video: 40 minutes of 640 x 360 at 15 frames a second, 5 of 1920 x 1080 at 30


@dataclass(frozen=True)
class Wanted:
    """Which frames of a video a request asks for, before what the server allows."""

    fps: float | None = None
    num_frames: int | None = None


class Media:
    """Reads what requests show. Blocking; several threads may."""

    def __init__(self, spec: ServeSpec, size: int) -> None:
        self._spec, self._size = spec, size
        self._files = AllowedFiles(spec.file_dirs, spec.max_body_bytes)
        self._fetcher = Fetcher(AllowedHosts("fetch_hosts", spec.fetch_hosts), spec.max_body_bytes)

    def image(self, url: str, key: str = "image_url") -> Frames:
        """uint8 [R, R, 3] of an image_url. Raises UsageError or InputError, which speak of `key`."""
        with self._at(url, key) as path:
            return cast(Frames, read_image(path, self._size, self._spec.max_pixels).pixels[0])

    def images(self, urls: Sequence[str], key: str = "image_url") -> Frames:
        """uint8 [F, R, R, 3]: a clip given as pictures, which were chosen by whoever sent them. Raises UsageError or
        InputError."""
        if len(urls) > self._spec.max_frames:
            raise UsageError(f"{key}: {len(urls)} pictures; at most {self._spec.max_frames}")
        return np.stack([self.image(url, f"{key}, picture {number}") for number, url in enumerate(urls, 1)])

    def video(self, url: str, wanted: Wanted) -> Frames:
        """uint8 [F, R, R, 3] of a video_url, F at least 1. Raises UsageError or InputError."""
        if url.startswith(PICTURES):
            pictures = url.removeprefix(PICTURES).split(",")
            return self.images([f"data:image/jpeg;base64,{picture}" for picture in pictures], "video_url")
        with self._at(url, "video_url") as path:
            seconds = check_video(path, self._spec)
            return open_visual(path, self._clip(wanted, seconds), self._size).pixels

    def _clip(self, wanted: Wanted, seconds: float) -> Clip:
        most, usual = self._spec.max_frames, Clip().num_frames
        pixels = self._spec.max_pixels
        if wanted.fps is None:
            return Clip(num_frames=min(most, wanted.num_frames or usual), max_pixels=pixels)
        fps = min(wanted.fps, self._spec.max_fps)
        if fps * seconds > min(most, wanted.num_frames or most) or fps < 1e-3:
            return Clip(num_frames=min(most, wanted.num_frames or most), max_pixels=pixels)
        return Clip(fps=fps, max_pixels=pixels)

    @contextmanager
    def _at(self, url: str, key: str) -> Iterator[Path]:
        """The file that a URL leads to, for as long as it is read; errors speak of `key` instead of its path."""
        path = Path("?")
        try:
            with self._found(url) as path:
                yield path
        except DycokeEdgeError as error:
            text = str(error)
            for option in (f"{path} (--video)", f"{path} (--image)", str(path)):
                text = text.replace(option, "it")
            raise type(error)(f"{key}: {text}") from None

    @contextmanager
    def _found(self, url: str) -> Iterator[Path]:
        scheme = url.split(":", 1)[0].lower()
        if scheme == "file":
            with self._files.opened(url) as path:
                yield path
            return
        if scheme not in ("data", "http", "https"):
            raise UsageError("give a data: URL, e.g. data:video/mp4;base64,...")
        try:
            temporary = NamedTemporaryFile(prefix="dycoke-")  # noqa: SIM115 - its errors are ours only here
        except OSError as error:
            raise OSError(errno.ENOSPC, error.strerror or "no file can be made") from error
        with temporary as file:
            if scheme == "data":
                file.write(from_data_url(url))
            else:
                self._fetcher.fetch(url, file)
            file.flush()
            yield Path(file.name)


def from_data_url(url: str) -> bytes:
    """The bytes of a base64 data URL; UsageError if it is none. Base64 comes in lines, in the alphabet of URLs and
    without its padding too."""
    head, comma, text = url.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise UsageError("a data URL must be base64, e.g. data:image/jpeg;base64,...")
    if "%" in text:
        text = unquote(text)
    text = "".join(line.strip() for line in text.splitlines())  # a space inside a line was a + once
    text = text.translate(URL_SAFE).rstrip("=")
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except (binascii.Error, ValueError):
        raise UsageError("the base64 of this data URL is damaged; encode it again") from None


def check_video(path: Path, spec: ServeSpec) -> float:
    """Refuse a video by its header and packets, without decoding any. Returns its seconds, 0 if they are unknown."""
    if images.kind(path, spec.max_pixels) == "animation":
        return _check_animation(path, spec)
    options = {"format_whitelist": FORMATS, "protocol_whitelist": "file", "max_pixels": str(spec.max_pixels)}
    try:
        with av.open(f"file:{path}", options=options, metadata_errors="replace") as container:
            stream = picture(path, container, spec.max_pixels)
            packets = list(islice(_stamps(container, stream), PACKETS + 1))
            shown = [pts for pts, is_shown in packets if is_shown]
            seconds = _seconds(stream, [pts for pts in shown if pts is not None], len(shown))
            _check_seconds(seconds, spec)
            _check_work(len(packets), stream.width, stream.height)  # what an edit list hides is decoded too
            return seconds
    except (FFmpegError, OSError):
        raise InputError("cannot be read as a video; give MP4, WebM, Matroska, AVI or MPEG") from None


def _check_animation(path: Path, spec: ServeSpec) -> float:
    """`check_video` of what Pillow plays: its frames must be decoded to know how long they last."""
    with images.opened(path, "--video", spec.max_pixels) as image:
        count = getattr(image, "n_frames", 1)
        _check_work(count, *image.size)
        seconds = float(images.times(image)[-1])
        _check_seconds(seconds, spec)
        return seconds


def _stamps(container: InputContainer, stream: av.VideoStream) -> Iterator[tuple[int | None, bool]]:
    """Of every packet when its frame is shown, and whether it is."""
    for packet in container.demux(stream):
        if packet.size:
            yield packet.pts, not packet.is_discard


def _seconds(stream: av.VideoStream, stamps: list[int], count: int) -> float:
    base, rate = stream.time_base, float(stream.average_rate or 25)
    span = float((max(stamps) - min(stamps)) * base) if stamps and base else 0.0
    return span + 1 / rate if span > 0 and math.isfinite(span) else count / rate


def _check_seconds(seconds: float, spec: ServeSpec) -> None:
    if seconds > spec.max_video_s:
        raise InputError(f"{seconds:.0f} s long; at most {spec.max_video_s:g} s, cut it")


def _check_work(count: int, width: int, height: int) -> None:
    if count > PACKETS or count * width * height > DECODED_PIXELS:
        raise InputError(f"{count} or more frames of {width} x {height}; give a shorter or smaller video")
