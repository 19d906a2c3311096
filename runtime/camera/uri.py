"""What people write for a camera or a file, taken apart and checked."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike
from typing import Literal
from urllib.parse import parse_qsl, unquote, urlsplit

from dycoke_edge.errors import UsageError
from dycoke_edge.runtime.camera.redact import HIDDEN, concealed, redact

Kind = Literal["rtsp", "file", "v4l2", "csi", "test", "gst"]
EXAMPLES = "rtsp://host/stream, v4l2:///dev/video0, csi://0, test://?fps=10 or the path of a video file"
PARAMETERS: dict[Kind, frozenset[str]] = {
    "v4l2": frozenset(("width", "height", "fps", "format")),
    "csi": frozenset(("width", "height", "fps")),
    "test": frozenset(("fps", "seconds", "noise", "motion", "width", "height", "seed", "cut")),
}
LIMITS: dict[str, tuple[float, float, float]] = {  # least, most, an example
    "width": (2, 8192, 640),
    "height": (2, 8192, 480),
    "fps": (1e-3, 1000, 10),
    "seconds": (0, 1e7, 10),
    "noise": (0, 255, 2),
    "motion": (0, 1000, 1),
    "seed": (0, 1e9, 0),
    "cut": (0, 1e7, 5),
}
_WHOLE = frozenset(("width", "height", "seed"))


@dataclass(frozen=True)
class Address:
    """Where a source is. `target` is what opens it: a URL, a path, a device, a sensor number or a pipeline, with its
    credentials; `shown` is the same for people, without them."""

    kind: Kind
    target: str = field(repr=False)
    shown: str
    parameters: Mapping[str, str] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "shown", redact(self.shown))

    def number(self, key: str, default: float) -> float:
        """A parameter as a number, checked when the URI was read."""
        return float(self.parameters.get(key, default))


def parse_uri(uri: str | int | PathLike[str]) -> Address:
    """Takes rtsp rtsps file v4l2 csi test gst URIs, paths, /dev/videoN, and N for /dev/videoN. Raises UsageError with
    a redacted line for all else. Opens nothing."""
    if isinstance(uri, int):
        return _device(uri)
    text = os.fspath(uri).strip()
    if not text or "\0" in text:
        raise UsageError(f"the URI is empty or has a zero byte in it; use {EXAMPLES}")
    if re.fullmatch(r"\d{1,3}", text):
        return _device(int(text))
    scheme, mark, rest = text.partition("://")
    if not mark:
        return _path(text)
    match scheme.lower():
        case "rtsp" | "rtsps":
            return _network(text)
        case "file":
            return _path(unquote(rest.removeprefix("localhost")))
        case "v4l2":
            path, parameters = _split("v4l2", text, rest)
            return Address("v4l2", path if path.startswith("/") else f"/{path}", f"v4l2://{path}", parameters)
        case "csi":
            return _sensor(text, rest)
        case "test":
            return Address("test", rest, text, _split("test", text, rest)[1])
        case "gst":
            return _pipeline(text, rest)
    raise UsageError(f"{redact(text)} has a scheme that no source understands; use {EXAMPLES}")


def _device(number: int) -> Address:
    if number < 0:
        raise UsageError(f"{number} is no camera number; use e.g. 0 for /dev/video0")
    return Address("v4l2", f"/dev/video{number}", f"v4l2:///dev/video{number}")


def _path(path: str) -> Address:
    if re.fullmatch(r"/dev/video\d+", path):
        return Address("v4l2", path, f"v4l2://{path}")
    return Address("file", path, path)


def _network(text: str) -> Address:
    if re.search(r"\s", text):
        raise UsageError("the RTSP URI has a space in it; write it as %20")  # without the URI: where does it end?
    try:
        place = urlsplit(text)
        port, host = place.port, place.hostname
    except ValueError:
        port, host = 0, None
    if not host or port == 0 or _cuts_a_login(text, host, port):
        raise UsageError(
            f"{redact(text)} has no host or a wrong port; use rtsp://user:password@host:554/stream, "
            "with / ? # in a password written as %2F %3F %23"
        )
    return Address("rtsp", text, text)


def _cuts_a_login(text: str, host: str, port: int | None) -> bool:
    """What counts as host and port is the beginning of a login, e.g. admin:12 of admin:12#34@camera. An @ in the path
    of rtsp://10.0.0.5:554/a@b is none."""
    place, end, rest = re.split(r"([/?#]|$)", text.partition("://")[2], maxsplit=1)
    if "@" in place or "@" not in rest:
        return False
    return end == "#" or (port is not None and re.search("[.:]", host) is None)


def _sensor(text: str, rest: str) -> Address:
    sensor, parameters = _split("csi", text, rest)
    if not re.fullmatch(r"\d{1,2}", sensor or "0"):
        raise UsageError(f"{redact(text)} names no sensor; use e.g. csi://0")
    return Address("csi", sensor or "0", text, parameters)


def _pipeline(text: str, rest: str) -> Address:
    pipeline = rest.strip().rstrip("!").strip()
    if not pipeline:
        raise UsageError("gst:// has no pipeline; use e.g. 'gst://videotestsrc'")
    return Address("gst", pipeline, text)


def _split(kind: Kind, text: str, rest: str) -> tuple[str, dict[str, str]]:
    """What stands before the ? and the parameters behind it, checked."""
    place, _, query = rest.partition("?")
    known = PARAMETERS[kind]
    parameters = {}
    for key, value in parse_qsl(query, keep_blank_values=True):
        if key not in known:
            name = redact(key) if key in concealed(text) else HIDDEN  # a hidden value may hold a key and more
            raise UsageError(f"{redact(text)} has the unknown parameter {name}; known: {', '.join(sorted(known))}")
        if key != "format" and not _fits(key, value):
            low, high, example = LIMITS[key]
            raise UsageError(f"{redact(text)}: {key} must be a number from {low:g} to {high:g}, e.g. {key}={example:g}")
        parameters[key] = value
    return unquote(place), parameters


def _fits(key: str, value: str) -> bool:
    low, high, _ = LIMITS[key]
    pattern = r"\d{1,9}" if key in _WHOLE else r"\d{1,9}(\.\d{1,9})?"
    return re.fullmatch(pattern, value) is not None and low <= float(value) <= high
