"""watch, ask, probe as people type them: lines, exit codes, signals, and no secret anywhere. Real model, real input."""

from __future__ import annotations

import fcntl
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from time import sleep
from typing import Any

import pytest

from dycoke_edge import Camera, CameraWatcher, EngineError, Rule, VideoLLM
from dycoke_edge.cli_environment import fill
from dycoke_edge.cli_screen import CAPACITY, Screen
from dycoke_edge.errors import InputError, UsageError
from dycoke_edge.runtime.camera.events import Event
from dycoke_edge.runtime.sinks.jsonl import JsonlSink
from tests.cameras import wait
from tests.commands import ROOT, Argument, here, start, wait_until

Capture = pytest.CaptureFixture[str]
CLIP = ROOT / "examples" / "clip.mp4"  # 8 seconds
CANARY = "hunter2canary"
EVENT = Event("alert", "new", "gate", "1", 0.0)
# The tiny random model says yes to everything, at 0.99 or more.
ALWAYS = ("--rule", "always=Is it?", "--threshold", 0.5, "--clear-threshold", 0.1, "--min-mass", 0)
SHORT = ("--window", 2, "--every", 1, "--fps", 2, "--max-new-tokens", 4)


def events(out: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.splitlines()]


# watch


def test_a_file_is_watched_to_its_end(capsys: Capture, tiny_bundle: Path) -> None:
    outcome = here(capsys, "watch", tiny_bundle, CLIP, "--ask", "What?", *ALWAYS, *SHORT, "--json")
    assert outcome.code == 0, outcome.err
    found = events(outcome.out)
    described = [event for event in found if event["type"] == "description"]
    assert len(described) == 7 and all(event["frames"] == 4 and event["text"] for event in described)
    alerts = [event for event in found if event["type"] == "alert"]
    assert [(event["phase"], event["reason"]) for event in alerts] == [("new", None), ("end", "the video ended")]
    assert alerts[0]["verdict"] == "confirmed" and alerts[0]["score"] > 0.5 and alerts[0]["rule_id"] == "always"
    assert all(0 < e["vision_tokens_kept"] < e["vision_tokens_in"] for e in described)
    assert [e["state"] for e in found if e["type"] == "status"] == ["connecting", "online", "ended"]
    assert "random weights" in outcome.err and outcome.err.count("\n") == 1


def test_for_people_what_is_seen_goes_to_stdout_and_the_rest_to_stderr(capsys: Capture, tiny_bundle: Path) -> None:
    outcome = here(capsys, "watch", tiny_bundle, CLIP, *ALWAYS, *SHORT)
    lines = outcome.out.splitlines()
    assert [re.sub(r"^\d\d:\d\d:\d\d ", "", line)[:26] for line in lines] == [
        "info always new confirmed ",
        "info always end unknown 1.",
    ]
    assert "camera online" in outcome.err and "camera ended" in outcome.err


def test_the_same_file_gives_the_same_answers_as_the_generator(capsys: Capture, tiny_bundle: Path) -> None:
    outcome = here(capsys, "watch", tiny_bundle, CLIP, "--ask", "What?", *SHORT, "--json")
    told = [event["text"] for event in events(outcome.out) if event["type"] == "description"]
    llm = VideoLLM.load(tiny_bundle)
    results = list(llm.watch(str(CLIP), "What?", window_s=2, every_s=1, fps=2, max_new_tokens=4))
    assert [result.text for result in results] == told
    assert [(result.start, result.end) for result in results] == [(i, i + 1.5) for i in range(7)]
    assert {result.frames for result in results} == {4} and {result.dropped_windows for result in results} == {0}


def test_a_rule_for_the_generator(tiny_bundle: Path) -> None:
    llm = VideoLLM.load(tiny_bundle)
    rule = Rule("always", "Is it?", min_mass=0)
    results = list(llm.watch("test://?seconds=6", window_s=2, every_s=2, fps=2, rules=(rule,)))
    assert len(results) == 3 and all(set(result.scores) == {"always"} and result.text == "" for result in results)
    assert all(0 <= result.scores["always"] <= 1 for result in results)


def test_the_generator_lets_the_camera_go_when_left(tiny_bundle: Path) -> None:
    llm = VideoLLM.load(tiny_bundle)
    before = threading.active_count()
    for _ in llm.watch("test://?seconds=1000", "What?", max_new_tokens=1):
        break
    wait(lambda: threading.active_count() <= before)


def test_the_generator_raises_what_the_input_raises(tiny_bundle: Path) -> None:
    llm = VideoLLM.load(tiny_bundle)
    with pytest.raises(InputError, match="does not exist"):
        next(llm.watch("no_such_clip.mp4", "What?"))
    with pytest.raises(InputError, match="refused"):
        next(llm.watch(f"rtsp://127.0.0.1:{closed_port()}/x", "What?"))
    with pytest.raises(UsageError, match="options are the fields of Camera"):
        llm.watch("test://", "What?", windows=3)


def closed_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (("BUNDLE", CLIP), 2, "nothing to look for; give --ask TEXT"),
        (("BUNDLE", CLIP, "--rule", "Is a person in view?"), 2, "has no name; use NAME=QUESTION"),
        (("BUNDLE", CLIP, "--rule", "a b=Is it?"), 2, "rule id 'a b'"),
        (("BUNDLE", CLIP, "--rule", "x="), 2, "rule x has no question"),
        (("BUNDLE", CLIP, "--rule", "x=Is it?", "--rule", "x=Was it?"), 2, "there is a rule x already"),
        (("BUNDLE", CLIP, "--rule", "x=Is it?", "--threshold", 2), 2, "threshold=2.0 (--threshold)"),
        (("BUNDLE", CLIP, "--ask", "a", "--ask", "b"), 2, "--ask was given 2 times"),
        (("BUNDLE", CLIP, "--ask", "What?", "--fps", 0), 2, "fps=0.0 (--fps)"),
        (("BUNDLE", CLIP, "--ask", "What?", "--window", 0), 2, "window_s=0.0 (--window-s)"),
        (("BUNDLE", CLIP, "--ask", "What?", "--id", "my cam"), 2, "camera id 'my cam'"),
        (("BUNDLE", "exec:rm", "--ask", "What?"), 3, "does not exist"),
        (("BUNDLE", "exec://rm", "--ask", "What?"), 2, "a scheme that no source understands"),
        (("BUNDLE", "gst://videotestsrc", "--ask", "What?"), 2, "allow"),
        (("BUNDLE", "{DYCOKE_NOT_SET}", "--ask", "What?"), 2, "the environment has no DYCOKE_NOT_SET"),
        (("BUNDLE", CLIP, "--ask", "What?", "--fps", 30, "--window", 60, "--mode", "paper"), 2, "--kv-capacity"),
        (("NOWHERE", CLIP, "--ask", "What?"), 4, "NOWHERE"),
    ],
)
def test_bad_use_is_one_line(
    capsys: Capture, tiny_bundle: Path, words: tuple[Argument, ...], code: int, says: str
) -> None:
    outcome = here(capsys, "watch", *(tiny_bundle if word == "BUNDLE" else word for word in words))
    assert outcome.code == code and says in outcome.err.splitlines()[-1], outcome.err
    assert outcome.err.splitlines()[-1].startswith("dycoke-edge: ") and outcome.out == ""


def test_a_source_that_fails_before_its_first_frame_ends_with_3(capsys: Capture, tiny_bundle: Path) -> None:
    uri = f"rtsp://admin:{CANARY}@127.0.0.1:{closed_port()}/x"
    outcome = here(capsys, "watch", tiny_bundle, uri, "--ask", "What?", "--json")
    assert outcome.code == 3 and "refused the connection" in outcome.err
    assert [event["state"] for event in events(outcome.out)][:2] == ["connecting", "offline"]
    assert CANARY not in outcome.out + outcome.err and "admin" not in outcome.out + outcome.err


def test_a_model_that_fails_ends_with_4(capsys: Capture, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dycoke_edge.runtime.live import LiveVideo

    def broken(*arguments: object, **options: object) -> None:
        raise EngineError("the device is gone")

    monkeypatch.setattr(LiveVideo, "score", broken)
    outcome = here(capsys, "watch", tiny_bundle, CLIP, *ALWAYS, *SHORT, "--json")
    failures = [event for event in events(outcome.out) if event["type"] == "error"]
    assert outcome.code == 4 and "the device is gone" in outcome.err
    assert failures and all(e["text"] == "" and "the device is gone" in e["reason"] for e in failures)


# Signals


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("ask", [(), ("--ask", "What?", "--max-new-tokens", 4096)], ids=["rules", "mid-answer"])
def test_a_signal_ends_it_soon_and_open_alerts_get_their_end(
    tiny_bundle: Path, number: signal.Signals, code: int, ask: tuple[Argument, ...]
) -> None:
    long = ("--window", 1, "--every", 1, "--fps", 4, "--consecutive", 1)
    process = start("watch", tiny_bundle, "test://?fps=10", "--realtime", *ALWAYS, *long, *ask, "--json")
    assert process.stdout is not None
    found = list[dict[str, Any]]()
    while not found or found[-1]["type"] != "alert":
        found.append(json.loads(process.stdout.readline()))
    process.send_signal(number)
    out, err = process.communicate(timeout=5)  # the promise: less than 5 seconds
    found += events(out.decode())
    assert process.returncode == code, err
    alerts = [event for event in found if event["type"] == "alert"]
    assert (alerts[-1]["phase"], alerts[-1]["reason"]) == ("end", "the watcher was stopped")
    assert found[-1]["state"] == "stopped"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("streams", ["stdout", "both"])
def test_a_signal_ends_it_though_nobody_reads(
    tiny_bundle: Path, number: signal.Signals, code: int, streams: str
) -> None:
    """The pipe is full, and a write to it waits."""
    command = [sys.executable, "-m", "dycoke_edge", "watch", str(tiny_bundle), "test://?fps=30", "--json"]
    command += ["--realtime", *map(str, ALWAYS), "--ask", "What?", "--max-new-tokens", "4", "--window", "0.2"]
    command += ["--every", "0.2", "--fps", "10"]
    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 4096)
    stderr = writing if streams == "both" else subprocess.DEVNULL
    process = subprocess.Popen(command, cwd=ROOT, stdout=writing, stderr=stderr)
    try:
        wait_until(process, lambda: not select.select([], [writing], [], 0)[1])
        sleep(0.5)  # until it waits in a write
        process.send_signal(number)
        assert process.wait(20) == code
    finally:
        process.kill()
        process.wait()
        os.close(reading)
        os.close(writing)


def test_a_reader_that_leaves_ends_it(tiny_bundle: Path) -> None:
    process = start("watch", tiny_bundle, "test://?fps=10", "--realtime", "--ask", "What?", *SHORT, "--json")
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(60) == 141
    assert process.stderr is not None and b"Traceback" not in process.stderr.read()
    process.stderr.close()


# Secrets


def test_a_password_comes_from_the_environment_and_goes_nowhere(tiny_bundle: Path, tmp_path: Path) -> None:
    uri = f"rtsp://admin:{{DYCOKE_CAMERA_PASSWORD}}@127.0.0.1:{closed_port()}/stream?token={{DYCOKE_TOKEN}}"
    environment = os.environ | {"DYCOKE_CAMERA_PASSWORD": CANARY + "@/x", "DYCOKE_TOKEN": CANARY}
    for words in (("watch", tiny_bundle, uri, "--ask", "What?"), ("ask", tiny_bundle, uri, "What?")):
        command = [sys.executable, "-m", "dycoke_edge", *map(str, words)]
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        shown = Path(f"/proc/{process.pid}/cmdline").read_bytes()
        out, err = process.communicate(timeout=120)
        assert process.returncode in (2, 3) and CANARY not in out + err and CANARY.encode() not in shown


@pytest.mark.parametrize(
    "uri",
    [
        "rtsp://127.0.0.1:{PORT}/{DYCOKE_TOKEN}/x",
        "rtsp://127.0.0.1:{PORT}/x?key={DYCOKE_TOKEN}",
        "rtsp://127.0.0.1:{PORT}/x#{DYCOKE_TOKEN}",
        "rtsp://127.0.0.1:none/{DYCOKE_TOKEN}",
        "{DYCOKE_WHOLE}",
        "none/{DYCOKE_TOKEN}.mp4",
        "file:///none/{DYCOKE_TOKEN}.mp4",
        "v4l2:///dev/{DYCOKE_TOKEN}",
        "csi://{DYCOKE_TOKEN}",
        "test://?{DYCOKE_TOKEN}",
        "test://?{DYCOKE_PAIR}",
        "test://?fps={DYCOKE_TOKEN}",
        "gst://{DYCOKE_TOKEN}",
        "{DYCOKE_TOKEN}://x",
    ],
)
def test_values_of_the_environment_are_never_shown(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch, tiny_bundle: Path, uri: str
) -> None:
    """In any part of a URI, and whatever fails."""
    port = str(closed_port())
    monkeypatch.setenv("DYCOKE_TOKEN", CANARY)
    monkeypatch.setenv("DYCOKE_PAIR", f"{CANARY}=1")
    monkeypatch.setenv("DYCOKE_WHOLE", f"rtsp://127.0.0.1:{port}/{CANARY}/x")
    uri = uri.replace("{PORT}", port)
    for words in (("probe", uri), ("watch", tiny_bundle, uri, "--ask", "x"), ("ask", tiny_bundle, uri, "x")):
        outcome = here(capsys, *words, "--allow-gst")
        assert outcome.code in (2, 3) and CANARY not in outcome.out + outcome.err


def test_what_works_shows_no_value_either(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch, tiny_bundle: Path, tmp_path: Path
) -> None:
    clip = tmp_path / f"{CANARY}.avi"
    clip.write_bytes(CLIP.read_bytes())
    monkeypatch.setenv("DYCOKE_CLIP", CANARY)
    uri = f"{tmp_path}/{{DYCOKE_CLIP}}.avi"
    probed = here(capsys, "probe", uri, "--json")
    assert json.loads(probed.out)["uri"] == uri and CANARY not in probed.err
    watched = here(capsys, "watch", tiny_bundle, uri, "--ask", "x", "--json")
    assert watched.code == 0 and CANARY not in watched.out + watched.err


@pytest.mark.parametrize(
    "words",
    [
        ("watch", "BUNDLE", f"rtsp://admin:{CANARY}@h/x", f"rtsp://admin:{CANARY}@h/y", "--ask", "x"),
        ("watch", "BUNDLE", f"exec://admin:{CANARY}@h/x", "--ask", "x"),
        ("watch", "BUNDLE", f"rtsp://admin:{CANARY}@h:port/x", "--ask", "x"),
        ("probe", f"rtsp://admin:{CANARY}@h:0/x"),
        ("ask", "BUNDLE", f"http://admin:{CANARY}@h/x", "x"),
    ],
)
def test_no_mistake_shows_a_password(capsys: Capture, tiny_bundle: Path, words: tuple[str, ...]) -> None:
    outcome = here(capsys, *(tiny_bundle if word == "BUNDLE" else word for word in words))
    assert outcome.code == 2 and CANARY not in outcome.out + outcome.err


def test_help_tells_how_to_keep_a_password_out_of_ps(capsys: Capture) -> None:
    with pytest.raises(SystemExit):
        here(capsys, "watch", "--help")
    assert "{DYCOKE_NAME}" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("rtsp://{DYCOKE_USER}:{DYCOKE_PASS}@h/", "rtsp://me:p@ss/{x}@h/"),
        ("{HOME} {DYCOKE_} {dycoke_user} {}", "{HOME} {DYCOKE_} {dycoke_user} {}"),
        ("plain", "plain"),
    ],
)
def test_only_our_own_variables_are_filled_in(text: str, expected: str) -> None:
    assert fill(text, {"DYCOKE_USER": "me", "DYCOKE_PASS": "p@ss/{x}", "HOME": "/root"}) == expected


# ask


def test_ask_about_a_file_is_what_run_says(capsys: Capture, tiny_bundle: Path) -> None:
    asked = here(capsys, "ask", tiny_bundle, CLIP, "What?", "--max-new-tokens", 6, "--num-frames", 8)
    ran = here(
        capsys, "run", tiny_bundle, "--video", CLIP, "--prompt", "What?", "--max-new-tokens", 6, "--num-frames", 8
    )
    assert asked.code == ran.code == 0 and asked.out == ran.out != ""


def test_ask_a_camera(capsys: Capture, tiny_bundle: Path) -> None:
    outcome = here(
        capsys,
        "ask",
        tiny_bundle,
        "test://?fps=10",
        "What?",
        "--window",
        2,
        "--fps",
        2,
        "--max-new-tokens",
        4,
        "--json",
    )
    assert outcome.code == 0, outcome.err
    (answer,) = events(outcome.out)
    assert answer["status"] == "ok" and answer["text"] and answer["stats"]["frames"] == 4
    assert answer["window"][1] - answer["window"][0] == pytest.approx(1.5)


def test_ask_a_camera_that_is_not_there(capsys: Capture, tiny_bundle: Path) -> None:
    outcome = here(capsys, "ask", tiny_bundle, f"rtsp://127.0.0.1:{closed_port()}/x", "What?")
    assert outcome.code == 3 and "refused" in outcome.err and outcome.out == ""


# probe


def test_probe_says_what_a_file_sends(capsys: Capture) -> None:
    outcome = here(capsys, "probe", CLIP, "--json")
    assert outcome.code == 0, outcome.err
    (facts,) = events(outcome.out)
    assert facts["codec"] == "h264" and facts["frames"] > 10 and facts["pts_breaks"] == 0 and not facts["live"]
    shown = here(capsys, "probe", CLIP)
    assert shown.code == 0 and re.search(r"^codec +h264$", shown.out, re.MULTILINE)


def test_probe_of_what_is_not_there(capsys: Capture) -> None:
    outcome = here(capsys, "probe", f"rtsp://admin:{CANARY}@127.0.0.1:{closed_port()}/x")
    assert outcome.code == 3 and "refused" in outcome.complaint and CANARY not in outcome.err


# The screen


def test_a_patient_screen_makes_the_model_wait_and_any_other_drops_the_oldest() -> None:
    quick = Screen(patient=False)
    for _ in range(CAPACITY + 5):
        quick(EVENT)
    assert quick.dropped == 5 and len(quick.take(0)) == CAPACITY
    patient = Screen(patient=True)
    for _ in range(CAPACITY):
        patient(EVENT)
    late = threading.Thread(target=patient, args=(EVENT,))
    late.start()
    late.join(0.05)
    assert late.is_alive()
    assert len(patient.take(0)) == CAPACITY
    late.join(30)
    assert patient.take(30) == [EVENT] and patient.dropped == 0
    patient.hurry()
    for _ in range(CAPACITY + 1):
        patient(EVENT)
    assert patient.dropped == 1


# A real watcher


def test_several_real_cameras_with_questions(tiny_bundle: Path, tmp_path: Path) -> None:
    llm = VideoLLM.load(tiny_bundle)
    cameras = [
        Camera("pattern", "test://?fps=20&motion=3", fps=4, window_s=2, every_s=1, realtime=True),
        Camera("clip", str(CLIP), fps=2, window_s=2, every_s=1, prompt="What?", max_new_tokens=4),
    ]
    rules = [Rule("always", "Is it?", threshold=0.5, clear_threshold=0.1, min_mass=0)]
    path = tmp_path / "events.jsonl"
    with CameraWatcher(llm, cameras, rules, JsonlSink(path)) as watcher:
        wait(lambda: watcher.status()["cameras"]["clip"]["windows"] == 7)
        wait(lambda: watcher.status()["cameras"]["pattern"]["windows"] >= 2)
        whole, part = (watcher.ask("pattern", "What is it?", last_s) for last_s in (None, 0.6))
        assert whole.status == part.status == "ok" and whole.text and part.text
        assert whole.stats.frames > part.stats.frames >= 1 and whole.window is not None
        pieces = list(watcher.ask_stream("pattern", "What is it?"))
        assert pieces and all(piece.token is not None for piece in pieces)
        assert watcher.generate("Say something", video=CLIP).stats.frames == 32
        snapshot = watcher.snapshot("pattern")
        assert snapshot is not None and snapshot.image.shape == (llm.bundle.model.image_size,) * 2 + (3,)
        status = watcher.status()
        assert status["ready"] and status["failures"] == 0
    found = events(path.read_text(encoding="utf-8"))
    assert [event["id"] for event in found] == [event.id for event in watcher.events.since()]
    news = {event["camera"] for event in found if event["type"] == "alert" and event["phase"] == "new"}
    ends = {event["camera"] for event in found if event["type"] == "alert" and event["phase"] == "end"}
    assert news == ends == {"pattern", "clip"}


def test_a_window_that_does_not_fit_is_refused_at_once(tiny_bundle: Path) -> None:
    llm = VideoLLM.load(tiny_bundle, kv_capacity=600)
    big = Camera("big", "test://", fps=30, window_s=10)
    with pytest.raises(UsageError, match="--kv-capacity"):
        CameraWatcher(llm, [big]).start()
    with CameraWatcher(llm) as watcher:
        with pytest.raises(UsageError, match="--kv-capacity"):
            watcher.add(big)
        assert watcher.cameras == {}
        watcher.add(Camera("small", "test://?fps=5", fps=2, window_s=2))
        wait(lambda: watcher.window("small"))
        watcher.remove("small")
