"""Prefill and decode over one KV buffer. Knows token ids and visual tokens only: no text, no pixels."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from dycoke_edge.config import Compression, Sampling
from dycoke_edge.errors import KVOverflow, UsageError
from dycoke_edge.runtime.engine import AnyArray
from dycoke_edge.runtime.kv import Counts, KVBuffer
from dycoke_edge.runtime.step import Side, Step

Array = NDArray[Any]
Ids = NDArray[np.int64]
NO_TEXT: Ids = np.empty(0, np.int64)


@dataclass(frozen=True)
class Prompt:
    """Prefix text, visual tokens, suffix text."""

    prefix: Ids  # [P]
    suffix: Ids  # [Q]; begins with the newline the model puts after a video
    visual: AnyArray | None = None  # [M, E]
    visual_positions: NDArray[np.int32] | None = None  # [M], counted from the span's first position
    visual_span: int = 0  # positions the visual span takes
    counts: Counts | None = None  # [M], for how many tokens each visual one stands; None: nothing is weighed

    @property
    def num_visual(self) -> int:
        """M."""
        return 0 if self.visual is None else len(self.visual)

    @property
    def num_text(self) -> int:
        """P + Q."""
        return len(self.prefix) + len(self.suffix)


class Layers(Protocol):
    """The decoder's layers on memory of their own: what runs a chunk of tokens, or one step, over any KV buffer."""

    embed: Array  # [V+1, E], on the host
    inverse: NDArray[np.float32]  # [D/2] RoPE frequencies

    @property
    def joint(self) -> int:
        """Most tokens of a pass over visual ones and text after them; 0 where a pass takes one kind."""

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

    def chunks(self, kv: KVBuffer, total: int) -> Iterator[slice]:
        """Cut `total` tokens into parts that fit the scratch memory."""

    def forward(
        self,
        kv: KVBuffer,
        embeds: AnyArray,
        positions: NDArray[np.integer],
        side: Side,
        text: Array | None = None,
    ) -> None:
        """Compute tokens, embeds [T, E], and add their rows to a side of the buffer. With `text` [Q, E], which follows
        visual tokens, in one pass: T + Q <= joint positions."""

    def steps(self, kv: KVBuffer, position: int, compression: Compression, sampling: Sampling) -> Iterator[Step]:
        """`max_new_tokens` tokens, the first from `logits`; each is computed when it is asked for, at the earliest
        while the one before is read. `position` is that of the next token."""


class Decoder:
    """One KV buffer, filled part by part and asked again: `begin`, `see` as often as frames come, `answer`, `see`, ...

    Every decoder of a model shares its `Layers`; what was seen and where positions stand is its own. Each call
    overtakes an answer that is still being generated on the same buffer, which then says so.
    """

    def __init__(self, layers: Layers, kv: KVBuffer) -> None:
        self.layers, self.kv = layers, kv
        layers.reserve(kv)
        self.position = 0  # of the next token
        self._prefix = 0  # text rows before the visual ones, which take the first positions
        self._oldest = 0  # position of the oldest visual token
        self._newest = 0  # position after the newest one: where a question begins
        self._request = 0
        self._begun: tuple[Ids, int] | None = None  # a prefix and its text rows, if nothing came after them

    @property
    def logits(self) -> NDArray[np.float32]:
        """fp32 [1, V] of the last token computed, on this buffer or another of the model."""
        return self.layers.logits

    def begin(self, prefix: Ids, text_rows: int) -> None:
        """Forget everything, keep `text_rows` rows for text, prefix [P] included, and compute the prefix."""
        self.clear(text_rows)
        self._text(prefix)
        self._prefix = self._oldest = self._newest = self.position
        self._begun = prefix, text_rows

    def clear(self, text_rows: int) -> None:
        """Forget everything and give its memory back; keep `text_rows` rows for text. `begin` comes next."""
        self._request += 1
        self._begun = None
        self.kv.reset(text_rows)
        self.position = self._prefix = self._oldest = self._newest = 0

    def see(
        self,
        visual: AnyArray,
        positions: NDArray[np.int32],
        span: int,
        counts: Counts | None = None,
    ) -> None:
        """Add visual tokens [M, E]; positions [M] count from the first of the `span` positions that they take.

        `counts` say for how many tokens each visual token stands, those that are there already and these; given once,
        they are given always. A question and its answer are forgotten first: what comes later in the video must not
        see them.
        """
        self._see(visual, positions, span, NO_TEXT, counts)

    def read(self, suffix: Ids) -> None:
        """Compute a question [Q] after all that was seen; `logits` are then those of the answer's first token."""
        self.rewind()
        self._text(suffix)

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
            if self._request == request:
                self.rewind()

    def rewind(self) -> None:
        """Forget the question and the answer; every visual row is active again, unless parked ones were freed."""
        kv = self.kv
        self._request += 1
        self._begun = None
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
        """Compute a prompt in chunks; `logits` then hold the first token's. KVOverflow if it cannot fit whole. A prompt
        that `begin` was given the prefix of goes on from there."""
        text_rows = prompt.num_text + max_new_tokens
        if text_rows + prompt.num_visual > self.kv.capacity:
            raise KVOverflow(text_rows + prompt.num_visual, self.kv.capacity)
        if self._begun is None or self._begun[0] is not prompt.prefix or self._begun[1] != text_rows:
            self.begin(prompt.prefix, text_rows)
        visual, positions, read = prompt.visual, prompt.visual_positions, False
        if visual is not None and positions is not None:
            read = self._see(visual, positions, prompt.visual_span, prompt.suffix, prompt.counts)
        if not read:
            self.read(prompt.suffix)

    def decode(self, prompt: Prompt, compression: Compression, sampling: Sampling) -> Iterator[Step]:
        """Prefill, then yield tokens up to and with a stop token, or `max_new_tokens`."""
        self.prefill(prompt, sampling.max_new_tokens)
        yield from self._generate(compression, sampling)

    def _generate(self, compression: Compression, sampling: Sampling) -> Iterator[Step]:
        """Tokens after what was read; `logits` are those of the first."""
        request, stop = self._request, sampling.stop_token_ids or ()
        for step in self.layers.steps(self.kv, self.position, compression, sampling):
            yield step
            if step.token in stop:
                return
            if self._request != request:
                raise UsageError("this stream ended when a newer request or frame came; finish one before the next")

    def _see(
        self, visual: AnyArray, positions: NDArray[np.int32], span: int, suffix: Ids, counts: Counts | None
    ) -> bool:
        """As `see`; with the last of the visual tokens go those of the suffix, if a pass takes both. True if so."""
        self.rewind()
        kv, layers, begin, text = self.kv, self.layers, self.position, len(suffix)
        joined = False
        self._weigh(counts, 0)  # also where all of a frame was dropped
        for part in layers.chunks(kv, len(visual)):
            self._weigh(counts, part.stop - part.start)
            at = begin + positions[part]
            joined = 0 < text <= layers.joint - (part.stop - part.start) and part.stop == len(visual)
            if joined:
                at = np.concatenate([at, begin + span + np.arange(text)])
            layers.forward(kv, visual[part], at, "left", layers.embed[suffix] if joined else None)
        self._newest = begin + span
        self.position = self._newest + text * joined
        return joined

    def _weigh(self, counts: Counts | None, coming: int) -> None:
        """The visual tokens there are and those that come next."""
        assert self.kv.weighed <= (counts is not None), "all tokens have weights or none has"
        if counts is not None:
            self.kv.weigh(counts[: self.kv.num_visual + coming])

    def _text(self, ids: Ids) -> None:
        for part in self.layers.chunks(self.kv, len(ids)):
            count = part.stop - part.start
            self.layers.forward(self.kv, self.layers.embed[ids[part]], self.position + np.arange(count), "right")
            self.position += count
