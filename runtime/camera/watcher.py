"""CameraWatcher: cameras, rules and one model, inside somebody's application."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dycoke_edge.config import Compression, LiveSpec
from dycoke_edge.config_camera import Camera, ReaderSpec, Rule
from dycoke_edge.errors import EngineError, ReplacedError, UsageError
from dycoke_edge.runtime.camera.asking import COMPRESSION, Asking
from dycoke_edge.runtime.camera.clock import SYSTEM, Clock
from dycoke_edge.runtime.camera.events import EventRing
from dycoke_edge.runtime.camera.frame import Frame
from dycoke_edge.runtime.camera.hub import Hub
from dycoke_edge.runtime.camera.post import Post
from dycoke_edge.runtime.camera.questions import check_camera, check_rule
from dycoke_edge.runtime.camera.reader import CameraReader
from dycoke_edge.runtime.camera.status import CameraStatus
from dycoke_edge.runtime.camera.turns import Question, Turns
from dycoke_edge.runtime.exclusive import Exclusive
from dycoke_edge.runtime.pipeline import VideoLLM
from dycoke_edge.runtime.reply import Piece
from dycoke_edge.runtime.sinks.bounded import deadline
from dycoke_edge.runtime.sinks.handlers import Handler, as_sinks

READING, LIVE = ReaderSpec(), LiveSpec()
STUCK_S = 60.0  # a unit of work this long means that the model does not answer any more


class CameraWatcher(Asking):
    """Watches cameras with one model. While it runs, every call of `llm` belongs to its thread: ask through here.

    `on_event` takes one or several of: a sink, a function of an event, which is called in a thread of its own, or the
    path of a file of JSON Lines. `waiting` questions may stand in line for the model. `reading` and `live` hold
    time-outs, thresholds and the like for all cameras; size, fps, buffers, memory and realtime are the cameras' own.
    Every method may be called from any thread.
    `with watcher:` starts and stops it. A watcher runs once. `on_panic` is told, in the model's thread, when a library
    of the model raised what is no Exception; the thread goes on.
    """

    def __init__(
        self,
        llm: VideoLLM,
        cameras: Sequence[Camera] = (),
        rules: Sequence[Rule] = (),
        on_event: Handler | Sequence[Handler] = (),
        compression: Compression = COMPRESSION,
        waiting: int = 8,
        reading: ReaderSpec = READING,
        live: LiveSpec = LIVE,
        clock: Clock = SYSTEM,
        make_reader: Callable[..., CameraReader] = CameraReader,
        on_panic: Callable[[BaseException], object] = lambda error: None,
    ) -> None:
        self._llm, self._clock, self._compression = llm, clock, compression
        self._reading, self._live, self._make_reader = reading, live, make_reader
        self._hub = Hub(llm.bundle.path.name, llm.spec.provider, as_sinks(on_event), clock)
        self._turns = Turns(lambda: self._lanes, waiting, clock)
        self._turns.on_failure = self._hub.failed
        self._hub.on_panic = on_panic
        self._lock = Exclusive("this CameraWatcher was made")  # over all below
        self._posts: dict[str, Post] = {}
        self._lanes: tuple[Post, ...] = ()  # the same for the model's thread, which waits for nobody
        self._rules: dict[str, Rule] = {}
        self._state = "new"
        self._over = threading.Event()
        for camera in cameras:
            self.add(camera)
        for rule in rules:
            self.add_rule(rule)

    def start(self) -> CameraWatcher:
        """Begin. UsageError if the KV buffer cannot hold a camera's window, or when started before."""
        with self._lock:
            if self._state != "new":
                raise UsageError("a CameraWatcher starts once; make a new one")
            for post in self._posts.values():
                post.open()
            self._state = "running"
            for post in self._posts.values():
                post.begin()
            self._turns.start()
        for sink in self._hub.sinks:
            bind = getattr(sink, "bind", None)
            if bind is not None:
                bind(self)
        return self

    def join(self, timeout: float | None = None) -> bool:
        """Wait until every camera is a file that has ended, or until stopped; False when `timeout` came first."""
        self._lock.check_process()
        left = deadline(3e7 if timeout is None else timeout)
        while not self._over.wait(min(0.1, left())):
            if self._state == "running" and all(post.finished for post in self._lanes):
                return True
            if left() == 0:
                return False
        return True

    def dismiss(self) -> None:
        """Answer nobody any more: who waits for an answer gets an UnavailableError now. For a server that ends."""
        self._turns.dismiss()

    def stop(self, timeout: float = 4.0) -> None:
        """Legal in every state, also twice. Open alerts get an `end`, sinks hand on what they hold; what still runs
        after `timeout` seconds is left to itself."""
        left = deadline(timeout)
        if self._lock.is_forked:
            return  # nothing of it runs here
        with self._lock:
            if self._state == "stopped":
                return
            self._state, posts = "stopped", list(self._posts.values())
        for post in posts:
            post.close("the watcher was stopped")
        readers = [threading.Thread(target=post.let_go, args=(left() / 2,), daemon=True) for post in posts]
        for thread in readers:
            thread.start()
        self._turns.stop(left() / 2)
        for thread in readers:
            thread.join(left() / 2)
        self._hub.close(left())
        self._over.set()

    def __enter__(self) -> CameraWatcher:
        return self.start()

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def pause(self, camera_id: str) -> None:
        """Let a camera go until `resume`; its open alerts end."""
        self._post(camera_id).pause()

    def resume(self, camera_id: str) -> None:
        """Watch a paused camera again."""
        self._post(camera_id).resume()

    def add(self, camera: Camera) -> None:
        """Watch one more. UsageError if there is one with this id, no room for its window, a question that cannot be
        asked, or if it is removed again before it is there."""
        check_camera(self._check, camera)
        with self._lock:
            if camera.id in self._posts:
                raise UsageError(f"there is a camera {camera.id} already; remove it first or use another id")
            post = self._new_post(camera)
            self._posts[camera.id] = post  # holds the id while memory is taken
            if self._state != "running":
                self._lanes = (*self._lanes, post)
                return
        try:
            self._in_turn(post.open)
            with self._lock:
                if self._posts.get(camera.id) is not post:
                    raise UsageError(f"camera {camera.id} was removed while it was being added; add it again")
                self._lanes = (*self._lanes, post)
        except BaseException:
            self._drop(post)
            raise
        post.begin()  # does nothing if it was closed just now

    def remove(self, camera_id: str) -> None:
        """Watch it no more; its open alerts end. UsageError if there is none with this id."""
        with self._lock:
            post = self._post(camera_id)
            self._drop(post)
        post.close("the camera was removed")
        threading.Thread(target=post.let_go, daemon=True).start()

    def _drop(self, post: Post) -> None:
        """Take a camera off the lists; not another that has its id by now."""
        with self._lock:
            if self._posts.get(post.camera.id) is post:
                del self._posts[post.camera.id]
            self._lanes = tuple(other for other in self._lanes if other is not post)

    def add_rule(self, rule: Rule) -> None:
        """Ask one more question of every window. UsageError if there is one with this id, or if it cannot be asked."""
        self.check_rule(rule)
        with self._lock:
            for known in [self._rules, *({own.id: own for own in post.camera.rules} for post in self._posts.values())]:
                if rule.id in known:
                    raise UsageError(f"there is a rule {rule.id} already; remove it first or use another id")
            for name in rule.cameras:
                self._post(name)
            self._rules = {**self._rules, rule.id: rule}

    def check_rule(self, rule: Rule) -> None:
        """UsageError if the model could not be asked this."""
        check_rule(self._check, rule)

    def remove_rule(self, rule_id: str) -> None:
        """Ask it no more; its open alerts end. UsageError if there is none with this id."""
        with self._lock:
            if rule_id not in self._rules:
                raise UsageError(f"there is no rule {rule_id}; use one of: {', '.join(self._rules) or 'none is set'}")
            self._rules = {name: rule for name, rule in self._rules.items() if name != rule_id}
            posts = list(self._posts.values())
        for post in posts:
            post.lane.alerts.close("the rule was removed", rule_id)

    def when_replaced(self, tell: Callable[[str], object]) -> None:
        """Have a function be told once, with the reason and in any thread, that the model's bundle was replaced."""
        self._hub.on_replaced = tell

    def check_bundle(self) -> None:
        """ReplacedError if the model's bundle is not what it was any more; counted once."""
        try:
            self._llm.bundle.check_same()
        except ReplacedError as error:
            self._hub.failed(error)
            raise

    @property
    def cameras(self) -> dict[str, Camera]:
        """By id."""
        with self._lock:
            return {name: post.camera for name, post in self._posts.items()}

    @property
    def rules(self) -> dict[str, Rule]:
        """By id, without those that a camera brought along."""
        return self._rules

    @property
    def compression(self) -> Compression:
        """What the cameras' frames are compressed with."""
        return self._compression

    @property
    def events(self) -> EventRing:
        """The latest events; `events.since(last_id, timeout)` is for streams that resume."""
        return self._hub.events

    def camera_status(self, camera_id: str) -> CameraStatus:
        """What the reader of a camera says of it."""
        return self._post(camera_id).reader.status()

    def snapshot(self, camera_id: str) -> Frame | None:
        """The newest frame of a camera that the model was given, None before the first."""
        return self._post(camera_id).snapshot()

    def picture(self, camera_id: str, width: int) -> NDArray[np.uint8] | None:
        """The camera's newest picture in its own shape, uint8 [H, W, 3] and at most `width` pixels wide, None before
        the first. The model may not have seen it yet."""
        return self._post(camera_id).reader.picture(width)

    def status(self) -> dict[str, Any]:
        """Numbers for metrics and health; ids, and no URI with a password:

        {"state": "new|running|stopped", "ready": bool, "reasons": [str], "model": str, "backend": str,
         "questions": {"waiting": int, "answered": int, "refused": int, "failed": int},
         "failures": int, "failures_in_a_row": int, "last_failure": str | None,
         "events": {"alert/confirmed": int, ...}, "seconds": {stage: {"count": int, "sum": float}},
         "cameras": {id: {"state", "since", "uri" (redacted), "error", "fps", "width", "height", "decoded_frames",
             "dropped_frames": {reason: n}, "reconnects": {reason: n}, "last_frame_age_s", "frames" (given to the
             model), "frames_gated", "video_s", "video_s_looked_at" (of these), "windows", "dropped_windows":
             {reason: n}, "failures", "vision_tokens_in", "vision_tokens_kept", "memory_frames", "kv_bytes",
             "answer_age_s", "last_frame_time" (UTC), "text", "text_time",
             "alerts": {rule_id: {"on": bool, "score", "mass", "verdict", "reason" (why it is unknown), "since",
             "suppressed", "unknown" (windows: {"mass" | "between" | "failed": n})}}}},
         "sinks": [{"name", "queued", "delivered", "dropped", "failures", "error"}]}
        """
        with self._lock:
            posts = dict(self._posts)
        turns, reasons = self._turns, self._unready()
        return {
            "state": self._state,
            "ready": not reasons,
            "reasons": reasons,
            "model": self._hub.model,
            "backend": self._hub.backend,
            "questions": {
                "waiting": turns.waiting,
                "answered": turns.answered,
                "refused": turns.refused,
                "failed": turns.failed,
            },
            "failures": self._hub.failures,
            "failures_in_a_row": self._hub.failures_in_a_row,
            "last_failure": self._hub.last_failure,
            "cameras": {name: post.status() for name, post in posts.items()},
            **self._hub.numbers(),
        }

    def _unready(self) -> list[str]:
        """Why nothing should be expected of it, empty if all is well. A camera that is away is no reason."""
        if self._state != "running":
            return [f"the watcher is {self._state}"]
        reasons = [] if self._turns.alive else ["the model's thread has ended"]
        if self._hub.replaced:
            reasons.append(ReplacedError.brief)
        if self._hub.failing:
            reasons.append(f"the model failed {self._hub.failures_in_a_row} times in a row: {self._hub.last_failure}")
        since = self._turns.busy_since
        if since is not None and self._clock.monotonic() - since > STUCK_S:
            reasons.append(f"the model has been at one thing for {self._clock.monotonic() - since:.0f} s")
        return reasons

    def _check(self, prompt: str, answers: tuple[str, ...]) -> None:
        self._llm.check_live(prompt, answers, self._live)

    def _new_post(self, camera: Camera) -> Post:
        def rules() -> list[Rule]:
            shared = [rule for rule in self._rules.values() if not rule.cameras or camera.id in rule.cameras]
            return [*camera.rules, *shared]

        twice = [rule.id for rule in camera.rules if rule.id in self._rules]
        if twice:
            raise UsageError(f"rule {twice[0]} of camera {camera.id} is there already; use another id")
        hub, turns = self._hub, self._turns
        how = (self._compression, turns.hurry, self._reading, self._live, self._make_reader)
        return Post(camera, self._llm, hub, rules, *how)

    def _post(self, camera_id: str) -> Post:
        with self._lock:
            post = self._posts.get(camera_id)
            known = ", ".join(self._posts) or "there is none"
        if post is None:
            raise UsageError(f"there is no camera {camera_id}; use one of: {known}")
        return post

    def _question(self, start: Callable[[], Iterator[Piece]]) -> Question:
        with self._lock:
            if self._state == "new":
                raise UsageError("the watcher was not started; call start() before asking")
        return self._turns.submit(Question(start))

    def _in_turn(self, function: Callable[[], object]) -> None:
        """Call a function in the model's thread, in line with the questions."""

        def run() -> Iterator[Piece]:
            function()
            yield from ()

        for _ in self._question(run).pieces():
            raise EngineError("a function that gives no pieces gave one")
