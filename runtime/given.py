"""Pictures that an application has in memory: an array or a PIL image, and clips, which are rows of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from os import PathLike
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from dycoke_edge.config import MOST_PIXELS
from dycoke_edge.errors import UsageError
from dycoke_edge.runtime.images import rgb
from dycoke_edge.runtime.video import read_image, resize

Picture = NDArray[np.uint8] | Image.Image  # uint8 [H, W, 3], or any PIL image
Frames = NDArray[np.uint8] | Sequence[Picture | str | PathLike[str]]  # uint8 [F, H, W, 3], or a list
WANTED = "uint8 [H, W, 3] or a PIL image"


def as_clip(video: Any) -> Frames:
    """The frames of a clip; UsageError for what is none, before anything is scaled."""
    if isinstance(video, Image.Image):
        raise UsageError("video is one PIL image; give it as image=, or several in a list")
    if isinstance(video, np.ndarray):
        return _checked(video, "video", 4, "uint8 [F, H, W, 3]")
    if not isinstance(video, Sequence) or isinstance(video, (bytes, bytearray)):
        raise UsageError(f"video is a {type(video).__name__}; give a path, uint8 [F, H, W, 3] or a list of frames")
    if not video:
        raise UsageError("video is an empty list; give one frame at least")
    for number, frame in enumerate(video):
        if not isinstance(frame, (str, PathLike)):
            as_picture(frame, f"video[{number}]")
    return video


def as_picture(picture: Any, name: str = "image") -> Picture:
    """The same picture; UsageError for what is none."""
    if isinstance(picture, Image.Image):
        return picture
    if isinstance(picture, np.ndarray):
        return _checked(picture, name, 3, WANTED)
    raise UsageError(f"{name} is a {type(picture).__name__}; give a path, {WANTED}")


def scaled(pictures: Iterable[Any], size: int, max_pixels: int = MOST_PIXELS) -> NDArray[np.uint8]:
    """uint8 [F, size, size, 3] of what the functions above let through, each of a size of its own. InputError for a
    file with more than `max_pixels`."""
    return np.stack([_scaled(picture, size, max_pixels) for picture in pictures])


def _scaled(picture: Any, size: int, max_pixels: int) -> NDArray[np.uint8]:
    if isinstance(picture, (str, PathLike)):
        pixels: NDArray[np.uint8] = read_image(picture, size, max_pixels).pixels[0]
        return pixels
    if isinstance(picture, Image.Image):
        picture = np.asarray(rgb(ImageOps.exif_transpose(picture)))
    frame: NDArray[np.uint8] = resize(picture[None], size)[0]
    return frame


def _checked(array: NDArray[Any], name: str, dims: int, wanted: str) -> NDArray[np.uint8]:
    if array.dtype != np.uint8 or array.ndim != dims or array.shape[-1] != 3 or 0 in array.shape:
        raise UsageError(f"{name} has {array.dtype} {list(array.shape)}; give {wanted} with at least one pixel")
    return array
