"""CameraWatcher on a simulated clock: windows, fairness, questions, failures, and every way to stop."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise, repeat
from typing import Any

import pytest

from dycoke_edge import (
    Answer,
    BusyError,
    Camera,
    CameraWatcher,
    EngineError,
    Event,
    Message,
    Rule,
    StaleError,
    UsageError,
)
from dycoke_edge.config import Compression
from dycoke_edge.runtime.camera.post import Post
from dycoke_edge.runtime.camera.schedule import Schedule
from dycoke_edge.runtime.camera.watch import watch
from dycoke_edge.runtime.reply import Piece
from tests.cameras import Cost, FakeClock, FakeLLM, FakeReader, Readers, by_hand, drive, wait

PERSON = Rule("person", "Is a person in view?")
GATE = Camera("gate", "rtsp://x")


def of(made: CameraWatcher, type: str, camera: str | None = None) -> list[Event]:
    return [event for event in made.events.since() if event.type == type and camera in (None, event.camera)]


def answered(made: CameraWatcher, pieces: Iterator[Piece]) -> str:
    """The text of a question that has had its turn."""
    return "".join(piece.text for piece in pieces)


# Windows


def test_the_first_window_is_full_and_the_next_come_every_so_often() -> None:
    llm = FakeLLM()
    with by_hand(llm, GATE, rules=[PERSON]) as (made, readers):
        readers["gate"].fps = 1
        drive(made, llm.clock, 30)
    spans = [tuple(time - 1000 for time in times) for _, times in llm.scored]
    assert spans == [tuple(range(end - 7, end + 1)) for end in (7, 11, 15, 19, 23, 27)]


@pytest.mark.parametrize(("window", "every", "fps"), [(8, 4, 1), (8, 4, 30), (2, 2, 0.5), (1, 5, 1), (10, 1, 3)])
def test_no_window_is_missed_when_every_frame_is_seen(window: float, every: float, fps: float) -> None:
    schedule, due = Schedule(window, every, fps), 0
    frames = int(1000 * fps)
    for i in range(frames):
        due += schedule.frame(i / fps)
        assert schedule.waiting <= 1
        schedule.take()
    assert due == int((frames / fps - max(window, 1 / fps)) / every) + 1


def test_a_window_never_spans_a_segment() -> None:
    llm = FakeLLM()
    with by_hand(llm, GATE, rules=[PERSON]) as (made, readers):
        readers["gate"].fps = 1
        for length in (10, 3, 21):
            drive(made, llm.clock, length)
            readers["gate"].segment += 1
        status = made.status()["cameras"]["gate"]
    starts = [1000, 1010, 1013]
    assert len(llm.scored) == 1 + 4
    for _, times in llm.scored:
        assert all(later - earlier == pytest.approx(1) for earlier, later in pairwise(times))
        assert not any(times[0] < start <= times[-1] for start in starts)
    assert status["dropped_windows"] == {}


def test_a_window_that_waits_when_the_segment_changes_is_counted() -> None:
    llm = FakeLLM(cost=Cost(score=3.0))
    with by_hand(llm, GATE, Camera("door", "rtsp://y"), rules=[PERSON]) as (made, readers):
        reader = readers["gate"]
        for _ in range(8):
            reader.put()
            made._turns.step()
            llm.clock.now += 1
        reader.segment += 1
        reader.put()
        made._posts["gate"].lane.recent.schedule.waiting = 1
        drive(made, llm.clock, 1)
        assert made.status()["cameras"]["gate"]["dropped_windows"] == {"segment": 1}


def test_a_camera_that_sends_a_frame_a_minute_never_shows_old_ones() -> None:
    llm = FakeLLM()
    with by_hand(llm, replace(GATE, stale_s=120), rules=[PERSON]) as (made, readers):
        readers["gate"].fps = 1 / 60
        drive(made, llm.clock, 600, tick=1)
        status = made.status()["cameras"]["gate"]
        assert made.window("gate") is not None and status["memory_frames"] == 1
    assert len(llm.scored) == 9 and all(len(times) == 1 for _, times in llm.scored)
    assert status["windows"] == 9 and status["dropped_windows"] == {"no_frames": (540 - 7) // 4 + 1 - 9}


def test_a_file_is_looked_at_whole_however_slow_the_model() -> None:
    llm = FakeLLM(cost=Cost(push=1, score=10))
    with by_hand(llm, Camera("gate", "file:///clip.mp4"), rules=[PERSON]) as (made, readers):
        reader = readers["gate"]
        for i in range(31):
            reader.put(pts=float(i))
        reader.ended = True
        reader.say("ended")
        while not made.join(0):
            made._turns.step()
        status = made.status()["cameras"]["gate"]
        assert all(event.time_source == "pts" for event in of(made, "alert"))
    assert [times[-1] for _, times in llm.scored] == [7, 11, 15, 19, 23, 27, 30]  # the last is what was left
    assert status["dropped_windows"] == {} and status["frames"] == 31


def test_a_file_with_holes_in_its_times() -> None:
    llm = FakeLLM()
    with by_hand(llm, Camera("gate", "file:///clip.mp4"), rules=[PERSON]) as (made, readers):
        reader = readers["gate"]
        for pts in (None, 1.0, None, 3.0, 4.0, None, 6.0, 7.0, 8.0):
            reader.put(pts=pts)
        reader.ended = True
        reader.say("ended")
        while not made.join(0):
            made._turns.step()
    assert llm.scored[0][1] == (0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0)


def whole(clip: str, *stamps: tuple[int, float], **options: Any) -> tuple[FakeLLM, dict[str, Any], list[Event]]:
    """A file watched to its end, whose frames are in these segments at these seconds."""
    llm = FakeLLM()
    with by_hand(llm, Camera("gate", f"file:///{clip}", **options), rules=[PERSON]) as (made, readers):
        reader = readers["gate"]
        for segment, pts in stamps:
            reader.segment = segment
            reader.put(pts=pts)
        reader.ended = True
        reader.say("ended")
        while not made.join(0):
            made._turns.step()
        return llm, made.status()["cameras"]["gate"], of(made, "status")


def test_a_file_whose_pictures_stay_is_looked_at_whole() -> None:
    llm, status, told = whole("screen.mp4", *((0, 8.2 * i + more) for i in range(10) for more in (0, 0.2)))
    ends = [times[-1] for _, times in llm.scored]
    assert ends == pytest.approx([*range(7, 72, 4), 74.0], abs=0.01)  # as of 74 s at a constant rate
    assert all(times[-1] - times[0] <= 8 for _, times in llm.scored)
    assert status["windows"] == 18 and status["dropped_windows"] == {}
    assert status["video_s"] == status["video_s_looked_at"] == pytest.approx(74)
    assert told[-1].state == "ended" and "looked at 74.0 of 74.0 s" in str(told[-1].reason)


def test_a_picture_that_stays_too_long_is_looked_at_for_a_while() -> None:
    llm, status, _ = whole("lapse.mp4", (0, 0.0), (0, 3600.0))
    assert [times[-1] for _, times in llm.scored] == pytest.approx([7, 11, 15, 19, 3600], abs=0.01)  # until stale_s
    assert status["dropped_windows"] == {"no_frames": (3600 - 23) // 4}
    assert status["video_s_looked_at"] == status["video_s"] == 3600  # all of it shows one of two pictures


def test_what_a_segment_of_a_file_still_holds_is_looked_at() -> None:
    stamps = [(0, float(i)) for i in range(10)] + [(1, float(i)) for i in range(3)] + [(2, 5.0 + i) for i in range(8)]
    llm, status, _ = whole("joined.ts", *stamps)
    assert [times for _, times in llm.scored] == [
        tuple(range(8)),
        tuple(range(2, 10)),
        (0, 1, 2),
        tuple(range(5, 13)),
    ]
    assert status["dropped_windows"] == {} and status["video_s"] == status["video_s_looked_at"] == 9 + 2 + 7


def test_windows_further_apart_than_long_leave_some_of_a_file_out() -> None:
    _, status, told = whole("clip.mp4", *((0, float(i)) for i in range(41)), window_s=4.0, every_s=8.0)
    assert status["windows"] == 6 and status["video_s"] == 40  # at 3, 11, 19, 27, 35 and the end
    assert status["video_s_looked_at"] == 5 * 4 + 3  # four frames a window, each until the one after it
    assert "looked at 23.0 of 40.0 s; frames: 41, windows: 6" in str(told[-1].reason)


def test_a_wall_clock_set_back_makes_no_negative_times() -> None:
    llm = FakeLLM()
    llm.yes = lambda prompt, times: 0.9 if times[-1] < 1040 else 0.1
    with by_hand(llm, replace(GATE, prompt="What?"), rules=[PERSON]) as (made, readers):
        readers["gate"].fps = 1
        drive(made, llm.clock, 30)
        llm.clock.offset -= 3600
        drive(made, llm.clock, 30)
        ids = [event.id for event in made.events.since()]
    assert ids == sorted(ids)
    ends = [event for event in of(made, "alert") if event.phase == "end"]
    assert len(ends) == 1 and ends[0].start_time is not None and ends[0].end_time is not None
    assert ends[0].end_time >= ends[0].start_time


# A slow model, a fast camera: failure 4 of the study


def test_thirty_minutes_of_a_slow_model_and_a_fast_camera() -> None:
    llm = FakeLLM(cost=Cost(push=0.002, score=5.0, piece=0.5))
    llm.yes = lambda prompt, times: 0.9 if times[-1] - 1000 > 900 else 0.1
    camera = replace(GATE, fps=30, prompt="What?")
    ages, latencies = list[float](), list[float]()
    with by_hand(llm, camera, rules=[PERSON]) as (made, readers):
        readers["gate"].fps = 30
        for _ in range(90):
            drive(made, llm.clock, 19)
            began, pieces = llm.clock.now, made.ask_stream("gate", "Is it shut?")
            while made.status()["questions"]["waiting"]:
                made._turns.step()
            assert answered(made, pieces) == "a gate"
            latencies.append(llm.clock.now - began)
            status = made.status()["cameras"]["gate"]
            ages.append(status["answer_age_s"])
            assert len(readers["gate"].waiting) <= 64 and status["memory_frames"] <= 240
            assert len(made.events.since()) <= 1000
        windows, dropped = status["windows"], status["dropped_windows"]
        alerts = of(made, "alert")
    window_and_inference = 8 + 5 + 2 * 0.5 + 2 * 0.5
    assert max(ages) <= window_and_inference
    assert max(latencies) <= 5 + 1 + 1  # the unit that runs, and its own two pieces
    minutes = (llm.clock.now - 1000) / 60
    assert minutes > 28 and dropped["slow"] > 100
    looked_or_dropped = windows + dropped["slow"] + dropped.get("no_frames", 0)
    assert looked_or_dropped == pytest.approx((llm.clock.now - 1008) / 4, abs=4)
    assert status["dropped_frames"]["overrun"] > 10_000
    assert alerts[0].phase == "new" and {event.phase for event in alerts[1:]} == {"update"}
    assert alerts[0].time - llm.clock.offset - 1900 < 3 * window_and_inference


def test_alerts_go_on_while_questions_keep_coming() -> None:
    llm = FakeLLM(cost=Cost(score=0.5, piece=0.5))
    with by_hand(llm, GATE, rules=[PERSON], waiting=3) as (made, readers):
        readers["gate"].fps = 1
        pieces = list[Iterator[Piece]]()
        made._turns.step()
        while llm.clock.now < 1300:
            while made.status()["questions"]["waiting"] < 3:
                pieces.append(made.ask_stream("gate", "Is it shut?"))
            made._turns.step()
        status = made.status()
    assert status["cameras"]["gate"]["windows"] == 73 and status["cameras"]["gate"]["dropped_windows"] == {}
    assert status["questions"]["answered"] > 200


def test_cameras_share_the_model_fairly() -> None:
    llm = FakeLLM(cost=Cost(push=0.3, score=1.5))
    cameras = [Camera(f"c{i}", "rtsp://x", fps=fps) for i, fps in enumerate((0.5, 1, 2, 4))]
    with by_hand(llm, *cameras, rules=[PERSON]) as (made, readers):
        for camera in cameras:
            readers[camera.id].fps = camera.fps
        drive(made, llm.clock, 1800)
        windows = [made.status()["cameras"][camera.id]["windows"] for camera in cameras]
    assert min(windows) > 0.5 * max(windows) and min(windows) > 40


def test_an_idle_camera_costs_others_nothing() -> None:
    llm = FakeLLM(cost=Cost(score=3.9))
    with by_hand(llm, GATE, Camera("dark", "rtsp://y"), rules=[PERSON]) as (made, readers):
        readers["gate"].fps = 1
        drive(made, llm.clock, 400)
        assert made.status()["cameras"]["gate"]["dropped_windows"] == {}


# Questions


def test_a_question_goes_before_rules_and_captions() -> None:
    llm = FakeLLM()
    with by_hand(llm, replace(GATE, prompt="What?"), rules=[PERSON]) as (made, readers):
        readers["gate"].fps = 1
        drive(made, llm.clock, 6.5)
        llm.clock.now += 10
        made._turns.step()  # a push; more wait
        llm.calls.clear()
        pieces = made.ask_stream("gate", "Is it shut?")
        made._turns.step()
        assert llm.calls[0] == "ask Is it shut?" and answered(made, pieces) == "a gate"


def test_a_caption_is_cut_short_for_a_question_but_not_twice_in_a_row() -> None:
    llm = FakeLLM()
    llm.words = ("one ", "two ", "three")
    pieces = list[Iterator[Piece]]()
    with by_hand(llm, replace(GATE, prompt="What?")) as (made, readers):
        readers["gate"].fps = 1

        def interrupt() -> None:
            if llm.calls[-1] == "ask What?":
                pieces.append(made.ask_stream("gate", "Is it?"))

        llm.before_piece = interrupt
        drive(made, llm.clock, 17)
        assert made.status()["cameras"]["gate"]["dropped_windows"] == {"asked": 2}
        assert [event.text for event in of(made, "description")] == ["one two three"]
        assert [event.dropped_windows for event in of(made, "description")] == [1]


def test_a_caption_of_a_file_begins_again_after_the_question() -> None:
    llm = FakeLLM()
    llm.words = ("one ", "two ", "three")
    with by_hand(llm, Camera("gate", "file:///clip.mp4", prompt="What?")) as (made, readers):
        reader = readers["gate"]
        for i in range(16):
            reader.put(pts=float(i))
        asked = list[Iterator[Piece]]()

        def interrupt() -> None:
            if not asked:
                asked.append(made.ask_stream("gate", "Is it?"))

        llm.before_piece = interrupt
        drive(made, llm.clock, 1)
        assert [event.text for event in of(made, "description")] == ["one two three"] * 3
        assert answered(made, asked[0]) == "one two three"
        assert made.status()["cameras"]["gate"]["dropped_windows"] == {}


def test_the_line_is_bounded_and_says_when_to_come_back() -> None:
    llm = FakeLLM(cost=Cost(piece=2))
    with by_hand(llm, GATE, waiting=2) as (made, readers):
        readers["gate"].put()
        made._turns.step()
        first = made.ask_stream("gate", "Is it?")
        made.ask_stream("gate", "Is it?")
        with pytest.raises(BusyError) as caught:
            made.ask_stream("gate", "Is it?")
        assert caught.value.retry_after_s >= 1
        refused = made.ask("gate", "Is it?")
        assert (refused.status, refused.text) == ("busy", "") and refused.reason
        with pytest.raises(BusyError):
            made.generate("What?")
        made._turns.step()
        assert answered(made, first) == "a gate"
        made.ask_stream("gate", "Is it?")
        assert made.status()["questions"] == {"waiting": 2, "answered": 1, "refused": 3, "failed": 0}


def test_old_frames_are_never_used() -> None:
    llm = FakeLLM()
    llm.yes = lambda prompt, times: 0.9
    with by_hand(llm, GATE, rules=[PERSON]) as (made, readers):
        assert made.ask("gate", "Is it?") == Answer("stale", reason=made.ask("gate", "Is it?").reason)
        assert "no frame has come yet" in str(made.ask("gate", "Is it?").reason)
        reader = readers["gate"]
        reader.fps = 1
        drive(made, llm.clock, 30)
        waiting = made.ask_stream("gate", "Is it?")
        reader.fps = None
        reader.say("offline", "refused", "refused")
        llm.clock.now += 25
        stale = made.ask("gate", "Is it?")
        assert stale.status == "stale" and "26 s old, it is offline" in str(stale.reason) and stale.text == ""
        made._turns.step()
        with pytest.raises(StaleError):
            answered(made, waiting)  # went stale while it waited
        drive(made, llm.clock, 1)
        assert [(e.phase, e.reason) for e in of(made, "alert")][-1] == ("end", "no recent video")
        assert not llm.calls.count("ask Is it?")


def test_a_question_about_the_last_seconds_sees_only_those() -> None:
    llm = FakeLLM()
    with by_hand(llm, GATE) as (made, readers):
        readers["gate"].fps = 1
        drive(made, llm.clock, 20)
        for last_s, call in ((None, "ask Is it?"), (8, "ask Is it?"), (3, "ask stream Is it?")):
            pieces = made.ask_stream("gate", "Is it?", last_s)
            while made._turns.waiting:
                made._turns.step()
            assert llm.calls[-3] == call
            assert list(pieces)[-1].stats.frames == (4 if last_s == 3 else 8)
        for wrong in (0, -1, 8.5):
            with pytest.raises(UsageError, match=r"last_s=.* must be above 0 and at most 8"):
                made.ask("gate", "Is it?", wrong)


def test_who_reads_no_further_ends_the_answer() -> None:
    llm = FakeLLM()
    llm.words = tuple("abcdefgh")
    with by_hand(llm, GATE) as (made, readers):
        readers["gate"].put()
        made._turns.step()
        pieces = made.ask_stream("gate", "Is it?")
        question = made._turns._line[0]
        llm.before_piece = lambda: setattr(question, "cancelled", llm.calls.count("piece") >= 2)
        made._turns.step()
        assert llm.calls.count("piece") == 3
        llm.before_piece = lambda: None
        gone = made.ask_stream("gate", "Is it?")
        made._turns._line[0].cancelled = True
        llm.calls.clear()
        made._turns.step()
        assert llm.calls == []
        del pieces, gone


@pytest.mark.parametrize("question", ["", "  \n"])
def test_an_empty_question(question: str) -> None:
    with by_hand(FakeLLM(), GATE) as (made, _), pytest.raises(UsageError, match="question is empty"):
        made.ask("gate", question)


def test_a_conversation_begins_with_the_camera() -> None:
    """Whatever the part of the window that is asked about: refused before anybody stands in line."""
    before = [Message("system", "Be brief."), Message("user", "Is it open?")]
    llm = FakeLLM()
    with by_hand(llm, GATE) as (made, readers):
        readers["gate"].fps = 1
        drive(made, llm.clock, 20)
        for last_s in (None, 3):
            with pytest.raises(UsageError, match="of the system comes before the live video"):
                made.ask_stream("gate", before, last_s)
        assert not made._turns.waiting
        pieces = made.ask_stream("gate", [before[1], Message("assistant", "No."), Message("user", "Sure?")])
        while made._turns.waiting:
            made._turns.step()
        assert answered(made, pieces) == "a gate"


# Failures of the model


def failing(*texts: str) -> Iterator[None]:
    for text in texts:
        if text:
            raise EngineError(text)
        yield


def test_a_rule_that_fails_costs_its_own_score_and_is_an_event() -> None:
    llm = FakeLLM()
    llm.yes = lambda prompt, times: 0.9
    dog = Rule("dog", "Is a dog in view?")
    broken = False

    def fail(call: str) -> None:
        if broken and call == "score" and llm.calls.count("score") % 2:  # the first of two rules
            raise EngineError("CUDA error 700 at rtsp://admin:hunter2@cam/1")

    llm.fail = fail
    with by_hand(llm, replace(GATE, prompt="What?"), rules=[PERSON, dog]) as (made, readers):
        readers["gate"].fps = 1
        drive(made, llm.clock, 9)
        assert made.status()["failures"] == 0 and llm.calls.count("score") == 2
        broken = True
        drive(made, llm.clock, 40)
        errors, status = of(made, "error"), made.status()
        camera = status["cameras"]["gate"]
        assert status["failures"] == camera["failures"] == camera["alerts"]["person"]["unknown"]["failed"] == 10
        assert camera["alerts"]["dog"]["on"] and camera["alerts"]["dog"]["unknown"] == {}
        assert camera["windows"] == len(of(made, "description")) == 11 and camera["dropped_windows"] == {}
        assert errors and all("rule person: EngineError: CUDA error 700" in str(event.reason) for event in errors)
        assert "hunter2" not in str(errors) + str(status)
        assert all(event.text == "" and event.verdict is None for event in errors)
        assert [event.rule_id for event in of(made, "alert") if event.phase == "new"] == ["dog"]
        assert llm.lives[0].cleared == 1  # when the first frame came: a question changes no frame
        broken = False
        drive(made, llm.clock, 40)
        assert {event.rule_id for event in of(made, "alert") if event.phase == "new"} == {"dog", "person"}


def test_a_rule_that_always_fails_makes_the_watcher_unready_although_frames_go_in() -> None:
    llm = FakeLLM()
    llm.fail = lambda call: next(failing("no memory")) if call == "score" else None
    with by_hand(llm, GATE, rules=[PERSON]) as (made, readers):
        made._turns._thread = threading.current_thread()  # alive
        readers["gate"].fps = 1
        drive(made, llm.clock, 20)
        assert "failed 4 times in a row: EngineError: no memory" in made.status()["reasons"][0]
        made._turns._thread = None


def test_a_failure_costs_a_window_and_is_an_event() -> None:
    llm = FakeLLM()
    broken = False

    def fail(call: str) -> None:
        if broken and call == "piece":
            raise EngineError("CUDA error 700 at rtsp://admin:hunter2@cam/1")

    llm.fail = fail
    with by_hand(llm, replace(GATE, prompt="What?"), Camera("door", "rtsp://y"), rules=[PERSON]) as (made, readers):
        readers["gate"].fps = readers["door"].fps = 1
        drive(made, llm.clock, 10)
        assert made.status()["failures"] == 0
        broken = True
        drive(made, llm.clock, 40)
        errors, status = of(made, "error"), made.status()
        assert len(errors) == status["cameras"]["gate"]["failures"] == status["failures"] >= 3
        assert "CUDA error 700" in str(errors[0].reason) and "hunter2" not in str(errors[0].reason)
        assert all(event.text == "" and event.verdict is None for event in errors)
        assert llm.lives[0].cleared >= len(errors)  # what it remembers may be half-written
        assert status["cameras"]["gate"]["dropped_windows"]["failed"] == len(errors)
        assert status["cameras"]["door"]["failures"] == 0
        assert status["cameras"]["door"]["windows"] == 11


def test_not_ready_while_the_model_fails_again_and_again() -> None:
    llm = FakeLLM()
    broken = True

    def fail(call: str) -> None:
        if broken:
            raise EngineError("out of memory")

    llm.fail = fail
    with by_hand(llm, GATE, rules=[PERSON]) as (made, readers):
        made._turns._thread = threading.current_thread()  # alive
        readers["gate"].fps = 1
        drive(made, llm.clock, 3.5)
        assert not made.status()["ready"]
        assert "failed 4 times in a row: EngineError: out of memory" in made.status()["reasons"][0]
        assert len(of(made, "error")) == 1  # not one a frame
        broken = False
        drive(made, llm.clock, 2)
        assert made.status()["ready"] and made.status()["reasons"] == []
        made._turns._thread = None


def test_a_question_that_fails_says_so_and_disturbs_nothing() -> None:
    llm = FakeLLM()
    llm.fail = lambda call: next(failing("no memory left for http://u:pw@h/")) if call == "piece" else None
    with by_hand(llm, GATE, rules=[PERSON]) as (made, readers):
        readers["gate"].fps = 1
        drive(made, llm.clock, 9)
        found = list[Answer]()
        thread = threading.Thread(target=lambda: found.append(made.ask("gate", "Is it?", timeout=30)))
        thread.start()
        wait(lambda: made._turns.waiting)
        made._turns.step()
        thread.join(30)
        assert found[0].status == "failed" and found[0].text == "" and "pw" not in str(found[0].reason)
        assert made.status()["questions"]["failed"] == 1
        drive(made, llm.clock, 10)
        assert made.status()["cameras"]["gate"]["failures"] == 0


def test_a_model_that_hangs_is_not_ready() -> None:
    llm = FakeLLM()
    reasons = list[str]()
    with by_hand(llm, GATE) as (made, readers):
        made._turns._thread = threading.current_thread()

        def hang(call: str) -> None:
            llm.clock.now += 61
            reasons.extend(made.status()["reasons"])

        llm.fail = hang
        readers["gate"].put()
        made._turns.step()
        made._turns._thread = None
    assert reasons == ["the model has been at one thing for 61 s"]


# Cameras and rules come and go


def test_cameras_and_rules_come_and_go() -> None:
    llm = FakeLLM()
    llm.yes = lambda prompt, times: 0.9
    with by_hand(llm, GATE) as (made, readers):
        made._in_turn = lambda function: function()  # type: ignore[method-assign, assignment]
        made.add_rule(PERSON)
        made.add(Camera("door", "rtsp://y", rules=(Rule("dog", "Is a dog in view?"),)))
        readers["gate"].fps = readers["door"].fps = 1
        drive(made, llm.clock, 20)
        alerts = {name: set(camera["alerts"]) for name, camera in made.status()["cameras"].items()}
        assert alerts == {"gate": {"person"}, "door": {"person", "dog"}}
        assert len([e for e in of(made, "alert") if e.phase == "new"]) == 3
        made.remove_rule("person")
        ends = [(e.camera, e.rule_id, e.reason) for e in of(made, "alert") if e.phase == "end"]
        assert ends == [("gate", "person", "the rule was removed"), ("door", "person", "the rule was removed")]
        made.remove("door")
        assert (of(made, "alert")[-1].rule_id, of(made, "alert")[-1].reason) == ("dog", "the camera was removed")
        llm.scored.clear()
        drive(made, llm.clock, 20)
        assert llm.scored == [] and set(made.cameras) == {"gate"} and made.rules == {}


def test_pause_and_resume() -> None:
    llm = FakeLLM()
    llm.yes = lambda prompt, times: 0.9
    with by_hand(llm, GATE, rules=[PERSON]) as (made, readers):
        reader = readers["gate"]
        reader.fps = 1
        drive(made, llm.clock, 20)
        made.pause("gate")
        made.pause("gate")
        assert (of(made, "alert")[-1].phase, of(made, "alert")[-1].reason) == ("end", "the camera was paused")
        wait(lambda: not reader.on)
        llm.scored.clear()
        drive(made, llm.clock, 100)
        assert llm.scored == [] and made.status()["cameras"]["gate"]["state"] == "disabled"
        assert made.ask("gate", "Is it?").status == "stale"
        made.resume("gate")
        made.resume("gate")
        drive(made, llm.clock, 20)
        assert made.status()["cameras"]["gate"]["state"] == "online"
        assert llm.scored and all(times[0] > 1119 for _, times in llm.scored)
        assert [event.state for event in of(made, "status")] == ["online", "disabled", "online"]
        assert not made._posts["gate"].finished


class Held(FakeReader):
    """A camera that is let go when the test says so."""

    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)  # type: ignore[arg-type]
        self.leaving, self.go = threading.Event(), threading.Event()
        self.does = list[str]()

    def start(self) -> FakeReader:
        self.does.append("start")
        return super().start()

    def stop(self, timeout: float | None = None) -> bool:
        self.does.append("stop")
        self.leaving.set()
        assert self.go.wait(60)
        return super().stop(timeout)


class HeldReaders(Readers):
    def __call__(self, camera: str, *more: Any) -> Any:
        self.made[camera] = Held(camera, *more)
        return self.made[camera]


@contextmanager
def held() -> Iterator[tuple[CameraWatcher, Held]]:
    """A running watcher of one camera that takes as long to let go as the test wants."""
    readers, llm = HeldReaders(), FakeLLM()
    made = CameraWatcher(llm.real, [GATE], clock=llm.clock, make_reader=readers)
    made._turns.start = lambda: None  # type: ignore[method-assign]
    with made:
        reader = readers["gate"]
        assert isinstance(reader, Held)
        yield made, reader
        reader.go.set()


def test_a_camera_that_is_resumed_while_it_is_let_go_is_watched() -> None:
    with held() as (made, reader):
        made.pause("gate")
        assert reader.leaving.wait(60)
        resuming = threading.Thread(target=made.resume, args=("gate",))
        resuming.start()
        wait(lambda: made._posts["gate"]._wanted)
        assert not made._posts["gate"].enabled  # or the model's thread would take the camera's end for a file's
        reader.go.set()
        resuming.join(60)
        assert reader.on and made.status()["cameras"]["gate"]["state"] == "online"
        assert reader.does == ["start", "stop", "start"]
        assert [event.state for event in of(made, "status")] == ["online", "disabled", "online"]


def test_a_pause_that_comes_late_to_its_turn_undoes_no_resume(monkeypatch: pytest.MonkeyPatch) -> None:
    late = list[Callable[[], None]]()

    class Late(threading.Thread):
        """A thread that gets no turn before the test gives it one."""

        def start(self) -> None:
            late.append(self.run)

    with held() as (made, reader):
        reader.go.set()
        with monkeypatch.context() as patch:
            patch.setattr("dycoke_edge.runtime.camera.post.threading.Thread", Late)
            made.pause("gate")
            made.resume("gate")
        assert len(late) == 1 and reader.on
        late[0]()
        assert reader.on and reader.does == ["start", "stop", "start"]
        assert [event.state for event in of(made, "status")] == ["online", "disabled", "online"]


def test_a_camera_is_what_was_wished_for_last() -> None:
    for last in ("pause", "resume"):
        with held() as (made, reader):
            made.pause("gate")
            assert reader.leaving.wait(60)
            threads = list[threading.Thread]()
            for act in ("resume", "pause") * 3 + (("resume",) if last == "resume" else ()):
                threads.append(threading.Thread(target=getattr(made, act), args=("gate",)))
                threads[-1].start()
                wait(lambda: made._posts["gate"]._wanted == (act == "resume"))  # noqa: B023
            reader.go.set()
            for thread in threads:
                thread.join(60)
            wait(lambda: made._posts["gate"]._done == made._posts["gate"]._wish)
            assert reader.on == (last == "resume") == made._posts["gate"].enabled
            assert reader.does == ["start", "stop"] + ["start"] * (last == "resume")


def test_a_camera_that_is_paused_before_the_start_is_not_read() -> None:
    made, readers = running(FakeLLM(), GATE)
    made.pause("gate")
    with made:
        assert not readers["gate"].on and made.status()["cameras"]["gate"]["state"] == "disabled"
        made.resume("gate")
        assert readers["gate"].on
    made, readers = running(FakeLLM(), GATE)
    made.pause("gate")
    made.resume("gate")
    assert not readers["gate"].on
    with made:
        assert readers["gate"].on


def test_a_window_that_was_being_scored_when_its_camera_was_paused_begins_no_alert() -> None:
    llm = FakeLLM()
    llm.yes = lambda prompt, times: 0.9
    quick = replace(PERSON, consecutive=1, cooldown_s=0)
    with by_hand(llm, GATE, rules=[quick]) as (made, readers):
        readers["gate"].fps = 1
        llm.fail = lambda call: made.pause("gate") if call == "score" else None
        drive(made, llm.clock, 20)
        assert of(made, "alert") == []
        llm.fail = lambda call: None
        made.resume("gate")
        drive(made, llm.clock, 20)
        assert [event.phase for event in of(made, "alert")][:1] == ["new"]


def test_a_rule_that_is_removed_while_it_is_scored_begins_no_alert() -> None:
    llm = FakeLLM()
    llm.yes = lambda prompt, times: 0.9
    with by_hand(llm, GATE, rules=[replace(PERSON, consecutive=1)]) as (made, readers):
        readers["gate"].fps = 1
        llm.fail = lambda call: made.remove_rule("person") if call == "score" else None
        drive(made, llm.clock, 20)
        assert of(made, "alert") == [] and made.status()["cameras"]["gate"]["alerts"] == {}


DOOR = Camera("door", "rtsp://y")


def removed_while_added(made: CameraWatcher, after: Callable[[], None] = lambda: None) -> None:
    """Have cameras removed after they got their memory, and before they are watched."""

    def in_turn(function: Callable[[], object]) -> None:
        function()
        made.remove("door")
        after()

    made._in_turn = in_turn  # type: ignore[method-assign]


def test_a_camera_that_is_removed_while_it_is_added_is_not_watched() -> None:
    llm = FakeLLM()
    with by_hand(llm, GATE) as (made, readers):
        removed_while_added(made)
        with pytest.raises(UsageError, match="camera door was removed while it was being added"):
            made.add(DOOR)
        assert not readers["door"].on and set(made.cameras) == {"gate"} and len(made._lanes) == 1


def test_a_camera_that_is_removed_before_its_memory_is_taken_takes_none() -> None:
    llm = FakeLLM()
    made, readers = running(llm, GATE)
    with made:
        hold = Holding(llm, "push")
        feed(readers["gate"], llm.clock, hold.there.is_set)
        failures = list[Exception]()

        def add() -> None:
            try:
                made.add(DOOR)
            except Exception as error:
                failures.append(error)

        adding = threading.Thread(target=add)
        adding.start()
        wait(lambda: made._turns.waiting)
        made.remove("door")
        hold.go.set()
        adding.join(60)
        assert len(failures) == 1 and isinstance(failures[0], UsageError)
        assert len(llm.lives) == 1 and not readers["door"].on


def test_a_camera_that_is_removed_when_it_is_about_to_be_read_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    with by_hand(FakeLLM(), GATE) as (made, readers):
        made._in_turn = lambda function: function()  # type: ignore[method-assign, assignment]
        begin = Post.begin

        def late(post: Post) -> None:
            made.remove("door")
            begin(post)

        monkeypatch.setattr(Post, "begin", late)
        made.add(DOOR)
        assert not readers["door"].on and set(made.cameras) == {"gate"}


def test_adding_fails_as_it_failed_although_the_camera_was_removed_meanwhile() -> None:
    def fail() -> None:
        raise EngineError("out of memory")

    with by_hand(FakeLLM(), GATE) as (made, _):
        removed_while_added(made, fail)
        with pytest.raises(EngineError, match="out of memory"):
            made.add(DOOR)
        assert set(made.cameras) == {"gate"}


def test_a_camera_that_took_the_id_meanwhile_stays() -> None:
    with by_hand(FakeLLM(), GATE) as (made, readers):
        second = replace(DOOR, prompt="What?")

        def again() -> None:
            made._in_turn = lambda function: function()  # type: ignore[method-assign, assignment]
            made.add(second)

        removed_while_added(made, again)
        with pytest.raises(UsageError, match="removed while"):
            made.add(DOOR)
        assert made.cameras["door"] == second and readers["door"].on and len(made._lanes) == 2


def test_a_watcher_that_is_stopped_while_a_camera_is_added_watches_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    with by_hand(FakeLLM(), GATE) as (made, readers):
        made._in_turn = lambda function: function()  # type: ignore[method-assign, assignment]
        begin = Post.begin

        def late(post: Post) -> None:
            made.stop()
            begin(post)

        monkeypatch.setattr(Post, "begin", late)
        made.add(DOOR)
        assert not readers["door"].on and not readers["gate"].on


def test_what_the_model_could_not_be_asked_is_refused_when_it_is_added() -> None:
    llm = FakeLLM()

    def refuse(prompt: object) -> None:
        if prompt == "<image>?":
            raise UsageError("prompt: 2 places for a video")

    llm.refuse = refuse
    bad = replace(PERSON, id="bad", prompt="<image>?")
    for camera, name in (
        (replace(DOOR, rules=(bad,)), "rule bad: prompt: 2 places"),
        (replace(DOOR, prompt="<image>?"), "camera door: prompt: 2 places"),
    ):
        with pytest.raises(UsageError, match=name):
            running(llm, GATE, camera)
        with by_hand(llm, GATE) as (made, _):
            with pytest.raises(UsageError, match=name):
                made.add(camera)
            assert set(made.cameras) == {"gate"}
        with pytest.raises(UsageError, match=name):
            watch(llm.real, camera, Compression())
    with pytest.raises(UsageError, match="rule bad: prompt: 2 places"):
        running(llm, GATE, rules=[bad])
    with by_hand(llm, GATE, rules=[PERSON]) as (made, _):
        with pytest.raises(UsageError, match="rule bad: prompt: 2 places"):
            made.add_rule(bad)
        assert set(made.rules) == {"person"}


@pytest.mark.parametrize(
    ("act", "says"),
    [
        (lambda w: w.ask("door", "Is it?"), "there is no camera door; use one of: gate"),
        (lambda w: w.pause("door"), "there is no camera door"),
        (lambda w: w.remove("door"), "there is no camera door"),
        (lambda w: w.snapshot("door"), "there is no camera door"),
        (lambda w: w.add(GATE), "there is a camera gate already"),
        (lambda w: w.add_rule(PERSON), "there is a rule person already"),
        (lambda w: w.add_rule(Rule("x", "?", cameras=("dor",))), "there is no camera dor"),
        (lambda w: w.remove_rule("x"), "there is no rule x; use one of: person"),
        (lambda w: w.add(Camera("b", "rtsp://x", rules=(PERSON,))), "rule person of camera b is there already"),
        (lambda w: w.start(), "a CameraWatcher starts once"),
    ],
)
def test_mistakes(act: object, says: str) -> None:
    with by_hand(FakeLLM(), GATE, rules=[PERSON]) as (made, _):
        with pytest.raises(UsageError, match=says):
            act(made)  # type: ignore[operator]
        assert set(made.cameras) == {"gate"} and set(made.rules) == {"person"}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"id": "front door"}, "camera id 'front door'"),
        ({"fps": 0}, "fps=0 (--fps) must be between"),
        ({"window_s": -1}, "window_s=-1 (--window-s)"),
        ({"prompt": " "}, "prompt of camera gate is empty"),
    ],
)
def test_a_camera_that_cannot_be(options: dict[str, object], says: str) -> None:
    with pytest.raises(UsageError) as caught:
        Camera(**{"id": "gate", "uri": "rtsp://x", **options})  # type: ignore[arg-type]
    assert says in str(caught.value)


def test_a_camera_keeps_its_uri_to_itself() -> None:
    camera = Camera("gate", "rtsp://admin:hunter2@cam/1")
    assert "hunter2" not in repr(camera)
    with by_hand(FakeLLM(), camera) as (made, _):
        assert "hunter2" not in str(made.status())


# Stopping


def running(llm: FakeLLM, *cameras: Camera, **options: object) -> tuple[CameraWatcher, Readers]:
    """With the model's thread, on the fake clock."""
    readers = Readers()
    made = CameraWatcher(llm.real, cameras, clock=llm.clock, make_reader=readers, **options)  # type: ignore[arg-type]
    return made, readers


def feed(reader: FakeReader, clock: FakeClock, until: Callable[[], object]) -> None:
    """A frame a second of the fake clock, each when the one before was taken, until something happened."""
    while not until():
        reader.put()
        clock.now += 1
        wait(lambda: not reader.waiting or until())


class Holding:
    """Holds the model up at its next call until let go."""

    def __init__(self, llm: FakeLLM, call: str) -> None:
        self.there, self.go = threading.Event(), threading.Event()
        self._call = call
        llm.fail = self._hold

    def _hold(self, call: str) -> None:
        if call == self._call:
            self.there.set()
            assert self.go.wait(60)


def test_stop_is_legal_in_every_state() -> None:
    made, _ = running(FakeLLM(), GATE)
    made.stop()
    made.stop()
    with pytest.raises(UsageError, match="starts once"):
        made.start()
    again, _ = running(FakeLLM(), GATE)
    again.start()
    again.pause("gate")
    again.stop()
    again.stop()
    assert again.join(0) and not again._turns.alive
    assert again.status()["state"] == "stopped" and again.status()["reasons"] == ["the watcher is stopped"]
    with pytest.raises(EngineError, match="was stopped"):
        again.generate("What?")


def test_stop_from_a_handler_of_events() -> None:
    llm, stopped = FakeLLM(), threading.Event()

    def handler(event: Event) -> None:
        made.stop()
        stopped.set()

    made, _ = running(llm, GATE, on_event=handler)
    made.start()
    assert stopped.wait(30) and made.join(30)


def test_stop_while_the_model_hangs_ends_alerts_and_questions() -> None:
    llm = FakeLLM()
    llm.yes = lambda prompt, times: 0.9
    made, readers = running(llm, GATE, rules=[PERSON])
    with made:
        feed(readers["gate"], llm.clock, lambda: of(made, "alert"))
        hold = Holding(llm, "push")
        feed(readers["gate"], llm.clock, hold.there.is_set)
        answers = list[Answer]()
        asking = threading.Thread(target=lambda: answers.append(made.ask("gate", "Is it?")))
        asking.start()
        wait(lambda: made._turns.waiting)
        made.stop(timeout=1.0)  # comes back although the model does not
        assert made._turns.alive
        asking.join(30)
    last = [event for event in made.events.since() if event.type in ("alert", "status")]
    assert [(event.type, event.phase, event.state) for event in last[-2:]] == [
        ("alert", "end", None),
        ("status", "new", "stopped"),
    ]
    assert last[-2].reason == "the watcher was stopped"
    assert answers[0].status == "failed" and "stopped" in str(answers[0].reason)
    hold.go.set()
    count = len(made.events.since())
    made._turns._thread.join(30)  # type: ignore[union-attr]
    assert len(made.events.since()) == count


def test_stop_in_the_middle_of_an_answer() -> None:
    llm = FakeLLM()
    llm.words = repeat("word ")  # without an end: only stop() ends it
    made, readers = running(llm, replace(GATE, prompt="What?"))
    with made:
        feed(readers["gate"], llm.clock, lambda: "piece" in llm.calls)
    assert not made._turns.alive and of(made, "description") == []


def test_one_thread_makes_every_call_of_the_model() -> None:
    llm = FakeLLM()
    made, readers = running(llm, GATE, Camera("door", "rtsp://y", prompt="What?"), rules=[PERSON])
    with made:
        for _ in range(12):
            readers["gate"].put()
            readers["door"].put()
            llm.clock.now += 1
            wait(lambda: not readers["gate"].waiting and not readers["door"].waiting)
        wait(lambda: len(llm.scored) == 4)
        threads = [threading.Thread(target=made.ask, args=("gate", "Is it?")) for _ in range(4)]
        for thread in threads:
            thread.start()
        assert made.generate("Hello").text == "a gate"
        for thread in threads:
            thread.join(30)
    assert len(llm.threads) == 1 and threading.get_ident() not in llm.threads


def test_an_answer_that_does_not_come_in_time() -> None:
    llm = FakeLLM()
    made, readers = running(llm, GATE)
    with made:
        readers["gate"].put()
        wait(lambda: made.window("gate"))
        hold = Holding(llm, "piece")
        answer = made.ask("gate", "Is it?", timeout=0.05)
        assert answer.status == "busy" and "no whole answer within 0.05 s" in str(answer.reason)
        hold.go.set()


def test_asking_before_the_start() -> None:
    made, _ = running(FakeLLM(), GATE)
    with pytest.raises(UsageError, match="not started"):
        made.generate("What?")
