"""The options of cameras and of what is asked about them, as `config` has those of all else."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass

from dycoke_edge.config import MOST_PIXELS, Options, option
from dycoke_edge.errors import UsageError


@dataclass(frozen=True)
class ReaderSpec(Options):
    """How a camera or a file is read. Seconds are of the reader's clock."""

    size: int | None = option(None, "scale frames to size x size; None leaves them as they are", 1, 2**14)
    fps: float | None = option(None, "frames a second that are handed out; None is all", 1e-3, 1000)
    buffer: int = option(8, "frames that wait to be taken; beyond, a live stream drops its oldest", 1, 2**16)
    realtime: bool = option(False, "play a file or pattern at its own speed, as a camera would")
    open_timeout: float = option(10.0, "seconds a stream may take to open", 0.1, 3600)
    read_timeout: float = option(5.0, "seconds without data after which a stream counts as stalled", 0.1, 86400)
    stall_timeout: float = option(20.0, "seconds without a whole frame after which a stream is opened anew", 0.1, 86400)
    retry_first: float = option(1.0, "seconds before the first reconnect; doubles from then on", 0.01, 3600)
    retry_most: float = option(60.0, "most seconds between reconnects; the first after a wrong password", 0.01, 86400)
    healthy: float = option(30.0, "seconds online after which the next reconnect is quick again", 0, 86400)
    jump: float = option(5.0, "seconds that a live stream's clock may leap before frames are kept apart", 0.1, 86400)
    max_pixels: int = option(MOST_PIXELS, "most pixels (width x height) of a picture that is decoded", 1, 2**28)
    transport: str = option("tcp", "how RTSP sends video", choices=("tcp", "udp"))
    hosts: tuple[str, ...] = option((), "hosts or networks that an RTSP stream may come from, over TCP; none means all")
    allow_gst: bool = option(False, "take gst:// pipelines, which can do whatever GStreamer can")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stall_timeout < self.read_timeout:
            raise UsageError(
                f"stall_timeout={self.stall_timeout:g} (--stall-timeout) is shorter than "
                f"read_timeout={self.read_timeout:g} (--read-timeout); use e.g. --stall-timeout {self.read_timeout:g}"
            )


CLEAR = 0.4
CAMERA_ID = re.compile(r"[a-zA-Z0-9_-]{1,64}")  # they become topics, labels and paths


@dataclass(frozen=True)
class Rule(Options):
    """A yes/no question that is asked about every window. It raises an alert when the probability of "yes" among "yes"
    and "no" reaches `threshold` in `consecutive` windows, and ends it when it falls below `clear_threshold` in as many.
    A window in which the two together have less than `min_mass` says nothing: the model would answer something else."""

    id: str
    prompt: str
    alert_type: str = option("alert", "kind of alert, handed on in its events")
    threshold: float = option(0.6, "probability of yes at which a window counts for an alert", 0, 1)
    clear_threshold: float = option(
        None,
        f"probability of yes below which a window counts against it (default {CLEAR:g}, or a lower threshold)",
        0,
        1,
    )
    min_mass: float = option(0.5, "probability of yes and no together below which a window says nothing", 0, 1)
    consecutive: int = option(2, "windows in a row that begin an alert, and that end it", 1, 1000)
    cooldown_s: float = option(60.0, "seconds after an alert's end before the same rule begins another", 0, 86400)
    update_s: float = option(30.0, "seconds between two updates of an alert that lasts", 0, 86400)
    severity: str = option("info", "handed on in its events", choices=("info", "warning", "critical"))
    cameras: tuple[str, ...] = option((), "ids of the cameras it holds for; none means all")

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_id("rule", self.id)
        if not self.prompt.strip():
            raise UsageError(f"rule {self.id} has no question; use e.g. --rule '{self.id}=Is a person in view?'")
        if self.clear_threshold is None:
            object.__setattr__(self, "clear_threshold", min(CLEAR, self.threshold))
        if self.clear_threshold > self.threshold:
            raise UsageError(
                f"clear_threshold={self.clear_threshold:g} (--clear-threshold) of rule {self.id} is above "
                f"threshold={self.threshold:g} (--threshold); use e.g. --clear-threshold {self.threshold:g}"
            )


@dataclass(frozen=True)
class Camera(Options):
    """A stream and the windows that are looked at: the last `window_s` seconds, every `every_s`."""

    id: str
    uri: str = dataclasses.field(repr=False)  # may hold a password
    fps: float = option(1.0, "frames a second that are looked at", 1e-3, 1000)
    window_s: float = option(8.0, "length of a window in seconds", 1e-3, 86400)
    every_s: float = option(4.0, "seconds from one window to the next", 1e-3, 86400)
    prompt: str | None = option(None, "question asked about every window; its answers are events")
    rules: tuple[Rule, ...] = option((), "rules of this camera only")
    max_new_tokens: int = option(64, "longest answer to the prompt, in tokens", 1, 4096)
    stale_s: float = option(20.0, "after so many seconds without a frame there is no recent video", 0.1, 86400)
    realtime: bool = option(False, "play a file at its own speed, as a camera would")
    hosts: tuple[str, ...] = option((), "hosts or networks that an RTSP stream may come from, over TCP; none means all")

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_id("camera", self.id)
        if self.prompt is not None and not self.prompt.strip():
            raise UsageError(
                f"prompt of camera {self.id} is empty; ask something, e.g. 'What happens?', or leave it out"
            )

    @property
    def num_frames(self) -> int:
        """Frames in a full window, at least one."""
        return max(1, round(self.window_s * self.fps))


def _check_id(kind: str, name: str) -> None:
    if not CAMERA_ID.fullmatch(name):
        raise UsageError(f"{kind} id {name!r} must be 1 to 64 letters, digits, _ or -, e.g. front_door")
