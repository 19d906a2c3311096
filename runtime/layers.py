"""The decoder's layers as the bundle's two graphs, on any engine."""

from __future__ import annotations

from collections.abc import Iterator
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dycoke_edge.config import SCRATCH_ROWS, Compression, Sampling
from dycoke_edge.contract import MASKED, ModelSpec
from dycoke_edge.dycoke import Counts, KeepPolicy
from dycoke_edge.errors import EngineError
from dycoke_edge.runtime.engine import AnyArray, Engine, device_of
from dycoke_edge.runtime.gpu.rows import DeviceRows
from dycoke_edge.runtime.kv import KVBuffer
from dycoke_edge.runtime.positions import Positions
from dycoke_edge.runtime.sampling import Sampler
from dycoke_edge.runtime.step import Side, Step

Array = NDArray[Any]
DECODER = ("decoder_shallow", "decoder_deep")


def rope_frequencies(spec: ModelSpec) -> NDArray[np.float32]:
    """fp32 [D/2], as transformers computes them."""
    exponent = np.arange(0, spec.head_dim, 2, dtype=np.float32) / np.float32(spec.head_dim)
    inverse: NDArray[np.float32] = (1.0 / np.float32(spec.rope_theta) ** exponent).astype(np.float32)
    return inverse


class Rope:
    """cos and sin rows for positions (rotate-half RoPE), fp32 arithmetic as in transformers."""

    def __init__(self, spec: ModelSpec, rows: int) -> None:
        half = spec.head_dim // 2
        self.inverse = rope_frequencies(spec)
        self._cos = np.empty((rows, half), spec.numpy_dtype)
        self._sin = np.empty((rows, half), spec.numpy_dtype)

    def __call__(self, positions: NDArray[np.integer]) -> tuple[Array, Array]:
        """positions [T] -> cos, sin [T, D/2], valid until the next call."""
        angles = positions.astype(np.float32)[:, None] * self.inverse
        cos, sin = self._cos[: len(positions)], self._sin[: len(positions)]
        cos[...], sin[...] = np.cos(angles), np.sin(angles)
        return cos, sin


class GraphLayers:
    """Both decoder graphs and their scratch memory, shared by every KV buffer of a model.

    Nothing here outlives a call but `logits`, fp32 [1, V], which hold what the last call computed.
    """

    def __init__(self, spec: ModelSpec, engine: Engine, embed: Array, chunk: int) -> None:
        self.spec, self.engine, self.embed, self.chunk = spec, engine, embed, chunk
        self.rope = Rope(spec, chunk)
        self.inverse = self.rope.inverse
        self.logits = np.empty((1, spec.vocab_size), np.float32)
        self._hidden = np.empty((chunk, spec.hidden_size), spec.numpy_dtype)
        self._empty = np.zeros((1, spec.kv_heads, spec.head_dim), spec.numpy_dtype)
        self._future = np.triu(np.full((chunk, chunk), MASKED, np.float32), 1)
        self._mask = np.empty(chunk * (SCRATCH_ROWS + 1), np.float32)
        self._attention = np.empty(self._mask.size, np.float32)
        self._no_mask = np.zeros((1, 1), np.float32)

    def load(self) -> None:
        """Open both graphs."""
        for graph in DECODER:
            self.engine.load(graph)

    def unload(self) -> None:
        """Close both graphs."""
        for graph in DECODER:
            self.engine.unload(graph)

    def take_bytes(self) -> int:
        """0: the engine counts what graphs move."""
        return 0

    def new_kv(self, capacity: int) -> KVBuffer:
        """A buffer in the engine's memory: a GPU binds its rows where they lie."""
        device = device_of(self.engine)
        return KVBuffer(self.spec, capacity, DeviceRows(device, self.spec, capacity) if device else None)

    def reserve(self, kv: KVBuffer) -> None:
        """Scratch memory for a KV buffer, once for the largest that is served."""
        capacity = kv.capacity
        if capacity + self.chunk > self._mask.size:
            self._mask = np.empty(capacity + self.chunk, np.float32)
            self._attention = np.empty(self._mask.size, np.float32)
        if capacity >= self._no_mask.size:
            self._no_mask = np.zeros((1, capacity + 1), np.float32)

    def prefill(
        self,
        kv: KVBuffer,
        visual: AnyArray,
        text: NDArray[np.int64],
        positions: Positions,
        counts: Counts | None = None,
    ) -> None:
        """Visual tokens [M, E], then text [Q]. A run writes its rows to one place, so that none takes tokens of
        both."""
        at = positions.on_host(len(text))
        self._add(kv, visual, at[: len(visual)], "left", counts)
        self._add(kv, self.embed[text], at[len(visual) :], "right")

    def chunks(self, kv: KVBuffer, total: int) -> Iterator[slice]:
        """Cut `total` tokens into chunks, smaller ones behind many cached rows: scores take T * (S + T) a head."""
        start = 0
        while start < total:
            rows = kv.shallow.stop - kv.shallow.start
            size = max(1, min(self.chunk, self.chunk * SCRATCH_ROWS // (rows + self.chunk), total - start))
            yield slice(start, start + size)
            start += size

    def _add(
        self,
        kv: KVBuffer,
        embeds: AnyArray,
        positions: NDArray[np.integer],
        side: Side,
        counts: Any = None,
    ) -> None:
        """Compute tokens, embeds [T, E], and add their rows to a side of the buffer."""
        grow = kv.grow_left if side == "left" else kv.grow_right
        for part in self.chunks(kv, len(embeds)):
            if counts is not None:
                kv.weigh_next(counts[:, part])
            inputs, rows = self.shallow(kv, embeds[part], positions[part], side)
            self.deep(kv, inputs, rows)
            grow(part.stop - part.start)

    def shallow(
        self, kv: KVBuffer, embeds: AnyArray, positions: NDArray[np.integer], side: Side
    ) -> tuple[dict[str, Array], slice]:
        """Run the shallow layers; returns what the deep ones take and the rows for the new K and V."""
        count = len(embeds)
        rows = kv.left(count) if side == "left" else kv.right(count)
        cos, sin = self.rope(positions)
        common, layers = {"cos": cos, "sin": sin}, range(self.spec.split_layer)
        mask, hidden = self._masked(kv, kv.shallow, rows), self._hidden[:count]
        attention = self._attention[: mask.size].reshape(mask.shape)
        self.engine.run(
            "decoder_shallow",
            {"embeds": embeds, **common, "mask": mask, **self._cached(kv, layers, kv.shallow)},
            {"hidden": hidden, "attention": attention, **_views(kv, "new_", layers, rows)},
        )
        return {"hidden": hidden, **common}, rows

    def deep(self, kv: KVBuffer, inputs: dict[str, Array], rows: slice, decoding: bool = False) -> None:
        """Run the deep layers on what `shallow` returned; `logits` are then those of the last token."""
        layers = range(self.spec.split_layer, self.spec.num_layers)
        self.engine.run(
            "decoder_deep",
            {**inputs, "mask": self._masked(kv, kv.deep, rows, decoding), **self._cached(kv, layers, kv.deep)},
            {"logits": self.logits, **_views(kv, "new_", layers, rows)},
        )
        if not np.isfinite(self.logits.max()):  # max passes NaN on; 8 us for 152,000 logits
            raise EngineError("the model's logits are not finite; run: dycoke-edge verify BUNDLE")

    def steps(self, kv: KVBuffer, position: int, compression: Compression, sampling: Sampling) -> Iterator[Step]:
        """Tokens, each computed when it is asked for."""
        if keeps_cover(kv, compression):
            kv.refresh(kv.covering())
            if compression.free_parked:
                kv.free_parked()
        keep, sampler = _keep_policy(kv, compression), Sampler(sampling)
        step = Step(sampler(self.logits[0]), kv.num_active)
        yield step
        for at in range(position, position + sampling.max_new_tokens - 1):
            step = self._step(kv, step.token, at, keep, compression.free_parked, sampler)
            yield step

    def _step(
        self, kv: KVBuffer, token: int, position: int, keep: KeepPolicy | None, free_parked: bool, sampler: Sampler
    ) -> Step:
        """One decode step: shallow layers, the kept set, deep layers, a token."""
        inputs, rows = self.shallow(kv, self.embed[token : token + 1], np.array([position]), "right")
        began, refreshed, returned = perf_counter(), False, 0
        if keep is not None and not kv.freed:
            active = keep.step(self.visual_attention(kv))
            if keep.refreshed:
                refreshed, returned = True, kv.refresh(active)
            if free_parked:
                kv.free_parked()
        compaction = perf_counter() - began
        self.deep(kv, inputs, rows, decoding=True)
        kv.grow_right(1)
        return Step(sampler(self.logits[0]), kv.num_active, refreshed, returned, compaction)

    def visual_attention(self, kv: KVBuffer, count: int = 1) -> NDArray[np.float32]:
        """Layer L-1's attention of the last of the `count` tokens `shallow` just computed, in order of visual tokens:
        fp32 [M]."""
        columns = kv.shallow.stop - kv.shallow.start + count
        last = self._attention[(count - 1) * columns : count * columns]
        attention: NDArray[np.float32] = last[kv.slot[: kv.num_visual] - kv.shallow.start]
        return attention

    def _cached(self, kv: KVBuffer, layers: range, rows: slice) -> dict[str, Array]:
        """K and V that layers attend to. An empty cache is one row of zeros, which the mask hides: with none,
        onnxruntime 1.23.2 (the last for Python 3.10) divides by zero, and TensorRT profiles begin at one."""
        if rows.start == rows.stop:
            return {f"{name}_{i}": self._empty for i in layers for name in "kv"}
        return _views(kv, "", layers, rows)

    def _masked(self, kv: KVBuffer, rows: slice, new: slice, decoding: bool = False) -> Array:
        """The additive mask [T, S + T]: everything cached is seen, of the new tokens only earlier ones, and each as
        often as it weighs, to deep layers while `decoding` or to all."""
        cached, count = rows.stop - rows.start, new.stop - new.start
        if cached and count == 1 and not kv.weighed:
            return self._no_mask[:, : cached + 1]
        columns = max(cached, 1) + count
        mask = self._mask[: count * columns].reshape(count, columns)
        mask[:, :-count] = 0.0 if cached else MASKED
        mask[:, -count:] = self._future[:count, :count]
        if kv.weighed:
            mask[:, :cached] += kv.bias(rows)[int(decoding)]
            mask[:, -count:] += kv.bias(new)[int(decoding)]
        return mask


def keeps_cover(kv: KVBuffer, compression: Compression) -> bool:
    """Keep is by coverage: the set is known before the first step and stays."""
    return compression.covered_ratio > 0 and kv.weighed and not kv.freed


def _keep_policy(kv: KVBuffer, compression: Compression) -> KeepPolicy | None:
    if compression.prune_ratio == 0 or kv.num_visual == 0 or compression.keep == "coverage":
        return None
    return KeepPolicy(kv.num_visual, compression.prune_ratio, compression.refresh_threshold, compression.mode)


def _views(kv: KVBuffer, prefix: str, layers: range, rows: slice) -> dict[str, Array]:
    keys = {f"{prefix}k_{i}": kv.keys(i, rows) for i in layers}
    return keys | {f"{prefix}v_{i}": kv.values(i, rows) for i in layers}
