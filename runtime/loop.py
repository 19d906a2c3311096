"""Prefill and decode over the two decoder graphs. Knows token ids and visual tokens only: no text, no pixels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from dycoke_edge.config import SCRATCH_ROWS, Compression, Sampling
from dycoke_edge.contract import MASKED, ModelSpec
from dycoke_edge.dycoke import KeepPolicy
from dycoke_edge.errors import EngineError, KVOverflow, UsageError
from dycoke_edge.runtime.engine import Engine
from dycoke_edge.runtime.kv import KVBuffer
from dycoke_edge.runtime.sampling import Sampler

Array = NDArray[Any]
Ids = NDArray[np.int64]
Side = Literal["left", "right"]


@dataclass(frozen=True)
class Prompt:
    """Prefix text, visual tokens, suffix text."""

    prefix: Ids  # [P]
    suffix: Ids  # [Q]; begins with the newline the model puts after a video
    visual: Array | None = None  # [M, E]
    visual_positions: NDArray[np.int32] | None = None  # [M], counted from the span's first position
    visual_span: int = 0  # positions the visual span takes

    @property
    def num_visual(self) -> int:
        """M."""
        return 0 if self.visual is None else len(self.visual)

    @property
    def num_text(self) -> int:
        """P + Q."""
        return len(self.prefix) + len(self.suffix)


@dataclass(frozen=True)
class Step:
    """One token and what producing it took. `active` counts visual rows that deep layers attended to."""

    token: int
    active: int
    refreshed: bool = False
    returned: int = 0  # row pairs exchanged: parked rows that came back
    compaction: float = 0.0  # seconds


class Rope:
    """cos and sin rows for positions (rotate-half RoPE), fp32 arithmetic as in transformers."""

    def __init__(self, spec: ModelSpec, rows: int) -> None:
        half = spec.head_dim // 2
        exponent = np.arange(0, spec.head_dim, 2, dtype=np.float32) / np.float32(spec.head_dim)
        self._inverse = (1.0 / np.float32(spec.rope_theta) ** exponent).astype(np.float32)
        self._cos = np.empty((rows, half), spec.numpy_dtype)
        self._sin = np.empty((rows, half), spec.numpy_dtype)

    def __call__(self, positions: NDArray[np.integer]) -> tuple[Array, Array]:
        """positions [T] -> cos, sin [T, D/2], valid until the next call."""
        angles = positions.astype(np.float32)[:, None] * self._inverse
        cos, sin = self._cos[: len(positions)], self._sin[: len(positions)]
        cos[...], sin[...] = np.cos(angles), np.sin(angles)
        return cos, sin


class Decoder:
    """Runs one request at a time over memory allocated here: T tokens at once while prefilling, one while decoding."""

    def __init__(self, spec: ModelSpec, engine: Engine, embed: Array, kv: KVBuffer, chunk: int) -> None:
        self.spec, self.engine, self.embed, self.kv, self.chunk = spec, engine, embed, kv, chunk
        self.rope = Rope(spec, chunk)
        self.logits = np.empty((1, spec.vocab_size), np.float32)
        self._hidden = np.empty((chunk, spec.hidden_size), spec.numpy_dtype)
        scratch = max(chunk * (SCRATCH_ROWS + 1), kv.capacity + chunk)
        self._mask = np.empty(scratch, np.float32)
        self._attention = np.empty(scratch, np.float32)
        self._empty = np.zeros((1, spec.kv_heads, spec.head_dim), spec.numpy_dtype)
        self._no_mask = np.zeros((1, kv.capacity + 1), np.float32)
        self._future = np.triu(np.full((chunk, chunk), MASKED, np.float32), 1)
        self._position = 0
        self._request = 0

    def prefill(self, prompt: Prompt, max_new_tokens: int) -> None:
        """Compute a prompt in chunks; `logits` then holds the first token's. KVOverflow if it cannot fit whole."""
        text_rows = prompt.num_text + max_new_tokens
        if text_rows + prompt.num_visual > self.kv.capacity:
            raise KVOverflow(text_rows + prompt.num_visual, self.kv.capacity)
        self._request += 1
        self.kv.reset(text_rows)
        self._position = 0
        self._text(prompt.prefix)
        if prompt.visual is not None and prompt.visual_positions is not None:
            for part in self._chunks(prompt.num_visual):
                self._forward(prompt.visual[part], self._position + prompt.visual_positions[part], "left")
            self._position += prompt.visual_span
        self._text(prompt.suffix)

    def decode(self, prompt: Prompt, compression: Compression, sampling: Sampling) -> Iterator[Step]:
        """Prefill, then yield tokens up to and with a stop token, or `max_new_tokens`."""
        self.prefill(prompt, sampling.max_new_tokens)
        request = self._request
        keep = self._keep_policy(prompt, compression)
        sampler, stop = Sampler(sampling), sampling.stop_token_ids or ()
        step = Step(sampler(self.logits[0]), self.kv.num_active)
        for left in range(sampling.max_new_tokens - 1, -1, -1):
            yield step
            if step.token in stop:
                return
            if self._request != request:
                raise UsageError("this stream ended when a newer request began; finish one before the next is asked")
            if left:
                step = self._next(step.token, keep, compression.free_parked, sampler)

    def _keep_policy(self, prompt: Prompt, compression: Compression) -> KeepPolicy | None:
        if compression.prune_ratio == 0 or prompt.num_visual == 0:
            return None
        return KeepPolicy(prompt.num_visual, compression.prune_ratio, compression.refresh_threshold, compression.mode)

    def _next(self, token: int, keep: KeepPolicy | None, free_parked: bool, sampler: Sampler) -> Step:
        """One decode step: shallow layers, the kept set, deep layers, a token."""
        kv = self.kv
        inputs, rows = self._shallow(self.embed[token : token + 1], np.array([self._position]), "right")
        began, refreshed, returned = perf_counter(), False, 0
        if keep is not None and not kv.freed:
            active = keep.step(self._visual_attention())
            if keep.refreshed:
                refreshed, returned = True, kv.refresh(active)
            if free_parked:
                kv.free_parked()
        compaction = perf_counter() - began
        self._deep(inputs, rows)
        kv.grow_right(1)
        self._position += 1
        return Step(sampler(self.logits[0]), kv.num_active, refreshed, returned, compaction)

    def _text(self, ids: Ids) -> None:
        for part in self._chunks(len(ids)):
            count = part.stop - part.start
            self._forward(self.embed[ids[part]], self._position + np.arange(count), "right")
            self._position += count

    def _chunks(self, total: int) -> Iterator[slice]:
        """Cut `total` tokens into chunks, smaller ones behind many cached rows: scores take T * (S + T) a head."""
        start = 0
        while start < total:
            rows = self.kv.shallow.stop - self.kv.shallow.start
            size = max(1, min(self.chunk, self.chunk * SCRATCH_ROWS // (rows + self.chunk), total - start))
            yield slice(start, start + size)
            start += size

    def _forward(self, embeds: Array, positions: NDArray[np.integer], side: Side) -> None:
        inputs, rows = self._shallow(embeds, positions, side)
        self._deep(inputs, rows)
        grow = self.kv.grow_left if side == "left" else self.kv.grow_right
        grow(len(embeds))

    def _shallow(self, embeds: Array, positions: NDArray[np.integer], side: Side) -> tuple[dict[str, Array], slice]:
        """Run the shallow layers; returns what the deep ones take and the rows for the new K and V."""
        kv, count = self.kv, len(embeds)
        rows = kv.left(count) if side == "left" else kv.right(count)
        cos, sin = self.rope(positions)
        common, layers = {"cos": cos, "sin": sin}, range(self.spec.split_layer)
        mask, hidden = self._masked(count, kv.shallow), self._hidden[:count]
        attention = self._attention[: mask.size].reshape(mask.shape)
        self.engine.run(
            "decoder_shallow",
            {"embeds": embeds, **common, "mask": mask, **self._cached(layers, kv.shallow)},
            {"hidden": hidden, "attention": attention, **self._new(layers, rows)},
        )
        return {"hidden": hidden, **common}, rows

    def _deep(self, inputs: dict[str, Array], rows: slice) -> None:
        kv, count, layers = self.kv, rows.stop - rows.start, range(self.spec.split_layer, self.spec.num_layers)
        self.engine.run(
            "decoder_deep",
            {**inputs, "mask": self._masked(count, kv.deep), **self._cached(layers, kv.deep)},
            {"logits": self.logits, **self._new(layers, rows)},
        )
        if not np.isfinite(self.logits.max()):  # max passes NaN on; 8 us for 152,000 logits
            raise EngineError("the model's logits are not finite; run: dycoke-edge verify BUNDLE")

    def _cached(self, layers: range, rows: slice) -> dict[str, Array]:
        """K and V that layers attend to. An empty cache is one row of zeros, which the mask hides: with none,
        onnxruntime 1.23.2 (the last for Python 3.10) divides by zero, and TensorRT profiles begin at one."""
        if rows.start == rows.stop:
            return {f"{kv}_{i}": self._empty for i in layers for kv in "kv"}
        return self._views("", layers, rows)

    def _new(self, layers: range, rows: slice) -> dict[str, Array]:
        return self._views("new_", layers, rows)

    def _views(self, prefix: str, layers: range, rows: slice) -> dict[str, Array]:
        kv = self.kv
        keys = {f"{prefix}k_{i}": kv.keys(i, rows) for i in layers}
        return keys | {f"{prefix}v_{i}": kv.values(i, rows) for i in layers}

    def _masked(self, count: int, rows: slice) -> Array:
        """The additive mask [count, S + count]: everything cached is seen, of the new tokens only earlier ones."""
        cached = rows.stop - rows.start
        if cached and count == 1:
            return self._no_mask[:, : cached + 1]
        columns = max(cached, 1) + count
        mask = self._mask[: count * columns].reshape(count, columns)
        mask[:, :-count] = 0.0 if cached else MASKED
        mask[:, -count:] = self._future[:count, :count]
        return mask

    def _visual_attention(self) -> NDArray[np.float32]:
        """Layer L-1's attention of the token just computed, in order of visual tokens: fp32 [M]."""
        kv = self.kv
        attention: NDArray[np.float32] = self._attention[kv.slot[: kv.num_visual] - kv.shallow.start]
        return attention
