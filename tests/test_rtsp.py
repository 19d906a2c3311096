"""Real RTSP: a server that dies, hangs, refuses, loses data and changes its mind, and a reader that lives with it."""

from __future__ import annotations

import logging
import os
import re
import shutil
import subprocess
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from dycoke_edge.config_camera import ReaderSpec
from dycoke_edge.runtime.camera.frame import Frame
from dycoke_edge.runtime.camera.probe import probe
from dycoke_edge.runtime.camera.reader import CameraReader
from dycoke_edge.runtime.camera.source import SourceError, open_source
from dycoke_edge.runtime.camera.status import CameraStatus
from tests.clips import mark, read_mark, write_clip
from tests.servers import rtsp
from tests.servers.proxy import Proxy, cut_off, lose_bytes, lose_packets
from tests.servers.rtsp import RtspServer

VTEST = Path(__file__).resolve().parents[1] / ".venv" / "vtest.avi"
PATIENCE = 40.0  # seconds that a test waits for what must come; never reached when it comes
CANARY = "c4n4ry"
RATE = 25
QUICK = ReaderSpec(open_timeout=2, read_timeout=1, stall_timeout=5, retry_first=0.1, retry_most=0.5, buffer=500)
KEYS = {"bf": "0", "g": "10", "x264-params": "scenecut=0:keyint=10:min-keyint=10"}


@pytest.fixture(scope="module", autouse=True)
def _needs_the_server() -> None:
    rtsp.need()


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """H.264, long enough for every test: frame k shows k % 256."""
    return write_clip(tmp_path_factory.mktemp("rtsp") / "clip.mp4", frames=60 * RATE, rate=RATE, options=KEYS)


@pytest.fixture(scope="module")
def street(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten seconds of Debian's surveillance clip in H.264."""
    if not VTEST.exists():
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)("no vtest.avi: make services")
    return rtsp.transcode(VTEST, tmp_path_factory.mktemp("street") / "street.mp4", frames=100, size=(384, 288))


@pytest.fixture
def server(clip: Path) -> Iterator[RtspServer]:
    with RtspServer("--file", str(clip)) as running:
        yield running


def wait(happened: Callable[[], object]) -> None:
    late = time.monotonic() + PATIENCE
    while not happened():
        assert time.monotonic() < late, "it never happened"
        time.sleep(0.01)


class Watched:
    """A reader that is stopped in the end, and every state that it went through."""

    def __init__(self, uri: str, spec: ReaderSpec = QUICK) -> None:
        self.seen: list[CameraStatus] = []
        self.reader = CameraReader("front", uri, spec, self.seen.append)

    def __enter__(self) -> Watched:
        self.reader.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self.reader.stop()

    @property
    def states(self) -> list[str]:
        return [status.state for status in self.seen]

    def reach(self, state: str, times: int) -> CameraStatus:
        """Waits until it got into the state so often; the status of then."""
        wait(lambda: self.states.count(state) >= times)
        return [status for status in self.seen if status.state == state][times - 1]

    def frames(self, count: int) -> list[Frame]:
        taken: list[Frame] = []
        late = time.monotonic() + PATIENCE
        while len(taken) < count:
            assert time.monotonic() < late, f"only {len(taken)} frames came"
            frame = self.reader.take(0.1)
            taken += [] if frame is None else [frame]
        return taken

    def until(self, found: Callable[[Frame], bool]) -> list[Frame]:
        """All frames up to the first like that."""
        taken = self.frames(1)
        while not found(taken[-1]):
            taken += self.frames(1)
        return taken


def proxied(proxy: Proxy) -> str:
    return f"rtsp://127.0.0.1:{proxy.port}/stream"


def resources() -> tuple[int, int]:
    return threading.active_count(), len(os.listdir("/proc/self/fd"))


# A stream


def test_frames_of_a_camera(server: RtspServer) -> None:
    with Watched(server.url, ReaderSpec(size=48, buffer=500)) as camera:
        frames = camera.frames(30)
        info = camera.reader.status().info
    assert info is not None and info.live and not info.finite and (info.codec, info.width) == ("h264", 128)
    marks = [read_mark(frame.image) for frame in frames]
    assert marks == list(range(marks[0], marks[0] + 30)), "a frame was lost or shown twice"
    stamps = [frame.pts_s for frame in frames if frame.pts_s is not None]
    assert len(stamps) >= 29 and np.allclose(np.diff(stamps), 1 / RATE, atol=1e-3)
    assert all(
        frame.image.shape == (48, 48, 3) and frame.segment == 0 and frame.source_id == "front" for frame in frames
    )
    assert camera.states == ["connecting", "online", "stopped"]


def test_a_camera_is_thinned(server: RtspServer) -> None:
    with Watched(server.url, ReaderSpec(size=48, fps=5, buffer=500)) as camera:
        frames = camera.frames(8)
        status = camera.reader.status()
    apart = np.diff([frame.monotonic_s for frame in frames])
    assert apart[1:].mean() == pytest.approx(0.2, abs=0.05), "of the first ones some waited in the server"
    assert status.thinned > 2 * len(frames) and not status.dropped


def test_probe_of_a_camera(server: RtspServer) -> None:
    report = probe(server.url)
    assert report.live and (report.codec, report.width, report.height, report.pts_breaks) == ("h264", 128, 96, 0)
    assert report.fps_measured == pytest.approx(RATE, rel=0.02)


# 1. It dies


def test_reconnects_after_a_power_cut_and_leaves_nothing_behind(server: RtspServer) -> None:
    with Watched(server.url) as camera:
        camera.reach("online", 1)
        before: tuple[int, int] | None = None
        for cycle in range(1, 5):
            server.kill()
            assert camera.reach("offline", cycle).code in ("ended", "refused", "unreadable")
            server.start()
            camera.reach("online", cycle + 1)
            camera.frames(1)
            if before is None:
                before = resources()
        after = resources()
        segments = [frame.segment for frame in camera.until(lambda frame: frame.segment == 4)]
        status = camera.reader.status()
    assert before is not None and after[0] <= before[0] and after[1] <= before[1], "threads or descriptors grow"
    assert segments == sorted(segments) and sum(status.reconnects.values()) >= 4
    assert camera.states[:4] == ["connecting", "online", "offline", "online"]


@pytest.mark.parametrize("way", ["reset", "refuse"])
def test_reconnects_after_a_broken_connection(server: RtspServer, way: str) -> None:
    with Proxy(server.port) as proxy, Watched(proxied(proxy)) as camera:
        camera.reach("online", 1)
        getattr(proxy, way)()
        camera.reach("offline", 1)
        if way == "refuse":
            wait(lambda: camera.reader.status().reconnects.get("refused"))
            proxy.accept()
        camera.reach("online", 2)


# 2. It hangs


def test_a_frozen_server_is_offline_until_it_thaws(server: RtspServer) -> None:
    with Watched(server.url) as camera:
        camera.reach("online", 1)
        server.freeze()
        try:
            assert camera.reach("offline", 1).code == "timeout"
        finally:
            server.thaw()
        camera.reach("online", 2)


def test_a_short_stall_is_no_failure(server: RtspServer) -> None:
    with Watched(server.url, ReaderSpec(read_timeout=8, stall_timeout=20, buffer=500)) as camera:
        camera.reach("online", 1)
        server.freeze()
        time.sleep(1.5)
        server.thaw()
        seen = camera.reader.status().frames
        wait(lambda: camera.reader.status().frames > seen + RATE)
        assert camera.states == ["connecting", "online"]


def test_silence_while_reading(server: RtspServer) -> None:
    with Proxy(server.port) as proxy, Watched(proxied(proxy)) as camera:
        camera.reach("online", 1)
        proxy.silent = True
        assert camera.reach("offline", 1).code == "timeout"
        proxy.silent = False
        camera.reach("online", 2)


def test_silence_at_open_and_stop_within_a_read_timeout(server: RtspServer) -> None:
    before = threading.active_count()
    with Proxy(server.port) as proxy:
        proxy.silent = True
        camera = Watched(proxied(proxy), ReaderSpec(open_timeout=3, read_timeout=0.5, stall_timeout=1))
        camera.reader.start()
        wait(lambda: proxy.accepted)
        assert not camera.reader.stop(), (
            "FFmpeg cannot be interrupted while it opens; the thread is left to its timeout"
        )
        assert camera.reader.status().state == "stopped" and camera.reader.take(1) is None
        wait(lambda: threading.active_count() == before + 1)  # the proxy's own


def test_silence_in_the_middle_of_opening(server: RtspServer) -> None:
    with Proxy(server.port) as proxy:
        proxy.filter = lambda: cut_off(300)
        with Watched(proxied(proxy), QUICK) as camera:
            assert camera.reach("offline", 1).code == "timeout"
            proxy.filter = None
            camera.reach("online", 1)


# 3. It refuses


@pytest.fixture(scope="module")
def locked(clip: Path) -> Iterator[RtspServer]:
    with RtspServer("--file", str(clip), user="ad.min", password=f"{CANARY}@/:%?#") as running:
        yield running


def login(server: RtspServer, password: str) -> str:
    return f"rtsp://ad.min:{password}@127.0.0.1:{server.port}/stream?token={CANARY}&user=x&password={CANARY}"


def test_a_password_of_special_characters(locked: RtspServer) -> None:
    uri = login(locked, f"{CANARY}%40%2F%3A%25%3F%23")
    with Watched(uri) as camera:
        camera.frames(3)
        assert CANARY not in str(camera.seen) + str(camera.reader.status())


@pytest.mark.parametrize("password", [CANARY, f"{CANARY}@x", f"{CANARY}%40", f"%40{CANARY}:.@"])
def test_a_wrong_password_is_not_tried_again_soon_and_not_told(
    locked: RtspServer, password: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    with Proxy(locked.port) as proxy:
        uri = login(locked, password).replace(str(locked.port), str(proxy.port))
        with Watched(uri, ReaderSpec(retry_first=0.01, retry_most=30)) as camera:
            assert camera.reach("offline", 1).code == "auth_failed"
            time.sleep(0.5)
            assert proxy.accepted == 1, "it tried again"
        with pytest.raises(SourceError) as caught:
            open_source(uri).open()
    told = "".join(traceback.format_exception(caught.value)) + repr(caught.value.__context__)
    told += str(camera.seen) + caplog.text + str(threading.enumerate())
    assert "***" in told and CANARY not in told


def test_a_path_that_is_not_there(server: RtspServer) -> None:
    with Watched(server.url.replace("stream", "nothing")) as camera:
        status = camera.reach("offline", 1)
    assert status.code == "not_found" and "/nothing" in str(status.error)


@pytest.mark.parametrize(
    ("uri", "code"),
    [("rtsp://u:c4n4ry@127.0.0.1:1/x", "refused"), ("rtsp://u:c4n4ry@no.such.host.invalid/x", "refused")],
)
def test_a_host_that_is_not_there(uri: str, code: str) -> None:
    with pytest.raises(SourceError) as caught:
        open_source(uri).open()
    assert caught.value.code == code and CANARY not in str(caught.value)


def test_tls_with_a_server_that_has_none(server: RtspServer) -> None:
    with pytest.raises(SourceError) as caught:
        open_source(server.url.replace("rtsp:", "rtsps:")).open()
    assert caught.value.code == "tls"


def test_tls_with_a_certificate_of_its_own(tmp_path: Path) -> None:
    if shutil.which("openssl") is None or not list(Path("/usr/lib").rglob("gio/modules/libgiognutls.so")):
        pytest.skip("no openssl or no glib-networking: make services")
    made = ("-keyout", tmp_path / "key.pem", "-out", tmp_path / "cert.pem", "-subj", "/CN=camera", "-days", "2")
    subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", *made], check=True, capture_output=True)
    picture = "videotestsrc is-live=true ! video/x-raw,width=320,height=240,framerate=10/1 ! openh264enc"
    with RtspServer("--launch", picture, "--tls", str(tmp_path)) as camera:
        source = open_source(camera.url.replace("rtsp:", "rtsps:"))
        source.open()
        assert next(iter(source)).image.shape == (240, 320, 3)
        source.close()


# 6. It loses data, and changes


def whole(frame: Frame) -> bool:
    """Whether a frame is the picture that its own mark says, all over."""
    wanted = mark(read_mark(frame.image)).astype(int)
    rows = np.abs(frame.image.astype(int) - wanted)[:, 8::16].max(axis=(1, 2))
    return bool(rows.max() < 60)


def test_no_broken_picture_is_shown_after_loss(server: RtspServer) -> None:
    """Here a packet is a picture, and those that depend on it never leave the decoder."""
    with Proxy(server.port) as proxy:
        proxy.filter = lambda: lose_packets(0.1)
        with Watched(proxied(proxy), ReaderSpec(buffer=500, stall_timeout=30)) as camera:
            frames = camera.frames(60)
    assert not [read_mark(frame.image) for frame in frames if not whole(frame)]
    marks = [read_mark(frame.image) for frame in frames]
    assert any((after - before) % 256 != 1 for before, after in pairwise(marks)), "nothing was lost"


def test_no_picture_with_a_hole_is_shown_after_loss(street: Path) -> None:
    """Here a picture is many packets; each one shown must be one of the recording."""
    with av.open(str(street)) as video:
        sent = np.array([frame.to_ndarray(format="rgb24")[::8, ::8] for frame in video.decode(video=0)], np.int16)
    with RtspServer("--file", str(street)) as server, Proxy(server.port) as proxy:
        proxy.filter = lambda: lose_packets(0.04)
        with Watched(proxied(proxy), ReaderSpec(buffer=500, stall_timeout=30)) as camera:
            wait(
                lambda: camera.reader.status().dropped.get("corrupt", 0) > 1 and len(camera.reader.status().dropped) > 1
            )
            frames = camera.frames(camera.reader.status().frames)
    apart = [np.abs(sent - frame.image[::8, ::8]).mean(axis=(1, 2, 3)).min() for frame in frames]
    assert len(frames) >= 2 and max(apart) < 0.5


def test_lost_bytes_end_in_a_reconnect(server: RtspServer) -> None:
    with Proxy(server.port) as proxy:
        proxy.filter = lambda: lose_bytes(4000, 100)
        with Watched(proxied(proxy)) as camera:
            camera.reach("offline", 1)
            proxy.filter = None
            camera.frames(1)
            wait(lambda: camera.reader.status().state == "online")


def test_another_resolution_in_mid_stream(clip: Path, tmp_path: Path) -> None:
    path = tmp_path / "both.mp4"
    two_sizes(path)
    with RtspServer("--file", str(path)) as server, Watched(server.url) as camera:
        frames = camera.until(lambda frame: frame.image.shape != (96, 128, 3))
    shapes = {frame.segment: frame.image.shape for frame in frames}
    assert shapes == {0: (96, 128, 3), 1: (144, 256, 3)}


def two_sizes(path: Path) -> None:
    """An .mp4 of two seconds in one resolution and ten in another; the parameter sets go with the key frames."""
    raw = [
        write_clip(path.with_name(f"{w}.h264"), frames=n * RATE, rate=RATE, size=(w, h), options=KEYS)
        for w, h, n in ((128, 96, 2), (256, 144, 10))
    ]
    with av.open(str(path), "w") as out:
        stream: Any = None
        place = 0
        for part in raw:
            with av.open(str(part)) as source:
                stream = out.add_stream_from_template(source.streams.video[0]) if stream is None else stream
                for packet in source.demux(video=0):
                    if packet.size:
                        packet.stream = stream
                        packet.pts = packet.dts = round(place / RATE / packet.time_base)
                        place += 1
                        out.mux(packet)


def test_another_codec_after_a_restart(server: RtspServer, tmp_path: Path) -> None:
    quiet = {"x265-params": "log-level=none:keyint=10:bframes=0"}
    other = write_clip(tmp_path / "h265.mp4", "libx265", frames=20 * RATE, rate=RATE, size=(256, 144), options=quiet)
    with Watched(server.url) as camera:
        first = camera.reach("online", 1)
        server.kill()
        server.start("--file", str(other), "--codec", "h265")
        second = camera.reach("online", 2)
        wait(lambda: camera.frames(1)[0].image.shape == (144, 256, 3))
    assert first.info is not None and second.info is not None
    assert (first.info.codec, second.info.codec) == ("h264", "hevc")


# The real thing


def test_a_surveillance_camera(street: Path) -> None:
    with (
        RtspServer("--file", str(street)) as server,
        Watched(server.url, ReaderSpec(size=64, fps=2, buffer=99)) as camera,
    ):
        frames = camera.frames(6)
    changed = [np.abs(a.image.astype(int) - b.image.astype(int)).mean() for a, b in pairwise(frames)]
    assert 0 < max(changed) < 10, "a fixed camera on a quiet path"
    assert not re.search("corrupt|no_key", str(camera.reader.status().dropped))
