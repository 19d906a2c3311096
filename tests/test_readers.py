"""Decoding in processes of their own: the same answers, and an end for every file that would take too much."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import socket
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from dycoke_edge import InputError, UsageError, VideoLLM
from dycoke_edge.config_serve import ServeSpec
from dycoke_edge.runtime.serve import readers
from dycoke_edge.runtime.serve.media import Media, Wanted
from dycoke_edge.runtime.serve.readers import Reader
from tests import clips
from tests.hostile import large_png, scans_jpeg, slow_video, wide_gif
from tests.serving import CHAT, Served, data_url, error, image, serving, text, video, wait_for

SIZE = 48
SPEC = ServeSpec(max_frames=8, max_pixels=9_000_000)
SLOW = slow_video()
JPEGS = slow_video(20, 2)  # which are quick


def children() -> dict[int, float]:
    """Reading processes of this one, and the seconds that each has computed."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command, stat = (folder / "cmdline").read_text(), (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it has ended
        ended = stat[0] == "Z" and len(list((folder / "task").iterdir())) <= 1  # a leader waits for its threads
        if "serve.child" in command and int(stat[1]) == os.getpid() and not ended:
            found[int(folder.name)] = (int(stat[11]) + int(stat[12])) / os.sysconf("SC_CLK_TCK")
    return found


def memory() -> int:
    """Bytes that this process holds."""
    found = re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) << 10


def private(process: int) -> int:
    """Bytes of memory that a process has of its own, as the ceiling counts them."""
    found = re.search(r"VmData:\s+(\d+) kB", Path(f"/proc/{process}/status").read_text())
    assert found
    return int(found[1]) << 10


def ready(server: Served) -> tuple[int, float]:
    """The reading process once it has read, and the seconds that it computed so far."""
    assert server.ask(image(data_url(large_png(20, 20), "image/png")), text()).status_code == 200
    ((found, spent),) = children().items()
    return found, spent


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary files go."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    return tmp_path / "temporary"


@pytest.fixture
def reader() -> Iterator[Reader]:
    reader = Reader(SPEC, SIZE)
    yield reader
    reader.close()
    assert not children()


@pytest.fixture(scope="module")
def llm(tiny_bundle: Path) -> VideoLLM:
    return VideoLLM.load(tiny_bundle, kv_capacity=2048, prefill_chunk=64)


@pytest.fixture
def served(llm: VideoLLM) -> Iterator[Served]:
    with serving(llm, video_timeout_s=600.0) as server:
        yield server
    assert not children()


@pytest.fixture
def tight(llm: VideoLLM) -> Iterator[Served]:
    with serving(llm, read_memory_mb=64) as server:
        yield server


# The good path


def test_frames_are_those_of_this_process(reader: Reader, tmp_path: Path) -> None:
    here = Media(SPEC, SIZE)
    reader.start()
    clip = data_url(clips.write_clip(tmp_path / "clip.mp4"))
    for wanted in (Wanted(), Wanted(num_frames=3), Wanted(fps=2.0)):
        frames = reader.read("video", (clip, wanted), 60.0)
        assert frames.flags.writeable and np.array_equal(frames, here.video(clip, wanted))
    picture = data_url(large_png(), "image/png")
    assert np.array_equal(reader.read("image", (picture,), 60.0), here.image(picture))
    several = [picture, data_url(large_png(30, 20), "image/png")]
    assert np.array_equal(reader.read("images", (several,), 60.0), here.images(several))
    assert reader.reads == 5 and len(children()) == 1


@pytest.mark.parametrize(
    "url",
    [
        "data:image/png;base64,AAAA",
        "data:image/png,x",
        "data:image/png;base64,?",
        "ftp://x/",
        "file:///etc/passwd",
        "x",
    ],
)
def test_errors_are_those_of_this_process(reader: Reader, url: str) -> None:
    here = Media(SPEC, SIZE)
    reader.start()
    for name, arguments in (("image", (url,)), ("video", (url, Wanted()))):
        with pytest.raises((UsageError, InputError)) as wanted:
            getattr(here, name)(*arguments)
        with pytest.raises(UsageError if isinstance(wanted.value, UsageError) else InputError) as found:
            reader.read(name, arguments, 60.0)
        assert str(found.value) == str(wanted.value)


def test_one_process_serves_many_requests_and_then_another(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    wait_for(children)
    (before,) = children()
    for _ in range(3):
        assert served.ask(image(data_url(large_png(200, 200), "image/png")), text()).status_code == 200
        assert list(children()) == [before]
    monkeypatch.setattr(readers, "MOST_READS", 4)
    assert served.ask(image(data_url(large_png(200, 200), "image/png")), text()).status_code == 200
    wait_for(lambda: len(children()) == 1 and before not in children())


def test_it_knows_no_key(tmp_path: Path) -> None:
    reader = Reader(ServeSpec(api_key="c4n4ry-c4n4ry-c4n4ry"), SIZE)
    assert "c4n4ry" not in str(vars(reader))


# Files that take too much


@pytest.mark.parametrize(
    ("part", "key"), [(video(SLOW), "video_url"), (image(data_url(scans_jpeg(), "image/jpeg")), "image_url")]
)
def test_what_takes_too_long(llm: VideoLLM, part: dict[str, Any], key: str) -> None:
    with serving(llm, image_timeout_s=1.0, video_timeout_s=1.0) as server:
        begun, _ = ready(server)
        told = error(server.ask(part, text()), 400)["message"]
        assert told.startswith(f"{key}: ")
        if key == "video_url":  # of a picture its many scans may show before
            assert "more than 1 s" in told and begun not in children()
        assert server.ask(image(data_url(large_png(200, 200), "image/png")), text()).status_code == 200


def test_a_client_that_leaves_ends_the_process(served: Served, folder: Path) -> None:
    begun, at_rest = ready(served)
    message = {"role": "user", "content": [video(SLOW), text()]}
    body = json.dumps({"model": served.model, "messages": [message]}).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    with socket.create_connection(("127.0.0.1", served.port), 10) as connection:
        connection.sendall(f"{head}\r\n\r\n".encode() + body)
        wait_for(lambda: children()[begun] > at_rest + 0.5)  # it is at it
    wait_for(lambda: begun not in children())
    assert served.ask(image(data_url(large_png(200, 200), "image/png")), text()).status_code == 200
    wait_for(lambda: len(list(folder.iterdir())) == 1)  # the folder of the one that is there now
    assert not list(folder.glob("*/*"))


def test_a_server_that_is_told_to_stop_ends_the_process(llm: VideoLLM) -> None:
    with serving(llm, video_timeout_s=600.0) as server:
        begun, at_rest = ready(server)
        said = list[Any]()
        message = {"role": "user", "content": [video(SLOW), text()]}
        body = {"model": server.model, "messages": [message]}
        asking = threading.Thread(  # with a client that stays when that of `serving` goes
            target=lambda: said.append(httpx.post(server.url + CHAT, json=body, timeout=60, trust_env=False))
        )
        asking.start()
        wait_for(lambda: children()[begun] > at_rest + 0.5)
    asking.join(20)  # `serving` has seen the server end within 20 s
    assert said[0].status_code == 503 and not children()


@pytest.mark.parametrize("name", ["png", "gif"])
def test_a_picture_that_takes_too_much_memory(tight: Served, name: str) -> None:
    url = data_url(large_png() if name == "png" else wide_gif(), f"image/{name}")
    before = memory()
    assert error(tight.ask(image(url), text()), 400)["message"].startswith("image_url: ")
    assert tight.ask(image(data_url(large_png(200, 200), "image/png")), text()).status_code == 200
    assert memory() - before < 50_000_000


def test_what_one_file_took_is_free_for_the_next(reader: Reader, tmp_path: Path) -> None:
    clip = clips.write_clip(tmp_path / "clip.mp4", size=(2960, 2960), frames=4)
    reader.start()
    (begun,) = children()
    before = private(begun)
    for part in (data_url(clip), JPEGS, data_url(clip)):
        reader.read("video", (part, Wanted()), 60.0)
        wait_for(lambda: private(begun) < before + (48 << 20))  # a picture of it takes 13 MB, in RGB 26


def test_memory_is_named_as_the_reason(tight: Served) -> None:
    told = error(tight.ask(image(data_url(large_png(), "image/png")), text()), 400)["message"]
    assert "takes more than 64 MB of memory" in told and "smaller" in told


@pytest.mark.parametrize("ending", [signal.SIGSEGV, signal.SIGKILL, signal.SIGXCPU])
def test_a_decoder_that_breaks_off_costs_one_request(served: Served, ending: signal.Signals) -> None:
    begun, at_rest = ready(served)
    said = list[Any]()
    asking = threading.Thread(target=lambda: said.append(served.ask(video(SLOW), text())))
    asking.start()
    wait_for(lambda: children()[begun] > at_rest + 0.3)
    os.kill(begun, ending)
    asking.join(30)
    assert "its decoder broke off" in error(said[0], 400)["message"]
    assert served.ask(image(data_url(large_png(200, 200), "image/png")), text()).status_code == 200


def test_a_process_that_ended_idle_costs_nothing(served: Served) -> None:
    begun, _ = ready(served)
    os.kill(begun, signal.SIGKILL)
    wait_for(lambda: begun not in children())
    assert ready(served)[0] != begun


def test_a_process_that_cannot_start_is_told(llm: VideoLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "START", "raise SystemExit(1)")
    with serving(llm) as server:
        found = error(server.ask(image(data_url(large_png(20, 20), "image/png")), text()), 500)
        assert "did not start" in found["message"]


def test_a_process_ends_with_its_server() -> None:
    reader = Reader(SPEC, SIZE)
    reader.start()
    (begun,) = wait_for(children)
    assert reader._connection is not None
    reader._connection.close()  # as when the server was killed
    wait_for(lambda: begun not in children())
    reader._connection = None
    reader.close()


# A full disk


FULL = "import sys; fd, *sys.path = sys.argv[1:]; from tests.full import main; main(int(fd), {!r}, {!r})"


@pytest.mark.parametrize(
    ("name", "instead", "reason"),
    [
        ("NamedTemporaryFile", "Full", "No space left on device"),
        ("NamedTemporaryFile", "no_folder", "No usable"),
        ("read_image", "no_quota", "Disk quota exceeded"),
    ],
)
def test_a_full_disk_is_no_fault_of_the_request(
    llm: VideoLLM, monkeypatch: pytest.MonkeyPatch, name: str, instead: str, reason: str
) -> None:
    url = data_url(large_png(20, 20), "image/png")
    monkeypatch.setattr(readers, "START", FULL.format(name, instead))
    with serving(llm) as server:
        for parts in ((image(url),), (image(url), image(url)), (video(JPEGS),)):
            found = error(server.ask(*parts, text()), 507)
            assert reason in found["message"] and "TMPDIR" in found["message"] and found["type"] == "server_error"
        monkeypatch.undo()
        wait_for(lambda: server.ask(image(url), text()).status_code == 200)  # the one that is warm has to fail first


def test_a_folder_that_somebody_cleared_away(served: Served, folder: Path) -> None:
    ready(served)
    for each in folder.iterdir():
        each.rmdir()
    url = data_url(large_png(20, 20), "image/png")
    assert "No such file" in error(served.ask(image(url), text()), 507)["message"]
    assert served.ask(image(url), text()).status_code == 200


def test_no_room_for_the_folder_of_a_process(llm: VideoLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(prefix: str) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    url = data_url(large_png(20, 20), "image/png")
    with monkeypatch.context() as patch:
        patch.setattr(readers, "TemporaryDirectory", full)
        with serving(llm) as server:
            assert "No space left" in error(server.ask(image(url), text()), 507)["message"]
            patch.undo()
            assert server.ask(image(url), text()).status_code == 200
