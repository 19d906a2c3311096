"""CameraWatcher: cameras, rules and one model, inside somebody's application."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from dycoke_edge.config import Camera, Clip, Compression, Rule, Sampling
from dycoke_edge.runtime.camera.answers import Answer, Window
from dycoke_edge.runtime.camera.events import Event, EventRing, Sink
from dycoke_edge.runtime.pipeline import Piece, Reply, Source, VideoLLM

Handler = Callable[[Event], None] | Sink
SAMPLING, COMPRESSION, CLIP = Sampling(), Compression(), Clip()


class CameraWatcher:
    """Watches cameras with one model. While it runs, every call of `llm` belongs to its thread: ask through here.

    `on_event` takes sinks, or plain functions of an event, which are called in a thread of their own each.
    Every method may be called from any thread. `with watcher:` starts and stops it.
    """

    events: EventRing  # the latest events; `events.since(last_id, timeout)` is for streams that resume

    def __init__(
        self,
        llm: VideoLLM,
        cameras: Sequence[Camera],
        rules: Sequence[Rule] = (),
        on_event: Handler | Sequence[Handler] = (),
        compression: Compression = COMPRESSION,
        waiting: int = 8,  # questions that may wait for the model; one more is refused with BusyError
    ) -> None:
        raise NotImplementedError

    def start(self) -> CameraWatcher: ...

    def join(self, timeout: float | None = None) -> bool:
        """Wait until every camera is a file that has ended, or until stopped; False when `timeout` came first."""
        ...

    def stop(self, timeout: float = 4.0) -> None:
        """Legal in every state, also twice. Open alerts get an `end`, sinks hand on what they hold."""

    def pause(self, camera_id: str) -> None: ...

    def resume(self, camera_id: str) -> None: ...

    def add(self, camera: Camera) -> None:
        """UsageError if there is one with this id."""

    def remove(self, camera_id: str) -> None:
        """UsageError if there is none with this id; its open alerts end."""

    def add_rule(self, rule: Rule) -> None: ...

    def remove_rule(self, rule_id: str) -> None: ...

    @property
    def cameras(self) -> dict[str, Camera]: ...  # type: ignore[empty-body]

    @property
    def rules(self) -> dict[str, Rule]: ...  # type: ignore[empty-body]

    def ask(
        self,
        camera_id: str,
        question: str,
        last_s: float | None = None,
        sampling: Sampling = SAMPLING,
        timeout: float | None = None,
    ) -> Answer:
        """Ask about the window of a camera, or its `last_s` seconds, which must fit in it."""
        ...

    def ask_stream(
        self, camera_id: str, question: str, last_s: float | None = None, sampling: Sampling = SAMPLING
    ) -> Iterator[Piece]:
        """The same piece by piece. Raises at once: UsageError, BusyError, StaleError."""
        ...

    def window(self, camera_id: str) -> Window | None:
        """The times of the oldest and newest frame that a question would be about."""

    def generate(
        self,
        prompt: str,
        video: Source | None = None,
        image: Source | None = None,
        compression: Compression = COMPRESSION,
        sampling: Sampling = SAMPLING,
        clip: Clip = CLIP,
        timeout: float | None = None,
    ) -> Reply:
        """As VideoLLM.generate, on the model thread, in the same line as `ask`; BusyError when it is full,
        BusyError too when `timeout` seconds passed before the answer was whole."""
        ...

    def generate_stream(
        self,
        prompt: str,
        video: Source | None = None,
        image: Source | None = None,
        compression: Compression = COMPRESSION,
        sampling: Sampling = SAMPLING,
        clip: Clip = CLIP,
    ) -> Iterator[Piece]:
        """As VideoLLM.stream. BusyError is raised here, at once; what fails later, by the iterator."""
        ...

    def snapshot(self, camera_id: str) -> Any:
        """The newest Frame of a camera, None before the first."""

    def status(self) -> dict[str, Any]:
        """Numbers for metrics and health; ids, no URIs with passwords:

        {"state": "new|running|stopped", "ready": bool, "reasons": [str], "model": str, "backend": str,
         "questions": {"waiting": int, "answered": int, "refused": int, "failed": int},
         "failures": int, "failures_in_a_row": int,
         "events": {"alert/confirmed": int, ...}, "seconds": {stage: {"count": int, "sum": float}},
         "cameras": {id: {"state", "since", "uri" (redacted), "error", "fps", "frames", "dropped_frames": {reason: n},
             "reconnects": {reason: n}, "windows", "dropped_windows": {reason: n}, "failed_windows",
             "last_frame_time" (UTC), "last_frame_age_s", "answer_age_s", "frames_gated", "vision_tokens_in",
             "vision_tokens_kept", "memory_frames", "kv_bytes", "text", "text_time",
             "alerts": {rule_id: {"on": bool, "score": float | None, "verdict": str | None, "since": float | None}}}},
         "sinks": [{"name", "queued", "delivered", "dropped", "failures", "error"}]}"""
        ...
