"""How large a picture may be, whoever decodes it."""

from __future__ import annotations

import re

from dycoke_edge.errors import InputError

PASSES = 16  # over a picture of the largest size, that decoding a JPEG may take; more over a smaller one
_MARK = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")  # begins a segment of a JPEG, and ends the data of a scan
_SIZES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_SCAN, _BEGIN, _END = 0xDA, 0xD8, 0xD9


class TooLarge(InputError):
    """A picture that would take more memory or time to decode than it may."""


def check_size(what: str, width: int, height: int, most: int) -> None:
    """Raise TooLarge if a picture, named by `what`, has more than `most` pixels."""
    if width * height > most:
        raise TooLarge(f"{what} is {width} x {height} pixels; at most {most} in all (max_pixels), scale it down")


def check_passes(what: str, jpeg: bytes, most: int) -> None:
    """Raise TooLarge if decoding a JPEG would go over its pixels too often: a few bytes ask for one more time."""
    count, pixels = passes(jpeg)
    if count > 1 and count * pixels > PASSES * most:
        raise TooLarge(f"{what} goes over {pixels} pixels {count} times, which takes too long; save it again")


def passes(jpeg: bytes) -> tuple[int, int]:
    """How often decoding a JPEG goes over its pixels, and how many those are. A thumbnail inside it and what follows
    it do not count."""
    count = pixels = at = 0
    while (mark := _MARK.search(jpeg, at)) is not None:
        kind, at = jpeg[mark.end() - 1], mark.end()
        if kind == _BEGIN:
            continue
        if kind == _END:
            break
        if kind in _SIZES:
            height, width = int.from_bytes(jpeg[at + 3 : at + 5], "big"), int.from_bytes(jpeg[at + 5 : at + 7], "big")
            pixels = max(pixels, width * height)
        count += kind == _SCAN
        at += int.from_bytes(jpeg[at : at + 2], "big")
    return count, pixels
