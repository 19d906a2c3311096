"""A camera application in one file: two cameras, two rules, one model, and a question in between.

make demo                                                   # once: the model that is here as a bundle
.venv/bin/python -m examples.camera_app                     # on a drawn clip, twice
.venv/bin/python -m examples.camera_app BUNDLE rtsp://user:password@camera/stream 0   # 0 is /dev/video0
"""

from __future__ import annotations

import sys
from pathlib import Path

from dycoke_edge import Camera, CameraWatcher, Event, Rule, VideoLLM
from dycoke_edge.runtime.sinks.jsonl import JsonlSink

BUNDLE = "build/tiny-bundle"
URIS = ["examples/scene.mp4"] * 2
PROMPT, QUESTION = "How many objects are there?", "What came or left in the last frames?"

RULES = [  # that model knows drawn scenes only; ask another one about people, smoke, open doors
    Rule("moving", "Is anything moving?", threshold=0.6, clear_threshold=0.4, consecutive=2, cooldown_s=30),
    Rule("triangle", "Does the yellow triangle enter?", alert_type="intrusion", severity="warning"),
]


def on_event(event: Event) -> None:
    """Called in a thread of its own, one event after the other; nothing in here can hold the model up."""
    if event.type == "alert":
        score = event.reason if event.score is None else f"yes at {event.score:.0%}"
        print(f"{event.camera}: alert {event.rule_id} {event.phase}, {event.verdict}, {score}")
    elif event.type == "description":
        share = event.vision_tokens_kept / event.vision_tokens_in
        print(f"{event.camera}: {event.text!r} ({event.frames} frames, {share:.0%} of their tokens)")
    else:
        print(f"{event.camera}: {event.state or event.type} {event.reason or ''}")


def main(bundle: str = BUNDLE, *uris: str) -> None:
    """Watch until the files end, or for ever."""
    cameras = [
        Camera(
            f"camera{number}",
            uri,
            fps=2,
            window_s=4,
            every_s=2,
            prompt=PROMPT,
            max_new_tokens=16,
        )
        for number, uri in enumerate(uris or URIS, 1)
    ]
    log = JsonlSink(Path("build/events.jsonl"))
    with CameraWatcher(VideoLLM.load(bundle), cameras, RULES, on_event=[on_event, log]) as watcher:
        asked = False
        while not watcher.join(timeout=0.05):  # a short file is seen in less than a second
            if not asked and watcher.window("camera1"):
                answer = watcher.ask("camera1", QUESTION)  # rules and alerts go on meanwhile
                print(
                    f"asked: {answer.text!r}" if answer.status == "ok" else f"asked: {answer.status}, {answer.reason}"
                )
                asked = True
        status = watcher.status()
    for name, camera in status["cameras"].items():
        kept, came = camera["vision_tokens_kept"], camera["vision_tokens_in"]
        print(f"{name}: {camera['windows']} windows, {kept} of {came} tokens kept, dropped {camera['dropped_windows']}")


if __name__ == "__main__":
    main(*sys.argv[1:])
