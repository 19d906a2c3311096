"""A camera's lane: from its frames to windows, from windows to scores, answers and events, one unit of work at a time.

All of it runs in the thread that owns the model, except where a method says otherwise. It starts no thread.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from dycoke_edge.config import Compression, LiveSpec, Sampling
from dycoke_edge.config_camera import Camera, Rule
from dycoke_edge.errors import ReplacedError, UsageError
from dycoke_edge.runtime.camera.alerts import Alerts
from dycoke_edge.runtime.camera.answers import WatchResult
from dycoke_edge.runtime.camera.counts import Counts
from dycoke_edge.runtime.camera.events import TimeSource
from dycoke_edge.runtime.camera.frame import Frame
from dycoke_edge.runtime.camera.hub import Hub
from dycoke_edge.runtime.camera.look import Look, look_at
from dycoke_edge.runtime.camera.model import Model
from dycoke_edge.runtime.camera.recent import Recent
from dycoke_edge.runtime.camera.rules import Finding, judge
from dycoke_edge.runtime.camera.status import CameraStatus
from dycoke_edge.runtime.conversation import Asked
from dycoke_edge.runtime.reply import Piece


class Reader(Protocol):
    """What a lane needs of a CameraReader."""

    def take(self, timeout: float = 0.0) -> Frame | None: ...

    @property
    def ended(self) -> bool: ...

    def status(self) -> CameraStatus: ...


class Lane:
    """One camera. `rules` is asked at every window; `lossless`: every frame is looked at, however long it takes;
    `hurry` says that an answer should be cut short."""

    def __init__(
        self,
        camera: Camera,
        reader: Reader,
        llm: Model,
        hub: Hub,
        rules: Callable[[], Sequence[Rule]],
        lossless: bool,
        compression: Compression = Compression(),  # noqa: B008 - frozen
        live: LiveSpec = LiveSpec(),  # noqa: B008
        hurry: Callable[[bool], bool] = lambda again: False,
        on_result: Callable[[WatchResult], None] = lambda result: None,
    ) -> None:
        self.camera, self.reader, self.lossless = camera, reader, lossless
        self.counts = Counts()
        self.alerts = Alerts(camera.id, hub, rules)
        self.recent = Recent(camera, llm, compression, live, hub.clock)
        self.finished = False
        self.rules = rules
        self._hub, self._hurry, self._on_result = hub, hurry, on_result
        self._tasks: deque[Callable[[], None]] = deque()
        self._look_now: Look | None = None  # with tasks left
        self._scoring: Rule | None = None  # the rule that is asked now
        self._next: Frame | None = None  # of a file, while what comes before it is looked at
        self._passed = 0  # windows dropped since the last look
        self._overrun = 0  # frames that the reader had dropped when a window was last due
        self._hurried = False  # the last answer was cut short for a question
        self._forget = False
        self._reported = -math.inf
        self._lost: str | None = None  # why the model will never answer again

    def work(self) -> bool:
        """One unit of work, False if there was none. A failure is an event; that of a rule costs its score, any other
        the window. Once the model's bundle was replaced, frames are dropped."""
        try:
            return self.unit() if self._lost is None else self._drop()
        except ReplacedError as error:
            self._lose(error)
            return True
        except BaseException as error:  # one camera's trouble is not the others', nor one rule's; so is a panic's
            if self._scoring is None:
                self._failed(error)
            else:
                self._rule_failed(self._scoring, error)
            return True

    def unit(self) -> bool:
        """As `work`, but raises what the model raises."""
        if self._forget:
            self._forget = False
            self._tasks.clear()
            self._look_now = self._next = None
            self.recent.forget()
        if self.finished:
            return False
        if self._tasks:
            self._tasks.popleft()()
            self._close_look()
            return True
        frame = self._next = self._next or self.reader.take()
        if frame is None:
            return self._idle()
        if self.lossless and self._before(frame):
            return True
        self._next = None
        self._push(frame)
        return True

    def forget(self) -> None:
        """Begin with an empty window at the next unit. For any thread."""
        self._forget = True

    def ask(self, question: Asked, last_s: float | None, sampling: Sampling) -> Iterator[Piece]:
        """Answer about the window; raises StaleError when there is no recent video."""
        self.check_fresh()
        return self.recent.ask(question, last_s, sampling)

    def check_fresh(self) -> None:
        """Raise StaleError when there is no recent video, ReplacedError when the model is lost. For any thread."""
        if self._lost is not None:
            raise ReplacedError(self._lost)
        self.recent.check_fresh(self.reader.status().state)

    @property
    def _time_source(self) -> TimeSource:
        return "pts" if self.lossless else "receive"

    def _before(self, frame: Frame) -> bool:
        """Do what comes before the next frame of a file: look at what is left of its segment, or at what is still on
        the screen when a window falls due. False if there is nothing to do."""
        if self.recent.parts(frame):
            self._begin_look()
            return True
        held = self.recent.held(frame)
        if held is not None:
            self._push(held)
        return held is not None

    def _push(self, frame: Frame) -> None:
        began = self._now()
        due, lost = self.recent.push(frame, self.lossless)
        self._hub.took("push", self._now() - began)
        self._hub.worked("push")
        newest = self.recent.view.newest
        assert newest is not None
        self.counts.frames += 1
        self.counts.gated += newest.gated
        self.counts.tokens_in += newest.tokens_in
        self.counts.tokens_kept += newest.tokens_kept
        self.counts.dropped["segment"] += lost
        if due:
            self._missed(due - 1)
        waiting = self.recent.schedule.waiting
        if waiting and (self.lossless or waiting > 1):  # live: the newest window wins, but not without end
            self._begin_look()

    def _missed(self, windows: int) -> None:
        """Windows in which no frame came: the model was slow if the reader had to drop frames meanwhile."""
        overrun = self.reader.status().dropped.get("overrun", 0)
        if windows and overrun > self._overrun:
            self.counts.dropped["slow"] += windows
            self._passed += windows
        else:
            self.counts.dropped["no_frames"] += windows
        self._overrun = overrun

    def _idle(self) -> bool:
        """No frame waits: look at the newest window, or end."""
        if self.recent.schedule.waiting:
            self._begin_look()
            return True
        if self.reader.ended and self.reader.status().state in ("ended", "stopped"):
            if self.recent.schedule.fresh and len(self.recent.view):
                self._begin_look()  # what is left of a file
                return True
            self.finished = True
            self.alerts.close("the video ended")
            return True
        newest = self.recent.view.newest
        if newest and self.alerts.any_open and self._now() - newest.came > self.camera.stale_s and not self.lossless:
            self.alerts.close("no recent video")
        return False

    def _begin_look(self) -> None:
        passed = self.recent.schedule.take()
        self.counts.dropped["slow"] += passed
        look = look_at(self.recent.view, self.recent.live.num_tokens, self._passed + passed)
        self._passed = 0
        self.counts.windows += 1
        self._look_now = look
        for rule in self.rules():
            self._tasks.append(lambda rule=rule: self._score(rule, look))  # type: ignore[misc]
        if self.camera.prompt is not None:
            self._tasks.append(lambda: self._answer(look))
        self._close_look()

    def _score(self, rule: Rule, look: Look) -> None:
        began, self._scoring = self._now(), rule
        found = judge(rule, self.recent.live.score(rule.prompt))
        self._scoring = None
        self._took(look, "score", began)
        if found.score is not None:
            look.scores[rule.id] = found.score
        self.alerts.window(rule, found, look, self._time_source)

    def _answer(self, look: Look) -> None:
        """Answer the camera's own prompt. A question that waits cuts it short, but not twice in a row; a file's answer
        begins again after it, a camera's window is given up."""
        assert self.camera.prompt is not None
        began, parts = self._now(), list[str]()
        pieces = self.recent.live.ask(self.camera.prompt, Sampling(max_new_tokens=self.camera.max_new_tokens))
        for piece in pieces:
            parts.append(piece.text)
            if self._hurry(self._hurried):
                pieces.close()  # type: ignore[attr-defined]
                self._hurried = True
                if self.lossless:
                    self._tasks.append(lambda: self._answer(look))  # once more, after the question
                else:
                    self.counts.dropped["asked"] += 1
                    self._passed += 1
                return
        self._hurried = False
        self._took(look, "answer", began)
        look.text = "".join(parts)
        self.counts.text, self.counts.text_time = look.text, look.window[1]
        self._emit_description(look)

    def _close_look(self) -> None:
        look = self._look_now
        if look is None or self._tasks:
            return
        self._look_now = None
        self.recent.extent.look(look.start)
        age = self._now() - look.came
        self.counts.answer_age = age
        self._hub.took("answer_age", age)
        self._on_result(
            WatchResult(
                look.text,
                *((look.start, look.end) if self.lossless else look.window),
                look.frames,
                look.tokens_in,
                look.tokens_kept,
                look.dropped,
                look.scores,
                look.latency_ms,
            )
        )

    def _emit_description(self, look: Look) -> None:
        self._hub.emit(
            "description",
            "new",
            self.camera.id,
            start_time=look.window[0],
            end_time=look.window[1],
            time_source=self._time_source,
            text=look.text,
            frames=look.frames,
            vision_tokens_in=look.tokens_in,
            vision_tokens_kept=look.tokens_kept,
            latency_ms=dict(look.latency_ms),
            dropped_windows=look.dropped,
        )

    def _rule_failed(self, rule: Rule, error: BaseException) -> None:
        """Go on with the rest of the window: a question that failed has changed nothing of what the model remembers."""
        look, self._scoring = self._look_now, None
        assert look is not None
        self.counts.failures += 1
        reason = self._hub.failed(error)
        self.alerts.window(rule, Finding("unknown", unknown="failed", reason=reason), look, self._time_source)
        self._report(f"rule {rule.id}: {reason}")
        self._close_look()

    def _failed(self, error: BaseException) -> None:
        """Give the window up. What the model remembers may be half-written, unless it refused to begin."""
        stage = "push" if self._look_now is None else "answer"
        self._tasks.clear()
        if stage == "push":
            self._next = None
        self._look_now = None
        self.counts.failures += 1
        self.counts.dropped["failed"] += 1
        self._passed += 1
        reason = self._hub.failed(error, stage)
        if not isinstance(error, UsageError):
            try:
                self.recent.forget()
            except BaseException as more:
                reason = f"{reason}; and then {self._hub.failed(more)}"
        self._report(reason)

    def _lose(self, error: ReplacedError) -> None:
        """Give everything up, and say so once."""
        self._lost = str(error)
        self._tasks.clear()
        self._look_now = self._next = self._scoring = None
        self.counts.failures += 1
        self.alerts.close(ReplacedError.brief)
        self._hub.emit("error", "new", self.camera.id, reason=self._hub.failed(error))

    def _drop(self) -> bool:
        """Take what the reader has, so that a file comes to its end."""
        if self.finished:
            return False
        if self.reader.take() is not None:
            return True
        self.finished = self.reader.ended and self.reader.status().state in ("ended", "stopped")
        return self.finished

    def _report(self, reason: str) -> None:
        """An event, but not one a frame."""
        if self._now() - self._reported >= self.camera.every_s:
            self._reported = self._now()
            self._hub.emit("error", "new", self.camera.id, reason=reason)

    def _took(self, look: Look, stage: str, began: float) -> None:
        seconds = self._now() - began
        look.took(stage, seconds)
        self._hub.took(stage, seconds)
        self._hub.worked(stage)

    def _now(self) -> float:
        return self._hub.clock.monotonic()
