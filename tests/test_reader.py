"""CameraReader on made-up sources: reconnects, stalls, back-pressure, and stop in every state."""

from __future__ import annotations

import itertools
import logging
import random
import threading
import time
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from dycoke_edge.config_camera import ReaderSpec
from dycoke_edge.errors import UsageError
from dycoke_edge.runtime.camera.backoff import Backoff
from dycoke_edge.runtime.camera.clock import SYSTEM
from dycoke_edge.runtime.camera.frame import Frame, SourceInfo, Tally
from dycoke_edge.runtime.camera.picker import Picker, Picture
from dycoke_edge.runtime.camera.reader import CameraReader
from dycoke_edge.runtime.camera.source import SourceError
from dycoke_edge.runtime.camera.status import CameraStatus
from tests.clips import read_mark, turned, write_clip

PATIENCE = 20.0  # seconds that a test waits for what must come; never reached when it comes
CANARY = "c4n4ry"
SPEC = ReaderSpec()
IMAGE = np.zeros((2, 2, 3), np.uint8)


def wait(happened: Callable[[], object]) -> None:
    late = time.monotonic() + PATIENCE
    while not happened():
        assert time.monotonic() < late, "it never happened"
        time.sleep(0.005)


class Clock:
    """Time goes by only when a test says so, or when somebody sleeps: then at once."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.slept: list[float] = []

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return 1.7e9 + self.now

    def sleep(self, seconds: float, wake: threading.Event) -> bool:
        self.slept.append(seconds)
        self.now += max(0.0, seconds)
        return wake.is_set()


class Fake:
    """A source that does what a script says: a number is so many frames, an exception is raised, an Event is waited
    for in the way of an operating system that cannot be interrupted."""

    def __init__(self, *script: object, live: bool = True, finite: bool = False, clock: Clock | None = None) -> None:
        self.tally = Tally()
        self.script, self.live, self.finite, self.clock = script, live, finite, clock
        self.interrupted, self.closed, self.opened = threading.Event(), 0, 0

    def open(self) -> SourceInfo:
        self.opened += 1
        if self.script and self.script[0] == "open":
            self._do(self.script[1])
        return SourceInfo("fake", self.live, self.finite)

    def __iter__(self) -> Iterator[Frame]:
        for step in self.script[2:] if self.script and self.script[0] == "open" else self.script:
            if not isinstance(step, int):
                self._do(step)
                continue
            for _ in range(step):
                if self.interrupted.is_set():
                    return
                yield self.frame()

    def frame(self) -> Frame:
        clock = self.clock if self.clock is not None else SYSTEM
        index = self.tally.decoded
        self.tally.decoded += 1
        self.tally.last_packet = self.tally.last_picture = clock.monotonic()
        return Frame(IMAGE, index, index / 10, clock.time(), clock.monotonic(), 0, "fake")

    def _do(self, step: object) -> None:
        if isinstance(step, BaseException):
            raise step
        if step == "idle":
            self.interrupted.wait()
        if isinstance(step, threading.Event):
            step.wait()

    def interrupt(self) -> None:
        self.interrupted.set()

    def close(self) -> None:
        self.closed += 1


def reader(
    *sources: Fake, spec: ReaderSpec = SPEC, clock: Clock | None = None
) -> tuple[CameraReader, list[CameraStatus]]:
    """A reader whose connections are these sources, the last of them again and again."""
    line = itertools.chain(sources, itertools.repeat(sources[-1]))
    seen: list[CameraStatus] = []
    return CameraReader("front", lambda: next(line), spec, seen.append, clock or SYSTEM), seen


def failing(code: str) -> Fake:
    return Fake("open", SourceError(code, f"rtsp://u:{CANARY}@cam failed"))  # type: ignore[arg-type]


# Reconnecting


def test_the_waits_double_up_to_a_minute_and_never_end() -> None:
    clock = Clock()
    camera, seen = reader(failing("refused"), clock=clock)
    camera.start()
    wait(lambda: len(clock.slept) >= 20)
    assert camera.stop()
    for delay, wanted in zip(clock.slept, [1, 2, 4, 8, 16, 32, *[60] * 14], strict=False):
        assert wanted * 0.8 <= delay <= wanted * 1.2
    assert len(set(clock.slept[6:])) > 1, "no jitter"
    assert [status.state for status in seen] == ["connecting", "offline", "stopped"]
    assert camera.status().reconnects["refused"] >= 19
    assert CANARY not in str(seen) and "***" in str(seen[1].error)


@pytest.mark.parametrize("code", ["auth_failed", "not_found", "codec_unsupported"])
def test_what_haste_would_not_mend_is_tried_once_a_minute(code: str) -> None:
    clock = Clock()
    camera, _ = reader(failing(code), clock=clock)
    camera.start()
    wait(lambda: len(clock.slept) >= 10)
    camera.stop()
    assert all(60 <= delay <= 72 for delay in clock.slept)


def test_a_healthy_stretch_makes_the_next_wait_short_again() -> None:
    backoff = Backoff(ReaderSpec(), random.Random(0))
    broken = SourceError("ended", "ended")
    waits = [backoff.after(broken, online) for online in (0, 0, 29.9, 30.0, 0)]
    assert [round(np.log2(wait)) for wait in waits] == [0, 1, 2, 0, 1]


def test_ten_cameras_that_went_down_together_do_not_come_back_together() -> None:
    backoffs = [Backoff(ReaderSpec()) for _ in range(10)]
    assert len({backoff.after(SourceError("refused", ""), 0.0) for backoff in backoffs}) == 10


def test_the_end_of_a_live_stream_is_a_failure_and_the_next_one_another_segment() -> None:
    spec = ReaderSpec(retry_first=0.01, buffer=64)
    camera, seen = reader(Fake(3), Fake(2, SourceError("unreadable", "broke")), Fake(4, "idle"), spec=spec)
    camera.start()
    frames = [camera.take(PATIENCE) for _ in range(9)]
    wait(lambda: camera.status().state == "online")
    assert [frame.segment for frame in frames if frame] == [0, 0, 0, 1, 1, 2, 2, 2, 2]
    assert [frame.index for frame in frames if frame] == list(range(9))
    assert [(status.state, status.code) for status in seen] == [
        *(("connecting", None), ("online", None), ("offline", "ended"), ("online", None)),
        *(("offline", "unreadable"), ("online", None)),
    ]
    assert camera.status().reconnects == {"ended": 1, "unreadable": 1}
    assert camera.stop() and not camera.take() and camera.ended


def test_every_source_is_closed_before_the_next_one_is_opened() -> None:
    opened: list[list[int]] = []

    class Noting(Fake):
        def open(self) -> SourceInfo:
            opened.append([source.closed for source in sources])
            return super().open()

    failure = SourceError("timeout", "no answer")
    sources = [Noting(1), Noting("open", failure), Noting(RuntimeError(CANARY)), Noting("idle")]
    camera, _ = reader(*sources, spec=ReaderSpec(retry_first=0.01))
    camera.start()
    wait(lambda: len(opened) == 4)
    camera.stop()
    assert opened == [[0, 0, 0, 0], [1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0]]
    assert [source.closed for source in sources] == [1, 1, 1, 1]


def test_an_exception_that_nobody_foresaw_costs_a_connection(caplog: pytest.LogCaptureFixture) -> None:
    camera, seen = reader(
        Fake(1, RuntimeError(f"rtsp://u:{CANARY}@cam")), Fake(1, "idle"), spec=ReaderSpec(retry_first=0.01)
    )
    camera.start()
    wait(lambda: [status.state for status in seen].count("online") == 2)
    camera.stop()
    assert camera.status().reconnects == {"unreadable": 1}
    assert "RuntimeError" in caplog.text and CANARY not in caplog.text + str(seen)


def test_a_source_that_cannot_be_made_is_tried_again() -> None:
    line: Iterator[Exception | Fake] = iter([SourceError("timeout", "no"), OSError("no"), Fake(1, "idle")])

    def make() -> Fake:
        made = next(line)
        if isinstance(made, Exception):
            raise made
        return made

    camera = CameraReader("front", make, ReaderSpec(retry_first=0.01)).start()
    assert camera.take(PATIENCE) is not None
    camera.stop()
    assert camera.status().reconnects == {"timeout": 1, "unreadable": 1}


def test_on_status_may_fail_and_may_stop_its_camera(caplog: pytest.LogCaptureFixture) -> None:
    def stop(status: CameraStatus) -> None:
        if status.state == "online":
            camera.stop()
        raise RuntimeError("mine")

    camera = CameraReader("front", lambda: Fake(1, "idle"), on_status=stop)
    camera.start()
    wait(lambda: caplog.text.count("on_status of camera front failed") == 3)
    assert camera.status().state == "stopped"


# Stalls


def stall(quiet: float, source: Fake, state: str) -> CameraStatus:
    """The status of a camera whose source has been quiet for so many seconds: once it is `state`, or after the
    keeper has had the time to look at the clock."""
    clock = Clock()
    source.clock = clock
    camera, seen = reader(source, spec=QUICK, clock=clock)
    camera.start()
    wait(lambda: source.opened and len(seen) == (1 if source.script[0] == "open" else 2))
    clock.now += quiet
    if state == "offline":
        wait(lambda: camera.status().state == state)
    time.sleep(QUICK.read_timeout / 2)
    status = camera.status()
    for step in source.script:
        if isinstance(step, threading.Event):
            step.set()
    camera.stop()
    return status


QUICK = ReaderSpec(open_timeout=10, read_timeout=0.4, stall_timeout=20)


@pytest.mark.parametrize(("quiet", "state"), [(0.39, "online"), (0.41, "offline")])
def test_our_own_clock_notices_a_silent_stream(quiet: float, state: str) -> None:
    status = stall(quiet, Fake(1, threading.Event()), state)
    assert status.state == state
    assert status.code == ("timeout" if state == "offline" else None)


@pytest.mark.parametrize(("quiet", "state"), [(9.9, "connecting"), (10.1, "offline")])
def test_our_own_clock_notices_a_silent_open(quiet: float, state: str) -> None:
    assert stall(quiet, Fake("open", threading.Event()), state).state == state


def test_packets_without_a_whole_picture_are_a_stall_too() -> None:
    clock = Clock()
    source = Fake(1, "idle", clock=clock)
    camera, seen = reader(source, spec=QUICK, clock=clock)
    camera.start()
    wait(lambda: len(seen) == 2)
    for _ in range(70):
        clock.now += 0.3
        source.tally.last_packet = clock.now
    wait(lambda: camera.status().state == "offline")
    assert "whole picture" in str(seen[2].error)
    camera.stop()


def test_a_picture_a_minute_is_no_stall_when_told_so() -> None:
    clock = Clock()
    source = Fake(1, "idle", clock=clock)
    camera, seen = reader(source, spec=ReaderSpec(read_timeout=90, stall_timeout=90), clock=clock)
    camera.start()
    wait(lambda: len(seen) == 2)
    for _ in range(5):
        clock.now += 60
        source.tally.last_packet = source.tally.last_picture = clock.now
        time.sleep(0.01)
    assert camera.status().state == "online" and camera.status().reconnects == {}
    camera.stop()


def test_a_stuck_source_is_not_opened_a_second_time_until_it_lets_go() -> None:
    clock, hold = Clock(), threading.Event()
    stuck, healthy = Fake("open", hold), Fake(1, "idle", clock=clock)
    camera, seen = reader(stuck, healthy, spec=QUICK, clock=clock)
    before = threading.active_count()
    camera.start()
    wait(lambda: stuck.opened)
    clock.now += 11
    wait(lambda: len(seen) == 2 and seen[1].state == "offline")
    assert stuck.interrupted.is_set() and not healthy.opened and threading.active_count() == before + 2
    hold.set()
    wait(lambda: camera.status().state == "online")
    assert stuck.closed == 1
    camera.stop()


# Back-pressure


def test_a_live_camera_keeps_the_newest_and_counts_the_rest() -> None:
    camera, _ = reader(Fake(100, "idle"), spec=ReaderSpec(buffer=3))
    camera.start()
    wait(lambda: camera.status().frames == 100)
    taken = [camera.take() for _ in range(4)]
    assert [frame.index if frame else None for frame in taken] == [97, 98, 99, None]
    assert camera.status().dropped == {"overrun": 97}
    camera.stop()


def test_a_file_waits_and_loses_nothing(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "clip.mp4")
    camera = CameraReader("front", path, ReaderSpec(buffer=2)).start()
    wait(lambda: camera.status().frames >= 3)
    time.sleep(0.1)
    assert camera.status().frames == 3, "it did not wait"
    marks = []
    while not camera.ended:
        frame = camera.take(0.1)
        marks += [] if frame is None else [read_mark(frame.image)]
    assert marks == list(range(24)) and camera.status().dropped == {}
    wait(lambda: camera.status().state == "ended")
    assert camera.status().error is None


@pytest.mark.parametrize("buffer", [1, 3, 200])
def test_no_frame_is_lost_uncounted(buffer: int) -> None:
    """While a consumer takes at random, and over reconnects and a stop at any moment."""
    camera, _ = reader(
        Fake(150),
        Fake(150, SourceError("unreadable", "")),
        Fake(10**6),
        spec=ReaderSpec(buffer=buffer, retry_first=0.01),
    )
    camera.start()
    taken = 0
    draw = random.Random(buffer)
    late = time.monotonic() + PATIENCE
    while camera.status().frames < 5000 and time.monotonic() < late:
        taken += camera.take() is not None
        time.sleep(0.001 if draw.random() < 0.02 else 0)
    camera.stop()
    status = camera.status()
    assert status.frames == taken + sum(status.dropped.values()) and status.frames >= 5000


def test_a_file_that_cannot_be_read_ends_with_its_reason(tmp_path: Path) -> None:
    camera = CameraReader("front", tmp_path / "none.mp4").start()
    wait(lambda: camera.ended)
    wait(lambda: camera.status().state == "ended")
    assert camera.status().code == "not_found" and camera.status().reconnects == {}


def test_a_file_at_its_own_speed_is_a_camera() -> None:
    clock = Clock()
    spec = ReaderSpec(realtime=True, fps=5, buffer=100)
    camera = CameraReader("front", "test://?fps=10&seconds=3&width=64&height=48", spec, clock=clock).start()
    wait(lambda: camera.status().state == "ended")
    frames = [camera.take() for _ in range(15)]
    times = [frame.monotonic_s for frame in frames if frame]
    assert np.allclose(np.diff(times), 0.2) and clock.now == pytest.approx(1002.9)
    info = camera.status().info
    assert info is not None and info.live and info.finite


# Which live pictures are taken


def picked(fps: float, came: list[float]) -> list[float]:
    clock, tally = Clock(), Tally()
    picker = Picker(ReaderSpec(fps=fps), "x", False, tally, clock, threading.Event())
    times = []
    for moment in came:
        clock.now = 1000 + moment
        times += [round(f.monotonic_s - 1000, 3) for f in picker.offer(Picture(lambda: IMAGE, None, 0.1, (2, 2)))]
    assert tally.decoded == len(came) and tally.thinned == len(came) - len(times)
    return times


def test_live_pictures_are_thinned_by_when_they_come() -> None:
    draw = np.random.default_rng(0)
    steady = picked(1.0, (np.arange(300) / 30 + draw.uniform(0, 0.02, 300)).tolist())
    assert len(steady) in (10, 11) and np.allclose(np.diff(steady), 1, atol=0.3)
    slow = picked(1.0, (np.arange(20) + draw.uniform(-0.1, 0.1, 20)).tolist())
    assert len(slow) == 20, "a camera as slow as that loses none to jitter"
    assert picked(1.0, [0, 60, 120]) == [0, 60, 120]
    assert len(picked(1.0, [0, 7, 7.01, 7.02, 7.03, 8])) == 3, "a burst after a stall is one picture"


# Starting and stopping


@pytest.mark.parametrize("script", [("idle",), (1, "idle"), ("open", SourceError("refused", "")), (10**9,)])
def test_stop_is_legal_in_every_state(script: tuple[object, ...]) -> None:
    before = threading.active_count()
    camera, seen = reader(Fake(*script))
    assert camera.stop() and camera.status().state == "stopped"
    assert camera.take(5) is None
    for _ in range(2):
        camera.start()
        camera.start()
        wait(lambda: seen and seen[-1].state != "stopped")
        assert camera.stop() and camera.stop()
        assert camera.status().state == "stopped" and camera.ended
    wait(lambda: threading.active_count() == before)


def picture_of(uri: str, width: int) -> tuple[tuple[int, ...], int]:
    """The shape of the picture that a reader shows, read for a model of 16 x 16, and the mark in it."""
    reader = CameraReader("a", uri, ReaderSpec(size=16, fps=1)).start()
    frame = reader.take(PATIENCE)
    wait(lambda: reader.picture(width) is not None)
    image = reader.picture(width)
    assert frame is not None and frame.image.shape == (16, 16, 3) and image is not None
    assert reader.stop()
    again = reader.picture(width)
    assert again is not None and again.shape == image.shape, "the last one stays, whatever becomes of the camera"
    return image.shape, read_mark(image)


def test_a_picture_is_in_the_shape_of_the_camera(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip.mp4", frames=1)
    assert picture_of(str(clip), 1280) == ((96, 128, 3), 0)
    assert picture_of(str(clip), 64) == ((48, 64, 3), 0)
    assert picture_of(str(turned(clip, (0, 1, -1, 0))), 1280)[0] == (128, 96, 3)
    assert picture_of("test://?width=200&height=50&seconds=1", 100)[0] == (25, 100, 3)


def test_a_picture_has_square_pixels(tmp_path: Path) -> None:
    wide = tmp_path / "wide.mp4"
    with av.open(str(wide), "w") as target:
        stream = target.add_stream("mpeg4", 12, width=64, height=96, pix_fmt="yuv420p")
        stream.codec_context.sample_aspect_ratio = Fraction(2)
        for frame in (av.VideoFrame(64, 96, "yuv420p"), None):
            target.mux(stream.encode(frame))
    assert picture_of(str(wide), 1280)[0] == (96, 128, 3)


def test_stop_does_not_wait_for_the_operating_system() -> None:
    hold = threading.Event()
    camera, _ = reader(Fake("open", hold), spec=ReaderSpec(read_timeout=0.1))
    before = threading.active_count()
    camera.start()
    wait(lambda: threading.active_count() == before + 2)
    assert not camera.stop(), "it claims that a thread is gone which is not"
    assert camera.status().state == "stopped" and not hold.is_set()
    hold.set()
    wait(lambda: threading.active_count() == before)


def test_stop_wakes_who_waits_for_a_frame() -> None:
    camera, _ = reader(Fake("idle"))
    camera.start()
    got: list[object] = []
    waiting = threading.Thread(target=lambda: got.append(camera.take(PATIENCE)))
    waiting.start()
    camera.stop()
    waiting.join(PATIENCE)
    assert got == [None]


def test_a_file_that_nobody_takes_from_can_be_stopped() -> None:
    camera = CameraReader("front", "test://?width=64&height=48", ReaderSpec(buffer=1)).start()
    wait(lambda: camera.status().frames == 2)
    assert camera.stop() and camera.status().dropped == {"stopped": 2}


def test_what_nobody_understands_is_said_at_once() -> None:
    for uri in ("http://cam", "gst://videotestsrc", "test://?fps=no"):
        with pytest.raises(UsageError):
            CameraReader("front", uri)
    with pytest.raises(UsageError, match="--stall-timeout"):
        ReaderSpec(read_timeout=30)


def test_the_reader_keeps_quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    camera, _ = reader(failing("refused"), Fake(3, "idle"), spec=ReaderSpec(retry_first=0.01))
    camera.start()
    wait(lambda: camera.status().frames == 3)
    camera.stop()
    assert caplog.text == ""
