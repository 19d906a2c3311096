"""From a video or image file to the frames that a model sees: which ones, at which size, with
which numbers."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import numpy as np
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray
from PIL import Image, ImageOps

from dycoke_edge.config import MOST_PIXELS, Clip
from dycoke_edge.errors import InputError, UsageError
from dycoke_edge.runtime import images
from dycoke_edge.runtime.container import Index, scan
from dycoke_edge.runtime.pictures import Contradiction, count, decode, upright

Progress = Callable[[int, int], None]

ROUNDING = 1e-3  # seconds; Matroska rounds its times to this


@dataclass(frozen=True)
class Frames:
    """Frames of a clip at the model's size: `pixels` uint8 [F, R, R, 3] in RGB, `times` float64
    [F], seconds from the first frame of the file, and `shape`, width and height before that."""

    pixels: NDArray[np.uint8]
    times: NDArray[np.float64]
    shape: tuple[int, int]


def sample_indices(total: int, num_frames: int) -> NDArray[np.int64]:
    """Which of `total` frames to look at: int64 [min(num_frames, total)], evenly spread, the
    first being 0. This is the rule of transformers' video processors, in integers; where they
    raise for total < num_frames, every frame is taken once."""
    picked = min(num_frames, total)
    return np.arange(picked, dtype=np.int64) * total // max(picked, 1)


def sample_fps(times: NDArray[np.float64], fps: float, start: float, end: float) -> NDArray[np.int64]:
    """Which frames are on the screen at start, start + 1/fps, ... before `end`. `times` float64
    [n] are the seconds at which frames of [start, end) appear, in order. Increasing int64
    indices: a frame that stays on the screen longer than 1/fps is taken once. Raises nothing."""
    edges = np.ceil((np.append(times, end) - ROUNDING - start) * fps).astype(np.int64)
    edges[0], edges[-1] = 0, max(edges[-1], 1)
    return np.flatnonzero(np.diff(np.maximum(edges, 0)) > 0)


def read_video(path: str | PathLike[str], clip: Clip, size: int, on_frame: Progress | None = None) -> Frames:
    """Reads the frames that `clip` asks for from any file FFmpeg reads, each resized to `size` x
    `size` when it is taken: memory depends on their number only. `on_frame(done, total)` follows
    the work; it may start over once, for a file whose packets and frames differ. Raises
    UsageError for a start behind the end, InputError for a file that cannot be read or is
    damaged where it is needed. An `end` behind the end of the video means all of it."""
    path = _file(path, "--video")
    index = scan(path, clip.max_pixels, clip.start, clip.end)
    if index is not None:
        try:
            return _take(path, index, clip, size, on_frame)
        except Contradiction:
            pass  # decoding shows better what there is
    return _take(path, count(path, clip.end, clip.max_pixels), clip, size, on_frame)


def _take(path: Path, index: Index, clip: Clip, size: int, on_frame: Progress | None) -> Frames:
    chosen = _choose(path, index, clip)
    if on_frame is not None:
        on_frame(0, len(chosen))
    pixels = np.empty((len(chosen), size, size, 3), np.uint8)
    reformatter = VideoReformatter()  # one each is never given back, nor are its threads (PyAV before 19)
    shape = (size, size)
    for place, frame in enumerate(decode(path, index, chosen, clip.max_pixels)):
        image = Image.fromarray(reformatter.reformat(frame, format="rgb24", threads=1).to_ndarray())
        pixels[place] = np.asarray(upright(frame, _scaled(image, size)))
        shape = upright(frame, Image.new("1", (frame.width, frame.height))).size
        if on_frame is not None:
            on_frame(place + 1, len(chosen))
    return Frames(pixels, index.times[chosen], shape)


def _choose(path: Path, index: Index, clip: Clip) -> NDArray[np.int64]:
    if clip.start >= index.duration:
        raise UsageError(
            f"start={clip.start:g} (--start) is behind the end of {path}, "
            f"which lasts {index.duration:.2f} s; use --start 0 or another time within"
        )
    end = index.duration if clip.end is None else min(clip.end, index.duration)
    inside = np.flatnonzero((index.times >= clip.start) & (index.times < end))
    if not len(inside):  # nothing changes between start and end: what is on the screen then
        return np.array([np.searchsorted(index.times, clip.start, "right") - 1])
    if clip.fps is None:
        return inside[sample_indices(len(inside), clip.num_frames)]
    return inside[sample_fps(index.times[inside], clip.fps, clip.start, end)]


def read_image(path: str | PathLike[str], size: int, max_pixels: int = MOST_PIXELS) -> Frames:
    """Reads an image as a clip of one frame at time 0, turned as its EXIF data say, resized to
    `size` x `size`. Raises InputError for a file that is not an image, is damaged or has more than `max_pixels`."""
    path = _file(path, "--image")
    with images.opened(path, "--image", max_pixels) as image:
        upright_image = ImageOps.exif_transpose(image)
        pixels = np.asarray(_scaled(images.rgb(upright_image), size))
    return Frames(pixels[None].copy(), np.zeros(1), upright_image.size)


def read_animation(path: str | PathLike[str], clip: Clip, size: int, on_frame: Progress | None = None) -> Frames:
    """As `read_video`, of an animated WebP or PNG."""
    path = _file(path, "--video")
    with images.opened(path, "--video", clip.max_pixels) as image:
        times = images.times(image)
        chosen = _choose(path, Index(times[:-1], float(times[-1])), clip)
        wanted = set(chosen.tolist())
        pixels = list[NDArray[np.uint8]]()
        if on_frame is not None:
            on_frame(0, len(chosen))
        for place, frame in enumerate(images.frames(image)):
            if place in wanted:
                pixels.append(np.asarray(_scaled(images.rgb(frame), size)))
                if on_frame is not None:
                    on_frame(len(pixels), len(chosen))
        return Frames(np.stack(pixels), times[chosen], image.size)


def open_visual(path: str | PathLike[str], clip: Clip, size: int, on_frame: Progress | None = None) -> Frames:
    """`read_image`, `read_animation` or `read_video`, whichever the content calls for. Raises what they raise."""
    path = _file(path, "--video")
    match images.kind(path, clip.max_pixels):
        case "image":
            return read_image(path, size, clip.max_pixels)
        case "animation":
            return read_animation(path, clip, size, on_frame)
        case "video":
            return read_video(path, clip, size, on_frame)


def resize(frames: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """Scales uint8 [F, H, W, 3] to uint8 [F, size, size, 3], bicubic with antialiasing, as the
    models were trained. Frames of that size already are given back as they are."""
    if frames.shape[1:3] == (size, size):
        return np.ascontiguousarray(frames)
    return np.stack([np.asarray(_scaled(Image.fromarray(frame), size)) for frame in frames])


def narrowed(image: NDArray[np.uint8], most: int) -> NDArray[np.uint8]:
    """uint8 [H, W, 3] at most so many pixels wide, in its own shape."""
    height, width = image.shape[:2]
    if width <= most:
        return image
    return np.asarray(Image.fromarray(image).resize((most, max(1, round(height * most / width))), reducing_gap=2.0))


def _scaled(image: Image.Image, size: int) -> Image.Image:
    # Pillow 13 may scale columns first, which clips overshoot differently; torchvision never does.
    wide = image.resize((size, image.height), Image.Resampling.BICUBIC)
    return wide.resize((size, size), Image.Resampling.BICUBIC)


def to_pixels(frames: NDArray[np.uint8], mean: Sequence[float], std: Sequence[float]) -> NDArray[np.float32]:
    """What the vision encoder takes: uint8 [F, R, R, 3] to float32 [F, 3, R, R], (x / 255 -
    mean) / std by channel."""
    scale = 1 / (255 * np.asarray(std, np.float32))
    shift = np.asarray(mean, np.float32) / np.asarray(std, np.float32)
    return np.ascontiguousarray((frames * scale - shift).transpose(0, 3, 1, 2))


def _file(path: str | PathLike[str], option: str) -> Path:
    """The path of a file that can be read as often as needed. Opens nothing that could wait for somebody."""
    text = os.fspath(path)
    scheme = re.match(r"([a-z][a-z0-9+.-]+):/", text, re.IGNORECASE)
    path = Path(path)
    try:
        if path.is_file():
            if path.stat().st_size == 0:
                raise InputError(f"{path} ({option}) is empty; copy or record it again")
            path.open("rb").close()
            return path
        if path.exists():
            raise InputError(f"{path} ({option}) {_no_file(path)}")
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} ({option}) cannot be opened ({_line(error)}); check its permissions") from error
    if scheme:  # without the rest, which may hold a password
        raise InputError(
            f"{option} takes a file, and this begins with {scheme[1]}:; use dycoke-edge watch or ask for the rtsp:// "
            "address of a camera, download other addresses, or give a path"
        )
    raise InputError(f"{path} ({option}) does not exist; check the path")


def _no_file(path: Path) -> str:
    if path.is_dir():
        return "is a folder; give one file"
    if path.is_fifo():
        return "is a pipe, and its beginning is needed twice; write it to a file first, e.g. cat > clip.mp4"
    return "is a device; give a file, or use dycoke-edge watch or ask for a camera"


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())
