"""Several threads on one model: right answers or a line that says why not, whoever waits, leaves or is collected."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from dycoke_edge import (
    BusyError,
    Camera,
    CameraWatcher,
    Compression,
    EngineError,
    LiveSpec,
    Sampling,
    UsageError,
    VideoLLM,
)
from dycoke_edge.runtime import exclusive
from dycoke_edge.runtime.exclusive import Buffer, Exclusive
from tests.cameras import FakeLLM, Readers, wait
from tests.test_parity import frames

SHORT = Sampling(max_new_tokens=24, stop_token_ids=())
OFTEN = Compression(merge_ratio=0.5, refresh_threshold=0.95)
PLAIN = LiveSpec(memory_frames=16, gate_threshold=0, max_question_tokens=64, max_answer_tokens=24)


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as made:
        yield made


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exclusive, "PATIENCE_S", 0.0)


def in_thread(function: Callable[[], Any]) -> Any:
    """What a function gives, or raises, in a thread that ends with it."""
    found = Future[Any]()

    def run() -> None:
        try:
            found.set_result(function())
        except BaseException as error:
            found.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return found


def use(buffer: Buffer) -> None:
    """One call."""
    with buffer.alone():
        pass


# The lock alone


class Steps:
    """Pieces that are computed when the test says so, and who is computing."""

    def __init__(self, count: int = 3) -> None:
        self.count, self.closed, self.inside = count, False, 0
        self.there, self.go = threading.Semaphore(0), threading.Semaphore(0)

    def __call__(self) -> Iterator[int]:
        try:
            for number in range(self.count):
                self.there.release()
                assert self.go.acquire(timeout=60)
                yield number
        finally:
            self.closed = True


def test_another_thread_waits_until_the_last_piece_was_read() -> None:
    buffer, steps = Buffer(Exclusive()), Steps()
    steps.go.release(3)
    answer = buffer.reading(steps())
    assert next(answer) == 0
    order = list[str]()

    def other() -> None:
        with buffer.alone():
            order.append("other")

    waiting = in_thread(other)
    for number in (1, 2):
        assert next(answer) == number
        order.append("piece")
    assert not waiting.done() and order == ["piece", "piece"]
    assert list(answer) == []
    waiting.result(60)
    assert order[-1] == "other" and steps.closed


@pytest.mark.parametrize("end", ["close", "forget", "cycle", "thread"])
def test_an_answer_that_is_left_lets_the_others_in(end: str, impatient: None) -> None:
    buffer, steps = Buffer(Exclusive()), Steps()
    steps.go.release(3)
    kept = list[Any]()

    def leave() -> None:
        answer = buffer.reading(steps())
        next(answer)
        if end == "close":
            answer.close()
        elif end == "cycle":
            kept_by_itself: list[Any] = [answer]
            kept_by_itself.append(kept_by_itself)
        elif end == "thread":
            kept.append(answer)  # nobody reads on: its thread ends here

    gc.disable()
    try:
        in_thread(leave).result(60)
    finally:
        gc.enable()
    use(buffer)
    if end == "thread":  # somebody else reads on after all: it does no harm
        steps.go.release(3)
        assert next(kept[0]) == 1
        kept[0].close()
    assert not buffer._readers and not buffer._free.locked()


def test_an_answer_that_lies_half_read_is_not_waited_for_for_ever(impatient: None) -> None:
    buffer, steps = Buffer(Exclusive()), Steps()
    steps.go.release(3)
    answer = buffer.reading(steps())
    next(answer)
    for call in (lambda: use(buffer), lambda: next(buffer.reading(iter([1])))):
        with pytest.raises(BusyError, match=r"another thread has read a part .* close\(\) it"):
            in_thread(call).result(60)
    assert next(answer) == 1  # and is not disturbed
    answer.close()
    in_thread(lambda: next(buffer.reading(iter([1])))).result(60)


def test_an_answer_that_is_being_computed_is_waited_for(impatient: None) -> None:
    buffer, steps = Buffer(Exclusive()), Steps(1)
    answer = in_thread(lambda: list(buffer.reading(steps())))
    assert steps.there.acquire(timeout=60)
    other = in_thread(lambda: list(buffer.reading(iter([7]))))
    third = in_thread(lambda: next(Buffer(buffer._exclusive).reading(iter([8]))))  # another buffer, the same model
    wait(lambda: sum(reader.computing for reader in buffer._readers) == 1)
    assert not other.done() and not third.done()
    steps.go.release()
    assert (answer.result(60), other.result(60), third.result(60)) == ([0], [7], 8)


def test_pieces_of_two_buffers_are_computed_in_turn() -> None:
    """Half read, neither keeps the other from going on, in whatever threads."""
    lock = Exclusive()
    answers = [Buffer(lock).reading(iter(range(3))) for _ in range(2)]
    for number in range(3):
        for answer in answers:
            assert in_thread(answer.__next__).result(60) == number


def test_the_same_thread_may_begin_something_else() -> None:
    buffer = Buffer(Exclusive())
    first, second = buffer.reading(iter(range(3))), buffer.reading(iter(range(3)))
    assert next(first) == 0 and next(second) == 0
    with buffer.alone(), buffer.alone():
        assert list(buffer.reading(iter([5]))) == [5]
    assert next(first) == 1  # whether that is right is for its buffer to say
    del first, second
    in_thread(lambda: use(buffer)).result(60)


def test_what_is_collected_while_a_thread_computes_waits_for_nobody() -> None:
    """The collector runs in any thread, also in one that another is waiting for."""
    buffer, other, steps = Buffer(Exclusive()), Steps(1), Steps()
    steps.go.release(3)
    answer = buffer.reading(steps())
    next(answer)
    computing = in_thread(lambda: list(Buffer(buffer._exclusive).reading(other())))
    assert other.there.acquire(timeout=60)
    del answer  # as the collector would, here where another thread holds the lock
    assert not buffer._free.locked() and steps.closed
    other.go.release()
    assert computing.result(60) == [0]


def test_what_is_collected_inside_a_call_of_the_same_buffer() -> None:
    buffer, steps = Buffer(Exclusive()), Steps()
    steps.go.release(3)
    answer: Any = buffer.reading(steps())
    next(answer)
    with buffer.alone():
        answer = None
        assert buffer._free.locked() and len(buffer._readers) == 1
    assert not buffer._free.locked()


def test_a_failure_frees_the_buffer() -> None:
    buffer = Buffer(Exclusive())

    def fail() -> Iterator[int]:
        yield 1
        raise EngineError("out of memory")

    with pytest.raises(EngineError, match="out of memory"):
        list(buffer.reading(fail()))
    with pytest.raises(ZeroDivisionError), buffer.alone():
        _ = 1 / 0
    in_thread(lambda: use(buffer)).result(60)


# A real model


def test_eight_threads_get_the_answers_that_one_gets(llm: VideoLLM, pool: ThreadPoolExecutor) -> None:
    def generate(number: int) -> list[int]:
        return llm.generate(f"What {number}?", video=frames(4 + number % 3), sampling=SHORT).token_ids

    def stream(number: int) -> list[int]:
        return [piece.token for piece in llm.stream(f"Who {number}?", video=frames(4), sampling=SHORT)]

    def watch(number: int) -> list[Any]:
        live = llm.live(OFTEN, PLAIN)
        for frame in frames(4 + number % 3):
            live.push(frame)
        return [[piece.token for piece in live.ask(f"And {number}?", SHORT)], live.score("Is it?")]

    def encode(number: int) -> Any:
        return llm.encode(frames(2 + number % 3)).tolist()

    jobs = [(kind, number) for number in range(6) for kind in (generate, stream, watch, encode)]
    alone = [kind(number) for kind, number in jobs]
    barrier = threading.Barrier(8)

    def together(job: Any) -> Any:
        barrier.wait(60)
        return job[0](job[1])

    assert list(pool.map(together, jobs)) == alone
    assert llm.generate("What 0?", video=frames(4), sampling=SHORT).token_ids == alone[0]


def test_a_frame_that_another_thread_pushes_waits_for_the_answer(llm: VideoLLM) -> None:
    live = llm.live(OFTEN, PLAIN)
    for frame in frames(9)[:8]:
        live.push(frame)
    want = [piece.token for piece in live.ask("What?", SHORT)]
    answer = live.ask("What?", SHORT)
    got = [next(answer).token]
    calls = [in_thread(lambda: live.push(frames(9)[8])), in_thread(lambda: live.score("Is it?"))]
    got += [piece.token for piece in answer]
    assert got == want
    assert calls[0].result(60).tokens_in and calls[1].result(60).mass > 0
    assert live.num_frames == 9


def test_an_answer_that_another_thread_forgets_leaves_nothing(llm: VideoLLM) -> None:
    live = llm.live(OFTEN, PLAIN)
    for frame in frames(9)[:5]:
        live.push(frame)
    answer: Any = live.ask("Something else?", SHORT)
    next(answer)
    held, go = threading.Event(), threading.Event()

    def hold() -> None:
        with llm.exclusive:
            held.set()
            assert go.wait(60)

    holding = in_thread(hold)
    assert held.wait(60)
    del answer  # here another thread computes, so nothing can be taken back yet
    go.set()
    holding.result(60)
    for frame in frames(9)[5:]:
        live.push(frame)
    want = llm.generate("What?", video=frames(9), compression=OFTEN, sampling=SHORT).token_ids
    assert [piece.token for piece in live.ask("What?", SHORT)] == want


def test_a_half_read_stream_keeps_others_out_and_says_so(llm: VideoLLM, impatient: None) -> None:
    stream = llm.stream("What?", video=frames(4), sampling=SHORT)
    next(stream)
    with pytest.raises(BusyError, match="another thread"):
        in_thread(lambda: llm.generate("And this?")).result(60)
    assert len(list(stream)) == 23
    assert in_thread(lambda: llm.generate("And this?", sampling=SHORT)).result(60).token_ids


def test_pieces_may_be_read_in_threads_that_change(llm: VideoLLM) -> None:
    """As web servers do with a generator."""
    want = llm.generate("What?", video=frames(4), sampling=SHORT).token_ids
    stream = llm.stream("What?", video=frames(4), sampling=SHORT)
    assert [in_thread(stream.__next__).result(60).token for _ in want] == want
    with pytest.raises(UsageError, match="newer request"):
        left = llm.stream("What?", video=frames(4), sampling=SHORT)
        next(left)
        llm.generate("And this?", sampling=SHORT)
        next(left)


# Forked children


def in_child(function: Callable[[], object]) -> str:
    """What a function raises in a forked child; fails when it hangs."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:  # pragma: no cover - another process
        try:
            said = repr(function())
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        os.write(writing, said.encode())
        os._exit(0)
    os.close(writing)
    try:
        with open(reading, "rb") as pipe:
            wait_for = threading.Timer(60, os.kill, (child, 9))
            wait_for.start()
            said = pipe.read().decode()
            wait_for.cancel()
    finally:
        os.waitpid(child, 0)
    return said or "it hung"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_child_says_so_and_does_not_hang(llm: VideoLLM) -> None:
    live = llm.live(OFTEN, PLAIN)
    live.push(frames(1)[0])
    stream = llm.stream("What?", sampling=SHORT)
    next(stream)
    held, go = threading.Event(), threading.Event()

    def hold() -> None:
        with llm.exclusive:
            held.set()
            assert go.wait(60)

    holding = in_thread(hold)  # a thread that computes while the process forks, and is not there in the child
    assert held.wait(60)
    calls: list[Callable[[], object]] = [
        lambda: llm.generate("What?"),
        lambda: next(stream),
        lambda: llm.encode(frames(1)),
        lambda: llm.live(OFTEN, PLAIN),
        lambda: live.push(frames(1)[0]),
        lambda: live.score("Is it?"),
        lambda: next(live.ask("What?", SHORT)),
        live.clear,
        live.cut,
    ]
    said = [in_child(call) for call in calls]
    go.set()
    holding.result(60)
    assert len(set(said)) == 1 and said[0].startswith("EngineError: this VideoLLM was loaded before this process was")
    assert "\n" not in said[0] and "spawn" in said[0]
    assert len(list(stream)) == 23


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_watcher_in_a_forked_child_says_so(tmp_path: Path) -> None:
    llm = FakeLLM()
    made = CameraWatcher(llm.real, [Camera("gate", "rtsp://x")], clock=llm.clock, make_reader=Readers())
    with made, made._lock:
        calls: list[Callable[[], object]] = [
            lambda: made.generate("What?"),
            lambda: made.ask("gate", "What?"),
            lambda: made.remove("gate"),
            made.status,
            made.join,
        ]
        said = [in_child(call) for call in calls]
        assert in_child(made.stop) == "None"
    assert all("this CameraWatcher was made before this process was forked" in line for line in said), said
