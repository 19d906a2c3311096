"""A bundle that is replaced, removed or overwritten while it is in use: answers are of the old one whole, or none."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from time import sleep
from typing import Any

import numpy as np
import pytest

from dycoke_edge import Camera, CameraWatcher, LiveVideo, ReplacedError, Rule, Sampling, VideoLLM
from dycoke_edge import bundle as bundles
from dycoke_edge.bundle import EMBED, MANIFEST
from dycoke_edge.runtime.reply import Piece
from tests.serving import error, serving, stream, text, wait_for

SAID = "replaced or removed while the bundle was in use"
READY = "/v1/health/ready"
TWO = Sampling(max_new_tokens=2)
FRAME = np.full((64, 64, 3), 90, np.uint8)
Change = Callable[[Path, Path], None]
YARD = Camera(
    "yard",
    "test://?fps=10&motion=3",
    fps=5.0,
    window_s=1.0,
    every_s=0.2,
    realtime=True,
    rules=(Rule("own", "Is it day?", threshold=0.0, clear_threshold=0.0, min_mass=0, consecutive=1, update_s=0.0),),
)


def renamed_away(bundle: Path, other: Path) -> None:
    bundle.rename(bundle.with_name("old"))
    shutil.copytree(other, bundle)


def renamed_over(bundle: Path, other: Path) -> None:
    """One file after the other, the manifest last."""
    for name in (EMBED, MANIFEST):
        shutil.copy(other / name, bundle / "new")
        (bundle / "new").rename(bundle / name)


def file_over(bundle: Path, other: Path) -> None:
    """One file alone, by one of the same bytes."""
    shutil.copy(bundle / EMBED, bundle / "new")
    (bundle / "new").rename(bundle / EMBED)


def overwritten(bundle: Path, other: Path) -> None:
    """In place: the same inode, and never shorter, or the process would end at mapped pages."""
    with (bundle / EMBED).open("r+b") as file:
        content = bytearray(file.read())
        content[-1] ^= 1
        file.seek(0)
        file.write(content)


def removed(bundle: Path, other: Path) -> None:
    shutil.rmtree(bundle)


def one_removed(bundle: Path, other: Path) -> None:
    (bundle / EMBED).unlink()


EVERY = [renamed_away, renamed_over, file_over, overwritten, removed, one_removed]
WHOLE = [renamed_away, renamed_over, removed]  # also seen by the manifest
ways = pytest.mark.parametrize("change", EVERY)


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_bundle, tmp_path / "bundle")


@pytest.mark.parametrize("resident", [False, True])
@ways
def test_generate(bundle: Path, half_bundle: Path, resident: bool, change: Change) -> None:
    llm = VideoLLM.load(bundle, kv_capacity=1024, resident=resident)
    assert llm.generate("What?", sampling=TWO).token_ids
    change(bundle, half_bundle)
    with pytest.raises(ReplacedError, match=SAID):
        llm.generate("What?", sampling=TWO)
    with pytest.raises(ReplacedError, match=SAID):
        llm.encode([FRAME])
    with pytest.raises(ReplacedError, match=SAID):
        llm.live()


def pushed(live: LiveVideo) -> object:
    return live.push(FRAME)


def pushed_tokens(live: LiveVideo) -> object:
    model = live.bundle.model
    return live.push_tokens(np.zeros((model.tokens_per_frame, model.hidden_size), model.numpy_dtype))


def asked(live: LiveVideo) -> object:
    return list(live.ask("What?", TWO))


def scored(live: LiveVideo) -> object:
    return live.score("Is it day?")


@pytest.mark.parametrize("resident", [False, True])
@ways
def test_live(bundle: Path, half_bundle: Path, resident: bool, change: Change) -> None:
    """All graphs are open by then. What was noticed once stays so, at frames too."""
    live = VideoLLM.load(bundle, kv_capacity=1024, resident=resident).live(memory_frames=2)
    for call in (pushed, asked, scored):
        call(live)
    change(bundle, half_bundle)
    first = [pushed, pushed_tokens] if change in WHOLE else []
    for call in (*first, asked, scored, pushed, pushed_tokens):
        with pytest.raises(ReplacedError, match=SAID):
            call(live)
    live.clear()  # is not refused: memory can always be given back


@pytest.mark.parametrize("call", [asked, scored])
def test_the_first_question_notices_a_single_file(bundle: Path, call: Callable[[LiveVideo], object]) -> None:
    live = VideoLLM.load(bundle, kv_capacity=1024).live(memory_frames=2)
    live.push(FRAME)
    overwritten(bundle, bundle)
    with pytest.raises(ReplacedError, match=SAID):
        call(live)


@pytest.mark.parametrize("is_live", [False, True])
@ways
def test_the_last_piece_of_a_mixed_answer_does_not_come(
    bundle: Path, half_bundle: Path, is_live: bool, change: Change
) -> None:
    llm = VideoLLM.load(bundle, kv_capacity=1024, resident=True)
    live = llm.live(memory_frames=2)
    live.push(FRAME)
    pieces = live.ask("What?", TWO) if is_live else llm.stream("What?", sampling=TWO)
    assert next(pieces).finish_reason is None
    change(bundle, half_bundle)
    with pytest.raises(ReplacedError, match=SAID):
        next(pieces)


def test_a_score_of_two_bundles_is_none(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    live = VideoLLM.load(bundle, kv_capacity=1024).live(memory_frames=2)
    live.push(FRAME)
    read = live._decoder.read

    def changed(suffix: object) -> None:
        overwritten(bundle, bundle)
        read(suffix)  # type: ignore[arg-type]

    monkeypatch.setattr(live._decoder, "read", changed)
    with pytest.raises(ReplacedError, match=SAID):
        live.score("Is it day?")


def test_a_bundle_that_is_replaced_while_it_is_loaded(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = bundles.open_bundle

    def then_replaced(path: Path) -> bundles.Bundle:
        found = opened(path)
        file_over(bundle, bundle)
        return found

    monkeypatch.setattr("dycoke_edge.runtime.pipeline.open_bundle", then_replaced)
    with pytest.raises(ReplacedError, match=SAID):
        VideoLLM.load(bundle, kv_capacity=1024)


def test_what_was_noticed_stays_so(bundle: Path) -> None:
    """Also when the folder is put back: cameras have stopped by then."""
    llm = VideoLLM.load(bundle, kv_capacity=1024)
    bundle.rename(bundle.with_name("away"))
    with pytest.raises(ReplacedError):
        llm.generate("What?", sampling=TWO)
    bundle.with_name("away").rename(bundle)
    with pytest.raises(ReplacedError):
        llm.generate("What?", sampling=TWO)
    assert VideoLLM.load(bundle, kv_capacity=1024).generate("What?", sampling=TWO).token_ids


def test_a_frame_costs_one_look_at_the_disk(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    live = VideoLLM.load(bundle, kv_capacity=1024).live(memory_frames=2)
    looks, stat = list[object](), os.stat

    def counted(file: Any, **options: Any) -> os.stat_result:
        looks.append(file)
        return stat(file, **options)

    monkeypatch.setattr(os, "stat", counted)
    live.push(FRAME)
    assert looks.count(str(bundle / MANIFEST)) == 1
    assert str(bundle / EMBED) not in looks


def test_a_graph_that_is_gone_when_it_is_opened(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the check and the opening: what is said is why."""
    llm = VideoLLM.load(bundle, kv_capacity=1024)
    monkeypatch.setattr(llm.engine, "_open", lambda graph, path: path.unlink() or path.read_bytes())
    with pytest.raises(ReplacedError, match=SAID):
        llm.generate("What?", sampling=TWO)


def test_touched_attributes_are_no_change(bundle: Path) -> None:
    """A backup by hard links, another mode, a reader."""
    llm = VideoLLM.load(bundle, kv_capacity=1024)
    os.link(bundle / EMBED, bundle.with_name("backup"))
    (bundle / EMBED).chmod(0o600)
    (bundle / EMBED).read_bytes()
    assert llm.generate("What?", sampling=TWO).token_ids


@ways
def test_serve(bundle: Path, half_bundle: Path, change: Change, caplog: pytest.LogCaptureFixture) -> None:
    with serving(VideoLLM.load(bundle, kv_capacity=2048, prefill_chunk=64), [YARD]) as served:
        camera = served.watcher.status
        wait_for(lambda: camera()["cameras"]["yard"]["alerts"].get("own", {}).get("on"))
        assert served.http.get(READY).status_code == 200
        assert served.ask().status_code == served.ask(text(), stream("yard")).status_code == 200
        change(bundle, half_bundle)
        wait_for(lambda: camera()["cameras"]["yard"]["failures"])
        sleep(1.0)  # of five more windows
        windows = camera()["cameras"]["yard"]["windows"]
        for _ in range(2):
            response = served.http.get(READY)
            assert response.status_code == 503 and response.json()["reasons"] == ["the bundle was replaced; restart"]
            for parts in ([text()], [text(), stream("yard")]):
                said = error(served.ask(*parts), 503)
                assert (said["message"], said["code"]) == ("the bundle was replaced; restart", "replaced")
        told = camera()
        assert told["failures"] == told["cameras"]["yard"]["failures"] == 1
        assert told["cameras"]["yard"]["windows"] == windows
        events = [event for event in served.watcher.events.since() if event.camera == "yard"]
        assert [event.type for event in events].count("error") == 1
        assert [event.reason for event in events if event.phase == "end"] == ["the bundle was replaced; restart"]
        assert served.http.get("/v1/health/live").status_code == 200
    (line,) = [record.getMessage() for record in caplog.records if SAID in record.getMessage()]
    assert str(bundle) in line


@ways
def test_ready_notices_without_cameras_and_questions(bundle: Path, half_bundle: Path, change: Change) -> None:
    with serving(VideoLLM.load(bundle, kv_capacity=2048), stream_hosts=("127.0.0.0/8",)) as served:
        assert served.http.get(READY).status_code == 200
        change(bundle, half_bundle)
        assert "the bundle was replaced; restart" in error(served.http.get(READY), 503)["message"]
        error(
            served.http.post("/v1/live-stream", json={"liveStreamUrl": "rtsp://127.0.0.1:9/1", "description": "x"}), 503
        )


def test_an_answer_that_breaks_off_says_so(bundle: Path) -> None:
    """Also where a stop string ends it before its last piece."""
    with serving(VideoLLM.load(bundle, kv_capacity=1024)) as served:
        whole = served.ask(max_tokens=6).json()["choices"][0]["message"]["content"]
        stop = whole.strip()[1:3]
        assert stop and served.ask(max_tokens=6, stop=[stop]).json()["choices"][0]["finish_reason"] == "stop"
        take = VideoLLM.stream

        def changed(self: VideoLLM, *arguments: object, **options: object) -> Iterator[Piece]:
            pieces = take(self, *arguments, **options)  # type: ignore[arg-type]
            yield from islice(pieces, 1)
            overwritten(bundle, bundle)
            yield from pieces

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(VideoLLM, "stream", changed)
            error(served.ask(max_tokens=6, stop=[stop]), 503)


def test_a_file_that_is_watched_comes_to_its_end(bundle: Path) -> None:
    """And who waits for that does not wait for ever."""
    camera = Camera("file", "test://?fps=10&seconds=4", prompt="What?", window_s=1.0, every_s=0.5, max_new_tokens=2)
    with CameraWatcher(VideoLLM.load(bundle, kv_capacity=1024), [camera]) as watcher:
        wait_for(lambda: watcher.status()["cameras"]["file"]["windows"])
        removed(bundle, bundle)
        assert watcher.join(30)
        assert watcher.status()["failures"] == 1
        with pytest.raises(ReplacedError):
            watcher.check_bundle()
