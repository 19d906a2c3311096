"""Image files and animations, through Pillow: what they are, and what is refused before it is decoded."""

from __future__ import annotations

import io
import os
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from dycoke_edge.errors import DycokeEdgeError, InputError
from dycoke_edge.runtime.budget import TooLarge, check_passes, check_size

# Named one by one: Pillow takes MPEG streams for images too, and runs a program for EPS.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "AVIF", "PPM", "JPEG2000")
JPEGS = ("JPEG", "MPO")
PLAYED = ("PNG", "WEBP")  # animations of these
FILMS = ("GIF", "AVIF")  # FFmpeg plays these
ROWS = (".mjpeg", ".mjpg")  # JPEGs in a row, which by content are the first of them
BROKEN = (OSError, SyntaxError, ValueError, EOFError, struct.error, LookupError, ArithmeticError)  # what Pillow raises
SLACK = 16  # bytes
SHORTEST = 0.01  # seconds; what is shown for no longer is shown for USUAL, as browsers do
USUAL = 0.1


class NoImage(InputError):
    """A file that is not an image, whole or damaged."""


@contextmanager
def opened(path: Path, option: str, most: int) -> Iterator[Image.Image]:
    """The image, its pixels not yet decoded. Raises NoImage if it is none, InputError if it is damaged, then or while
    it is used, or has more than `most` pixels."""
    Image.init()
    formats = [name for name in FORMATS if name in Image.OPEN]  # a Pillow may be built without some
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with path.open("rb") as file, Image.open(_sized(file), formats=formats) as image:
                check_size(f"{path} ({option})", image.width, image.height, most)
                if image.format in JPEGS:
                    check_passes(f"{path} ({option})", path.read_bytes(), most)
                yield image
    except UnidentifiedImageError as error:
        raise NoImage(f"{path} ({option}) is not an image; give a JPEG, PNG or WebP file") from error
    except Image.DecompressionBombError as error:
        raise TooLarge(f"{path} ({option}) has more than {most} pixels; scale it down") from error
    except BROKEN as error:
        if isinstance(error, DycokeEdgeError):
            raise
        reason = " ".join(str(error).split())
        raise InputError(f"{path} ({option}) cannot be read ({reason}); copy it again or save it as JPEG") from error


def kind(path: Path, most: int, option: str = "--video") -> Literal["image", "animation", "video"]:
    """What a file is by its content: an image, an animation that Pillow plays, or what FFmpeg may know. Raises
    TooLarge, which calls the file by `option`."""
    if path.suffix.lower() in ROWS:
        return "video"
    try:
        with opened(path, option, most) as image:
            if image.format not in (*PLAYED, *FILMS) or getattr(image, "n_frames", 1) == 1:
                return "image"
            return "animation" if image.format in PLAYED else "video"
    except NoImage:
        return "video"
    except TooLarge:
        raise
    except InputError:
        return "image"  # which `read_image` will complain of


def times(image: Image.Image) -> NDArray[np.float64]:
    """When each frame of an animation begins, and when the last ends: seconds from the first, float64 [frames + 1]."""
    return np.cumsum([0.0, *map(length, frames(image))])


def length(frame: Image.Image) -> float:
    """For how many seconds a decoded frame of an animation is shown."""
    seconds = float(frame.info.get("duration", 0)) / 1000
    return seconds if seconds > SHORTEST else USUAL


def frames(image: Image.Image) -> Iterator[Image.Image]:
    """Every frame of an animation in its turn, decoded. A picture for programs that know no animations is none."""
    for place in range(int(bool(image.info.get("default_image"))), getattr(image, "n_frames", 1)):
        image.seek(place)
        image.load()
        yield image


def _sized(file: BinaryIO) -> BinaryIO:
    """The file; a copy of it, put right, if it is a WebP whose size is wrong by some bytes, for which Pillow would
    refuse it."""
    head = file.read(12)
    size = file.seek(0, os.SEEK_END) - 8
    file.seek(0)
    wrong = int.from_bytes(head[4:8], "little") - size
    if head[:4] != b"RIFF" or head[8:] != b"WEBP" or not 0 < abs(wrong) <= SLACK:
        return file
    file.seek(8)
    return io.BytesIO(b"RIFF" + size.to_bytes(4, "little") + file.read())


def rgb(image: Image.Image) -> Image.Image:
    """The image in 8 bits a channel."""
    if image.mode.startswith("I"):  # 16 bits a pixel; Pillow's own conversion clips them to white
        image = Image.fromarray((np.asarray(image) // 256).astype(np.uint8))
    return image.convert("RGB")
