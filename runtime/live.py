"""A video that is still arriving: every frame is encoded, merged and prefilled as it comes, so that a question costs
only its own tokens. Memory is bounded: the oldest frame goes when there is no room for the next."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass, replace
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dycoke_edge.config import Compression, LiveSpec, Sampling, split
from dycoke_edge.dycoke import stand_ins
from dycoke_edge.errors import UsageError
from dycoke_edge.runtime import visual
from dycoke_edge.runtime.conversation import Asked
from dycoke_edge.runtime.engine import AnyArray
from dycoke_edge.runtime.exclusive import Buffer, alone
from dycoke_edge.runtime.gate import FrameGate
from dycoke_edge.runtime.live_question import YES_NO, LiveQuestions
from dycoke_edge.runtime.live_room import room
from dycoke_edge.runtime.live_stats import LiveStats, Pushed
from dycoke_edge.runtime.live_window import Compared, Window
from dycoke_edge.runtime.loop import Decoder, Ids
from dycoke_edge.runtime.reply import Piece, of_one_bundle, pieces
from dycoke_edge.runtime.scores import Scores, scores
from dycoke_edge.runtime.stats import Stats, why_not
from dycoke_edge.runtime.video import resize

if TYPE_CHECKING:
    from dycoke_edge.runtime.pipeline import VideoLLM

Image = NDArray[np.uint8]
NOT_COUNTED = np.empty(0, np.int64)  # else a GPU would be waited for, to say what merge kept


@dataclass
class Held:
    """A frame in memory: its rows, the positions it takes, when it came and until when nothing else was seen."""

    rows: int
    span: int
    time: float | None
    until: float | None


class LiveVideo:
    """One camera's video. It has a KV buffer of its own and shares everything else with its VideoLLM.

    A question is asked about the frames in memory and forgotten with its answer. A frame that the same thread pushes
    meanwhile ends the answer with a UsageError; any other thread waits with its call until the answer is read, as it
    does with a VideoLLM.

    In mode "coverage" a token counts for tokens of its own frame, so that what was counted stays right when frames go.
    In mode "paper" with `weigh`, what merge drops of a frame adds to the weights of tokens that are in memory, as in a
    clip of these frames; but what was computed before saw the weights of then.
    """

    def __init__(self, llm: VideoLLM, compression: Compression, spec: LiveSpec) -> None:
        self.bundle, self.engine, self.text = llm.bundle, llm.engine, llm.text
        self.compression, self.spec, self.stats = compression, spec, LiveStats()
        self._questions = LiveQuestions(llm.bundle, llm.text, spec)
        self._prefix = self._questions.prefix
        self._room = room(self.bundle.model, compression, spec, len(self._prefix), llm.spec.kv_capacity)
        self.bundle.merge_graph(compression.merge_ratio)  # UsageError if the bundle lacks it
        self.kv = llm.layers.new_kv(self._room.capacity)
        self.exclusive, self.buffer = llm.exclusive, Buffer(llm.exclusive)
        self._decoder = Decoder(llm.layers, self.kv, llm.exclusive)
        self._gate = FrameGate(spec.gate_threshold) if spec.gate_threshold else None
        self._frames: deque[Held] = deque()
        self._window = Window(spec, compression.mode)
        self.engine.load("vision")  # now, not when the first frame comes
        llm.layers.load()
        self.clear()

    @property
    def num_frames(self) -> int:
        """Frames in memory; gated ones are none."""
        return len(self._frames)

    @property
    def num_tokens(self) -> int:
        """Visual tokens in memory: what a question is asked about."""
        return self.kv.num_visual

    @property
    def span(self) -> tuple[float | None, float | None]:
        """When the oldest frame in memory came, and the newest, gated ones included."""
        return (self._frames[0].time, self._frames[-1].until) if self._frames else (None, None)

    @property
    def nbytes(self) -> int:
        """Bytes in use: KV rows, the tokens that the next frame is compared with, the gate's picture."""
        gate = self._gate.nbytes if self._gate else 0
        return self.kv.live_nbytes + self._window.nbytes + gate

    @alone
    def push(self, image: Image, time: float | None = None) -> Pushed:
        """Take the next frame, uint8 [H, W, 3] of any size, seen at `time` in seconds of any clock."""
        began = perf_counter()
        self.bundle.check_manifest()
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
            raise UsageError(f"a frame has {image.dtype} {list(image.shape)}; give uint8 [H, W, 3]")
        size = self.bundle.model.image_size
        with self.stats.timed("resize"):
            image = resize(image[None], size)[0]
        if self._repeats(image):
            self._frames[-1].until = time
            return self._count(Pushed(True, False, None, self.bundle.model.tokens_per_frame, 0, 0, _since(began)))
        with self.stats.timed("vision"):
            tokens = visual.encode(self.bundle, self.engine, image[None], 1)[0]
        pushed = self._take(tokens, time, began)
        if self._gate:
            self._gate.remember(image)
        return self._count(pushed)

    @alone
    def push_tokens(self, tokens: AnyArray, time: float | None = None) -> Pushed:
        """Take the next frame as the visual tokens [N, E] that `VideoLLM.encode` makes of it; never gated."""
        began, model = perf_counter(), self.bundle.model
        self.bundle.check_manifest()
        if tokens.shape != (model.tokens_per_frame, model.hidden_size):
            raise UsageError(f"tokens are {list(tokens.shape)}; give one frame of VideoLLM.encode at a time")
        if self._gate:
            self._gate.forget()
        own = self.engine.empty(tokens.shape, model.numpy_dtype)
        own[...] = np.asarray(tokens, model.numpy_dtype)
        return self._count(self._take(own, time, began))

    def cut(self) -> None:
        """Compare the next frame with nothing before it: the camera was away, or its clock jumped."""
        with self.exclusive:
            self._window.clear()
            if self._gate:
                self._gate.forget()

    @alone
    def clear(self) -> None:
        """Forget all frames and give their memory back."""
        self.cut()
        self._frames.clear()
        self._decoder.clear(self._room.text)
        self._empty = True

    @alone
    def forget_before(self, time: float) -> int:
        """Forget the frames of which nothing was seen at `time` or later; returns how many. For windows of seconds: a
        frame that repeats is not held, so without this what came before it would stay while nothing happens."""
        forgotten = 0
        while self._frames and (until := self._frames[0].until) is not None and until < time:
            forgotten += 1
            self._forget_oldest()
        if forgotten and len(self._frames) < len(self._window):
            self._window.clear()  # merge counts on its anchors being there
        self.stats.evicted_frames += forgotten
        return forgotten

    def ask(
        self,
        prompt: Asked,
        sampling: Sampling = Sampling(),  # noqa: B008 - frozen
        **options: Any,
    ) -> Generator[Piece, None, None]:
        """Answer a prompt about the frames in memory, piece by piece, as `VideoLLM.stream` does. Of several messages
        the first shows the video. `options` are fields of Sampling, and go before its: max_new_tokens=8.

        The rows of question and answer are given back when the generator ends, or is closed half-way.
        UsageError if there is no frame, or no room for the question or the answer.
        """
        sampling = replace(sampling, **split("LiveVideo.ask", options, Sampling)[0])
        return self.buffer.reading(of_one_bundle(self.bundle, self._answer(prompt, sampling)))

    def _answer(self, prompt: Asked, sampling: Sampling) -> Generator[Piece, None, None]:
        began = perf_counter()
        if sampling.max_new_tokens > self.spec.max_answer_tokens:
            raise UsageError(
                f"max_new_tokens={sampling.max_new_tokens} (--max-new-tokens) is more than the rows kept for answers "
                f"of a live video; use --max-answer-tokens {sampling.max_new_tokens}"
            )
        suffix = self._question(prompt)
        if sampling.stop_token_ids is None:
            sampling = replace(sampling, stop_token_ids=self.bundle.manifest.stop_token_ids)
        self.stats.questions += 1
        steps = self._decoder.answer(suffix, self.compression, sampling)
        with self.stats.timed("answer"), closing(steps):
            yield from pieces(steps, self.text.stream(), self.kv, self._answer_stats(len(suffix)), began)

    @alone
    def score(self, prompt: Asked, answers: tuple[str, ...] = YES_NO) -> Scores:
        """How likely each answer is to begin the reply, all its spellings together, as shares of 1; `mass` says how
        likely any of them is, and that the shares mean nothing where it is small.

        One prefill of the question, no decoding. UsageError if there is no frame or no room, or if answers cannot be
        told apart by their first token.
        """
        self.bundle.check_same()
        first = self.text.first_tokens(answers)
        suffix = self._question(prompt)
        self.stats.questions += 1
        with self.stats.timed("answer"):
            try:
                self._decoder.read(suffix)
                found = scores(answers, first, self._decoder.logits[0])
                self.bundle.check_same()  # before they are given away
                return found
            finally:
                self._decoder.rewind()

    def _take(self, tokens: AnyArray, time: float | None, began: float) -> Pushed:
        """Merge a frame's tokens and prefill those that stay."""
        keep = self.compression.positions == "keep"
        with self.stats.timed("merge"):
            anchor, similarity, cut = self._window.compare(tokens)
            merged = self._merge(tokens, anchor)
        kept = merged.tokens
        frame = Held(len(kept), len(tokens) if keep else len(kept), time, time)
        evicted = self._make_room(frame)
        try:
            with self.stats.timed("prefill"):
                if self._empty:
                    self._decoder.begin(self._prefix, self._room.text)
                    self._empty = False
                counts, numbers = self._counts(merged, anchor)
                places = merged.index if keep else np.arange(len(kept), dtype=np.int32)
                self._decoder.see(kept, places, frame.span, counts)
        except BaseException:
            self.clear()  # rows of half a frame may be there
            raise
        self._frames.append(frame)
        if self.compression.merges:
            self._window.append(Compared(tokens, kept, numbers))
        return Pushed(False, cut, similarity, len(tokens), len(kept), evicted, _since(began))

    def _merge(self, tokens: AnyArray, anchor: Compared | None) -> visual.Merged:
        """What stays of a frame [N, E]."""
        if self.compression.mode == "coverage" and self.compression.merges:
            return visual.cover_frame(self.engine, tokens, anchor.kept if anchor else None, self.compression)
        before = anchor.tokens if anchor else None
        ratio = self.compression.merge_ratio
        return visual.Merged(*visual.merge_frame(self.bundle, self.engine, before, tokens, ratio))

    def _counts(self, merged: visual.Merged, anchor: Compared | None) -> tuple[Any, NDArray[np.int64]]:
        """For how many tokens each of a frame's stands, [2, m], None where nothing is counted; and the numbers of those
        that stand for the frame's own. In mode "paper" what is in memory counts for more from now on."""
        if not self.compression.counted:
            return None, NOT_COUNTED
        if merged.counts is not None:
            return merged.counts, NOT_COUNTED
        before = self.kv.counts
        numbers = stand_ins(np.asarray(merged.index), before.shape[1], anchor.numbers if anchor else None)
        counts = np.bincount(numbers, minlength=before.shape[1] + len(merged.tokens))
        counts[: before.shape[1]] += before[0]
        counts = np.stack((counts, counts))
        self._decoder.weigh(counts[:, : before.shape[1]])
        return counts[:, before.shape[1] :], numbers

    def _repeats(self, image: Image) -> bool:
        if self._gate is None or not self._frames:
            return False
        with self.stats.timed("gate"):
            return self._gate.repeats(image)

    def _make_room(self, frame: Held) -> int:
        """Evict the oldest frames until one more fits into memory, and re-base positions before they run out."""
        decoder, evicted = self._decoder, 0
        with self.stats.timed("evict"):
            while len(self._frames) >= self.spec.memory_frames or self.kv.num_visual + frame.rows > self.kv.origin:
                self._forget_oldest()
                evicted += 1
        text = self.spec.max_question_tokens + self.spec.max_answer_tokens
        if decoder.position + frame.span + text > self.bundle.model.max_positions:
            with self.stats.timed("rebase"):
                decoder.rebase()
            self.stats.rebases += 1
        return evicted

    def _forget_oldest(self) -> None:
        oldest = self._frames.popleft()
        self._decoder.forget(oldest.rows, oldest.span)
        self._window.evicted(oldest.rows)
        self.stats.evicted_tokens += oldest.rows

    def _question(self, prompt: Asked) -> Ids:
        """The ids after the video: the newline that the model puts there, the question, the template's end."""
        if not self._frames:
            raise UsageError("this live video holds no frame yet; push one before a question is asked")
        return self._questions.ids(prompt)

    def _answer_stats(self, suffix: int) -> Stats:
        stats = Stats(frames=len(self._frames), text_tokens=len(self._prefix) + suffix)
        stats.visual_tokens_in = stats.frames * self.bundle.model.tokens_per_frame
        stats.visual_tokens_kept = self.kv.num_visual
        stats.merge_applied = stats.visual_tokens_kept < stats.visual_tokens_in
        stats.why_not = why_not(stats.frames, self.compression)
        return stats

    def _count(self, pushed: Pushed) -> Pushed:
        self.stats.count(pushed)
        return pushed


def _since(began: float) -> float:
    return perf_counter() - began
