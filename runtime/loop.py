"""Prefill and decode over one KV buffer. Knows token ids and visual tokens only: no text, no pixels."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from dycoke_edge.config import Compression, Sampling
from dycoke_edge.dycoke import Counts
from dycoke_edge.errors import KVOverflow, UsageError
from dycoke_edge.runtime.engine import AnyArray
from dycoke_edge.runtime.exclusive import Exclusive
from dycoke_edge.runtime.kv import KVBuffer
from dycoke_edge.runtime.positions import Positions
from dycoke_edge.runtime.repetition import Repetition
from dycoke_edge.runtime.step import FinishReason, Step

Array = NDArray[Any]
Ids = NDArray[np.int64]
NO_VISUAL, NO_TEXT = np.empty((0, 0), np.float32), np.empty(0, np.int64)


@dataclass(frozen=True)
class Prompt:
    """Prefix text, visual tokens, suffix text."""

    prefix: Ids  # [P]
    suffix: Ids  # [Q]; begins with the newline the model puts after a video
    visual: AnyArray = field(default_factory=lambda: NO_VISUAL)  # [M, E]
    visual_positions: AnyArray = field(default_factory=lambda: NO_TEXT)  # [M], counted from the span's first position
    visual_span: int = 0  # positions the visual span takes
    counts: Any = None  # [2, M] on the host or a GPU, for how many tokens each visual one stands; None: not weighed

    @property
    def num_visual(self) -> int:
        """M."""
        return len(self.visual)

    @property
    def num_text(self) -> int:
        """P + Q."""
        return len(self.prefix) + len(self.suffix)


class Layers(Protocol):
    """The decoder's layers on memory of their own: what runs a part of a prompt, or one step, over any KV buffer."""

    inverse: NDArray[np.float32]  # [D/2] RoPE frequencies

    @property
    def logits(self) -> NDArray[np.float32]:
        """fp32 [1, V] of the last token computed."""

    def load(self) -> None:
        """Make them ready now, not when they are first used."""

    def unload(self) -> None:
        """Give the weights' memory back, where it can be had again quickly."""

    def take_bytes(self) -> int:
        """The least bytes that had to be moved since the last call, those that the engine counts not among them."""

    def new_kv(self, capacity: int) -> KVBuffer:
        """A buffer whose rows lie where these layers want them."""

    def reserve(self, kv: KVBuffer) -> None:
        """Scratch memory for a KV buffer, once for the largest that is served."""

    def prefill(self, kv: KVBuffer, visual: AnyArray, text: Ids, positions: Positions, counts: Any = None) -> None:
        """Compute a part of a prompt, visual tokens [M, E] and then text [Q], either of them possibly empty, and add
        their rows to the left and the right of the buffer. It is cut so that it fits the scratch memory; when that
        fails half-way, the rows of what came before are there. `counts` [2, M], on the host or where the rows lie, are
        given to the buffer as the tokens they are for are computed."""

    def steps(self, kv: KVBuffer, position: int, compression: Compression, sampling: Sampling) -> Iterator[Step]:
        """`max_new_tokens` tokens, the first from `logits`; each is computed when it is asked for, at the earliest
        while the one before is read. `position` is that of the next token."""


class Ending:
    """When one answer is over, and why."""

    def __init__(self, sampling: Sampling) -> None:
        self._stop = frozenset(sampling.stop_token_ids or ())
        self._repetition = Repetition(0 if sampling.stop_token_ids == () else sampling.repeat_limit)
        self._left = sampling.max_new_tokens

    def push(self, token: int) -> FinishReason | None:
        """Take the next token; the reason if it is the last one."""
        self._left -= 1
        repeats = self._repetition.push(token)
        if token in self._stop:
            return "stop"
        return "repetition" if repeats else None if self._left else "length"


class Decoder:
    """One KV buffer, filled part by part and asked again: `begin`, `see` as often as frames come, `answer`, `see`, ...

    Every decoder of a model shares its `Layers`; what was seen and where positions stand is its own. Each call
    overtakes an answer that is still being generated on the same buffer, which then says so.
    """

    def __init__(self, layers: Layers, kv: KVBuffer, exclusive: Exclusive | None = None) -> None:
        self.layers, self.kv, self._exclusive = layers, kv, exclusive or Exclusive()
        layers.reserve(kv)
        self.position = 0  # of the next token
        self._prefix = 0  # text rows before the visual ones, which take the first positions
        self._oldest = 0  # position of the oldest visual token
        self._newest = 0  # position after the newest one: where a question begins
        self._request = 0

    @property
    def logits(self) -> NDArray[np.float32]:
        """fp32 [1, V] of the last token computed, on this buffer or another of the model."""
        return self.layers.logits

    def begin(self, prefix: Ids, text_rows: int) -> None:
        """Forget everything, keep `text_rows` rows for text, prefix [P] included, and compute the prefix."""
        self.clear(text_rows)
        self.read(prefix)
        self._prefix = self._oldest = self._newest = self.position

    def clear(self, text_rows: int) -> None:
        """Forget everything and give its memory back; keep `text_rows` rows for text. `begin` comes next."""
        self._request += 1
        self.kv.reset(text_rows)
        self.position = self._prefix = self._oldest = self._newest = 0

    def see(self, visual: AnyArray, places: AnyArray, span: int, counts: Any = None) -> None:
        """Add visual tokens [M, E]; places [M] count from the first of the `span` positions that they take.

        `counts` [2, M] say for how many tokens each of them stands; given once, they are given always. A question and
        its answer are forgotten first: what comes later in the video must not see them.
        """
        assert self.kv.weighed <= (counts is not None), "all tokens have weights or none has"
        self._compute(visual, places, span, NO_TEXT, counts)

    def weigh(self, counts: Counts) -> None:
        """For how many tokens those that were seen stand from now on: [2, num_visual]."""
        self.rewind()
        self.kv.weigh(counts)

    def read(self, suffix: Ids) -> None:
        """Compute a question [Q] after all that was seen; `logits` are then those of the answer's first token."""
        self._compute(NO_VISUAL, NO_TEXT, 0, suffix)

    def answer(self, suffix: Ids, compression: Compression, sampling: Sampling) -> Generator[Step, None, None]:
        """Read a question and yield the answer's tokens; both are forgotten when the iterator ends or is closed."""
        needed = self._prefix + len(suffix) + sampling.max_new_tokens
        if self.kv.origin + needed > self.kv.capacity:
            raise KVOverflow(self.kv.origin + needed, self.kv.capacity)
        self.read(suffix)
        request = self._request
        try:
            yield from self._generate(compression, sampling)
        finally:
            with self._exclusive.unless_taken() as taken:  # if not, whatever comes next begins with a rewind
                if taken and self._request == request:
                    self.rewind()

    def rewind(self) -> None:
        """Forget the question and the answer; every visual row is active again, unless parked ones were freed."""
        kv = self.kv
        self._request += 1
        kv.truncate(self._prefix)
        if not kv.freed:
            kv.refresh(np.ones(kv.num_visual, np.bool_))
        self.position = self._newest

    def forget(self, count: int, span: int) -> None:
        """Forget the `count` oldest visual tokens, which took `span` positions."""
        self.rewind()
        self.kv.evict(count)
        self._oldest += span

    def rebase(self) -> int:
        """Move what was seen back to the first positions after the prefix; returns by how many.

        The distances between visual tokens stay; only that to the prefix becomes what it was for the first frame.
        """
        self.rewind()
        offset = self._oldest - self._prefix
        angles = -offset * self.layers.inverse.astype(np.float64)
        self.kv.rotate(np.cos(angles), np.sin(angles))
        self._oldest -= offset
        self._newest -= offset
        self.position -= offset
        return offset

    def prefill(self, prompt: Prompt, max_new_tokens: int) -> None:
        """Compute a prompt; `logits` then hold the first token's. KVOverflow if it cannot fit whole."""
        text_rows = prompt.num_text + max_new_tokens
        if text_rows + prompt.num_visual > self.kv.capacity:
            raise KVOverflow(text_rows + prompt.num_visual, self.kv.capacity)
        self.begin(prompt.prefix, text_rows)
        self._compute(prompt.visual, prompt.visual_positions, prompt.visual_span, prompt.suffix, prompt.counts)

    def decode(self, prompt: Prompt, compression: Compression, sampling: Sampling) -> Iterator[Step]:
        """Prefill, then yield tokens up to and with a stop token, until they repeat themselves, or `max_new_tokens`."""
        self.prefill(prompt, sampling.max_new_tokens)
        yield from self._generate(compression, sampling)

    def _generate(self, compression: Compression, sampling: Sampling) -> Iterator[Step]:
        """Tokens after what was read; `logits` are those of the first."""
        request, ending = self._request, Ending(sampling)
        for step in self.layers.steps(self.kv, self.position, compression, sampling):
            finish = ending.push(step.token)
            yield replace(step, finish_reason=finish) if finish else step
            if finish:
                return
            if self._request != request:
                raise UsageError("this stream ended when a newer request or frame came; finish one before the next")

    def _compute(self, visual: AnyArray, places: AnyArray, span: int, text: Ids, counts: Any = None) -> None:
        """Forget what was asked, add visual tokens that take `span` positions, and read text after them."""
        self.rewind()
        newest = self.position + span
        self.layers.prefill(self.kv, visual, text, Positions(places, self.position, newest), counts)
        self._newest, self.position = newest, newest + len(text)
