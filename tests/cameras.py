"""Stand-ins for what a watcher meets: a clock that tests move, and a model and cameras that go by it."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from dycoke_edge import CameraWatcher, VideoLLM
from dycoke_edge.config import Sampling
from dycoke_edge.config_camera import ReaderSpec
from dycoke_edge.runtime.camera.frame import Frame, SourceInfo
from dycoke_edge.runtime.camera.status import CameraStatus, State
from dycoke_edge.runtime.conversation import Asked
from dycoke_edge.runtime.reply import Piece, Reply
from dycoke_edge.runtime.scores import Scores
from dycoke_edge.runtime.stats import Stats

SIZE = 8


class FakeClock:
    """Stands still until it is moved."""

    def __init__(self, monotonic: float = 1000.0, utc: float = 1_790_000_000.0) -> None:
        self.now, self.offset = monotonic, utc - monotonic

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return self.now + self.offset

    def sleep(self, seconds: float, wake: threading.Event) -> bool:
        self.now += seconds
        return wake.is_set()


@dataclass
class Cost:
    """Seconds of the fake clock."""

    push: float = 0.0
    score: float = 0.0
    piece: float = 0.0


@dataclass(frozen=True)
class FakePushed:
    gated: bool = False
    tokens_in: int = 4
    tokens_kept: int = 2


@dataclass
class FakeLive:
    """Remembers times; says what `llm.says` says."""

    llm: FakeLLM
    memory: int
    times: deque[float] = field(default_factory=deque)
    cleared: int = 0
    nbytes: int = 100

    @property
    def num_tokens(self) -> int:
        return 2 * len(self.times)

    def push(self, image: NDArray[np.uint8], time: float | None = None) -> FakePushed:
        self.llm.spend("push")
        assert image.shape == (SIZE, SIZE, 3) and time is not None
        self.times.append(time)
        while len(self.times) > self.memory:
            self.times.popleft()
        return FakePushed()

    def forget_before(self, time: float) -> int:
        before = len(self.times)
        while self.times and self.times[0] < time:
            self.times.popleft()
        return before - len(self.times)

    def clear(self) -> None:
        self.times.clear()
        self.cleared += 1

    def ask(self, prompt: Asked, sampling: Sampling = Sampling()) -> Iterator[Piece]:  # noqa: B008
        return self.llm.speak(prompt, list(self.times))

    def score(self, prompt: str, answers: tuple[str, ...] = ("yes", "no")) -> Scores:
        self.llm.spend("score")
        self.llm.scored.append((prompt, tuple(self.times)))
        yes = self.llm.yes(prompt, list(self.times))
        return Scores({"yes": yes, "no": 1 - yes}, self.llm.mass(prompt))


class FakeLLM:
    """A VideoLLM that costs time on the fake clock. `yes` gives the probability for a question about frame times."""

    def __init__(self, clock: FakeClock | None = None, cost: Cost = Cost()) -> None:  # noqa: B008
        self.clock, self.cost = clock or FakeClock(), cost
        self.bundle = SimpleNamespace(path=Path("fake"), model=SimpleNamespace(image_size=SIZE))
        self.spec = SimpleNamespace(provider="cpu")
        self.lives = list[FakeLive]()
        self.scored = list[tuple[str, tuple[float, ...]]]()
        self.calls = list[str]()
        self.threads = set[int]()
        self.yes: Callable[[str, list[float]], float] = lambda prompt, times: 0.0
        self.mass: Callable[[str], float] = lambda prompt: 1.0
        self.refuse: Callable[[Asked], None] = lambda prompt: None
        self.words: Iterable[str] = ("a ", "gate")
        self.fail: Callable[[str], None] = lambda call: None
        self.before_piece: Callable[[], None] = lambda: None

    def check_live(self, prompt: Asked, answers: tuple[str, ...] = (), spec: object = None) -> None:
        self.refuse(prompt)

    def live(self, compression: object, spec: Any) -> FakeLive:
        self.lives.append(FakeLive(self, spec.memory_frames))
        return self.lives[-1]

    def spend(self, call: str) -> None:
        self.threads.add(threading.get_ident())
        self.calls.append(call)
        self.clock.now += getattr(self.cost, call)
        self.fail(call)

    def speak(self, prompt: Asked, times: list[float]) -> Iterator[Piece]:
        self.calls.append(f"ask {prompt}")
        stats = Stats(frames=len(times))
        for number, word in enumerate(self.words):
            self.before_piece()
            self.spend("piece")
            stats = replace(stats, new_tokens=number + 1)
            yield Piece(word, number, stats)

    def stream(self, prompt: str, video: Any = None, *more: object, **options: object) -> Iterator[Piece]:
        return self.speak(f"stream {prompt}", [0.0] * (0 if video is None else len(video)))

    def reply(self, pieces: Iterator[Piece]) -> Reply:
        found = list(pieces)
        return Reply("".join(p.text for p in found), [p.token for p in found], "stop", found[-1].stats)

    @property
    def real(self) -> VideoLLM:
        """For signatures."""
        return cast(VideoLLM, self)


class FakeReader:
    """A camera that a test fills, or one that makes `fps` frames a second of the fake clock."""

    def __init__(
        self,
        camera: str,
        uri: object,
        spec: ReaderSpec,
        on_status: Callable[[CameraStatus], None],
        clock: FakeClock,
    ) -> None:
        self.camera, self.spec, self.clock, self._on_status = camera, spec, clock, on_status
        self.live = not str(uri).startswith("file")
        self.waiting = deque[Frame]()
        self.ended = False
        self.dropped = 0
        self.segment = 0
        self.fps: float | None = None  # of its own accord
        self.on = False
        self.stops = 0
        self._made = 0
        self._next = clock.monotonic()
        self._status = CameraStatus(camera, "connecting", 0.0, info=SourceInfo("fake", self.live, not self.live))

    def start(self) -> FakeReader:
        self.on, self.ended, self._next = True, False, max(self._next, self.clock.monotonic())
        self.say("online")
        return self

    def stop(self, timeout: float | None = None) -> bool:
        self.on, self.ended = False, True
        self.stops += 1
        self.waiting.clear()
        self.say("stopped")
        return True

    def say(self, state: State, error: str | None = None, code: Any = None) -> None:
        self._status = replace(self.status(), state=state, error=error, code=code)
        self._on_status(self._status)

    def status(self) -> CameraStatus:
        return replace(self._status, frames=self._made, dropped={"overrun": self.dropped})

    def put(self, pts: float | None = None, late: float = 0.0) -> None:
        """A frame that came `late` seconds ago."""
        now = self.clock.monotonic() - late
        image = np.zeros((SIZE, SIZE, 3), np.uint8)
        utc = self.clock.time() - late
        self.waiting.append(Frame(image, self._made, pts, utc, now, self.segment, self.camera))
        self._made += 1
        if self.live and len(self.waiting) > self.spec.buffer:
            self.waiting.popleft()
            self.dropped += 1

    def take(self, timeout: float = 0.0) -> Frame | None:
        if self.fps and self.on:
            while self._next <= self.clock.monotonic():
                self.put(late=self.clock.monotonic() - self._next)
                self._next += 1 / self.fps
        return self.waiting.popleft() if self.waiting else None


class Readers:
    """Makes readers for a watcher and hands them to the test."""

    def __init__(self) -> None:
        self.made: dict[str, FakeReader] = {}

    def __call__(self, camera: str, *more: Any) -> Any:
        self.made[camera] = FakeReader(camera, *more)
        return self.made[camera]

    def __getitem__(self, camera: str) -> FakeReader:
        return self.made[camera]


@contextmanager
def by_hand(llm: FakeLLM, *cameras: Any, **options: Any) -> Iterator[tuple[CameraWatcher, Readers]]:
    """A running CameraWatcher on stand-ins, without the model's thread: the test makes its every step with `drive`."""
    readers = Readers()
    made = CameraWatcher(llm.real, cameras, clock=llm.clock, make_reader=readers, **options)
    made._turns.start = lambda: None  # type: ignore[method-assign]
    with made:
        yield made, readers


def drive(made: CameraWatcher, clock: FakeClock, seconds: float, tick: float = 0.05) -> None:
    """Let the model's thread do what it would in so many seconds of the fake clock."""
    end = clock.now + seconds
    while clock.now < end:
        if not made._turns.step():
            clock.now += tick


def wait(happened: Callable[[], object], seconds: float = 60.0) -> None:
    """Wait for what another thread does; fails when it never comes."""
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.001)
