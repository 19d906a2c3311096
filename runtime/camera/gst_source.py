"""GstSource: gst:// pipelines and CSI cameras through GStreamer, which reaches a Jetson's decoders and scalers.

Needs the Python bindings `gi`, which come with the system (python3-gst-1.0), not from PyPI. On a Jetson:
gst://rtspsrc location=rtsp://host/stream protocols=tcp latency=200 ! rtph264depay ! h264parse ! nvv4l2decoder
"""

from __future__ import annotations

import importlib
import importlib.util
import threading
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dycoke_edge.config_camera import ReaderSpec
from dycoke_edge.errors import UsageError
from dycoke_edge.runtime.camera.clock import Clock
from dycoke_edge.runtime.camera.failure import SourceError
from dycoke_edge.runtime.camera.frame import Frame, SourceInfo, Tally
from dycoke_edge.runtime.camera.picker import Picker, Picture
from dycoke_edge.runtime.camera.uri import Address
from dycoke_edge.runtime.video import narrowed, resize

SLICE = 0.1  # seconds; how soon an interrupt is seen
SINK = "dycoke_edge_sink"


class GstSource:
    """Live: the newest picture waits in GStreamer, older ones are dropped there. The pipeline ends where raw video
    comes out, in the memory of a Jetson's accelerators or not."""

    def __init__(self, address: Address, spec: ReaderSpec, source_id: str, clock: Clock) -> None:
        if address.kind == "gst" and not spec.allow_gst:
            raise UsageError("gst:// pipelines are not allowed here (allow_gst=False); use --allow-gst, or rtsp://")
        if importlib.util.find_spec("gi") is None:
            raise UsageError(
                f"{address.kind}:// needs GStreamer's Python bindings, which this Python lacks; install "
                "python3-gst-1.0 and use a virtual environment with --system-site-packages"
            )
        self.tally = Tally()
        self._address, self._spec, self._clock = address, spec, clock
        self._stop = threading.Event()
        self._picker = Picker(spec, source_id, False, self.tally, clock, self._stop)
        self._gst: Any = None
        self._pipeline: Any = None
        self._sink: Any = None
        self._first: Any = None  # sample, pulled by open()

    def open(self) -> SourceInfo:
        gst = self._gst = _bindings()
        failure = None
        try:
            self._pipeline = gst.parse_launch(f"{_front(self._address)} ! {_back(gst)}")
        except Exception as error:  # GLib.Error, which cannot be named before gi is imported
            failure = SourceError("unreadable", f"{self._address.shown} is no pipeline: {error}")
        if failure is not None:
            raise failure
        self._sink = self._pipeline.get_by_name(SINK)
        self._pipeline.set_state(gst.State.PLAYING)
        self._first = self._pull(self._spec.open_timeout)
        if self._first is None:
            raise SourceError("ended", f"{self._address.shown} ended before the first picture")
        caps = self._first.get_caps().get_structure(0)
        known, above, below = caps.get_fraction("framerate")
        rate = above / below if known and above and below else None
        width, height = caps.get_value("width"), caps.get_value("height")
        return SourceInfo(self._address.shown, True, False, "raw", width, height, rate)

    def __iter__(self) -> Iterator[Frame]:
        sample, self._first = self._first, None
        while sample is not None and not self._stop.is_set():
            self.tally.last_packet = self._clock.monotonic()
            yield from self._picker.offer(self._picture(sample))
            sample = self._pull(self._spec.read_timeout)

    def interrupt(self) -> None:
        self._stop.set()

    def close(self) -> None:
        self._stop.set()
        pipeline, self._pipeline, self._sink, self._first = self._pipeline, None, None, None
        if pipeline is not None:
            pipeline.set_state(self._gst.State.NULL)

    def _pull(self, timeout: float) -> Any:
        """The next sample; None at the end or when interrupted. Raises SourceError for what the pipeline reports, or
        when nothing came in time."""
        late = self._clock.monotonic() + timeout
        while not self._stop.is_set():
            sample = self._sink.try_pull_sample(int(SLICE * self._gst.SECOND))
            if sample is not None:
                return sample
            message = self._pipeline.get_bus().pop_filtered(self._gst.MessageType.ERROR)
            if message is not None:
                raise SourceError("unreadable", f"{self._address.shown}: {message.parse_error()[0].message}")
            if self._sink.is_eos():
                return None
            if self._clock.monotonic() > late:
                raise SourceError("timeout", f"{self._address.shown} sent nothing for {timeout:g} s")
        return None

    def _picture(self, sample: Any) -> Picture:
        caps = sample.get_caps().get_structure(0)
        shape = int(caps.get_value("height")), int(caps.get_value("width"))
        buffer, none = sample.get_buffer(), self._gst.CLOCK_TIME_NONE
        stamp = None if buffer.pts == none else buffer.pts / self._gst.SECOND
        length = 0.0 if buffer.duration == none else buffer.duration / self._gst.SECOND
        develop, draw = (lambda: self._develop(buffer, shape)), lambda width: narrowed(_image(buffer, shape), width)
        return Picture(develop, stamp, length, shape, draw)

    def _develop(self, buffer: Any, shape: tuple[int, int]) -> NDArray[np.uint8]:
        image = _image(buffer, shape)
        return image if self._spec.size is None else resize(image[None], self._spec.size)[0]


def _image(buffer: Any, shape: tuple[int, int]) -> NDArray[np.uint8]:
    # RGBA rows are multiples of 4 bytes, so there is no padding between them.
    rgba = np.frombuffer(buffer.extract_dup(0, shape[0] * shape[1] * 4), np.uint8).reshape(*shape, 4)
    return np.ascontiguousarray(rgba[..., :3])


def _bindings() -> Any:
    gi = importlib.import_module("gi")
    try:
        gi.require_version("Gst", "1.0")
        gi.require_version("GstApp", "1.0")
        gst = importlib.import_module("gi.repository.Gst")
        importlib.import_module("gi.repository.GstApp")  # gives appsink its methods
    except (ImportError, ValueError) as error:
        raise UsageError(
            f"GStreamer's Python bindings are incomplete ({error}); install gir1.2-gst-plugins-base-1.0"
        ) from error
    if not gst.is_initialized():
        gst.init(None)
    return gst


def _front(address: Address) -> str:
    if address.kind == "gst":
        return address.target
    given = address.parameters
    wanted = [f"{key}=(int){given[key]}" for key in ("width", "height") if key in given]
    if "fps" in given:
        rate = Fraction(given["fps"]).limit_denominator(1001)
        wanted.append(f"framerate=(fraction){rate.numerator}/{rate.denominator}")
    return f"nvarguscamerasrc sensor-id={address.target} ! " + ",".join(["video/x-raw(memory:NVMM)", *wanted])


def _back(gst: Any) -> str:
    """From raw video to RGBA in plain memory: on a Jetson by its own converter, elsewhere on the CPU."""
    convert = "nvvidconv" if gst.ElementFactory.find("nvvidconv") else "videoconvert"
    return f"{convert} ! video/x-raw,format=RGBA ! appsink name={SINK} max-buffers=1 drop=true sync=false"
