"""The decoder's layers as kernels of our own, over KV buffers in a GPU's memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dycoke_edge.bundle import Bundle
from dycoke_edge.config import Compression, Sampling
from dycoke_edge.dycoke import Counts
from dycoke_edge.runtime.gpu.cover import DeviceCounts
from dycoke_edge.runtime.gpu.decode import DecodeScratch, DecodeStep
from dycoke_edge.runtime.gpu.device import Device, DeviceArray
from dycoke_edge.runtime.gpu.prefill import Prefill
from dycoke_edge.runtime.gpu.records import not_finite
from dycoke_edge.runtime.gpu.rows import DeviceRows
from dycoke_edge.runtime.gpu.state import KEEP
from dycoke_edge.runtime.gpu.weights import Weights
from dycoke_edge.runtime.kv import KVBuffer
from dycoke_edge.runtime.layers import keeps_cover, rope_frequencies
from dycoke_edge.runtime.positions import Positions
from dycoke_edge.runtime.sampling import Sampler
from dycoke_edge.runtime.step import Step

Array = NDArray[Any]
AHEAD = 2  # steps that the GPU may have begun before the host has read the first of them


class KernelLayers:
    """Weights and scratch memory on the GPU, shared by every KV buffer of a model.

    `captured` makes a decode step one launch; otherwise its kernels are launched one by one, with the same tokens.
    """

    def __init__(self, bundle: Bundle, device: Device, chunk: int, captured: bool) -> None:
        self.spec, self.device, self.captured = bundle.model, device, captured
        self.inverse = rope_frequencies(self.spec)
        inverse = DeviceArray.of(device, self.inverse)
        self.weights = Weights(device, bundle)
        self._prefill = Prefill(device, self.weights, inverse, min(chunk, self.spec.max_positions))
        self._scratch = DecodeScratch(device, self.weights, inverse)
        self._moved = 0

    @property
    def logits(self) -> NDArray[np.float32]:
        """fp32 [1, V] of the last token computed; waits. EngineError if they are not finite."""
        self._scratch.logits_of(self._prefill.x)()
        logits: NDArray[np.float32] = self._scratch.logits.numpy()[None]
        if not np.isfinite(logits.max()):
            raise not_finite()
        return logits

    def load(self) -> None:
        """Nothing: the weights were uploaded when this was made."""

    def unload(self) -> None:
        """Nothing: to upload them again takes longer than a short answer."""

    def take_bytes(self) -> int:
        """Weights once a step or chunk, cached rows once where they are attended to."""
        moved, self._moved = self._moved, 0
        return moved

    def new_kv(self, capacity: int) -> KVBuffer:
        """A buffer in the GPU's memory."""
        return KVBuffer(self.spec, capacity, DeviceRows(self.device, self.spec, capacity))

    def reserve(self, kv: KVBuffer) -> None:
        """Nothing: scratch memory is for a chunk, whatever the buffer holds."""

    def prefill(
        self,
        kv: KVBuffer,
        visual: Array | DeviceArray,
        text: NDArray[np.int64],
        positions: Positions,
        counts: Counts | DeviceCounts | None = None,
    ) -> None:
        """Visual tokens [M, E], on the host or on this GPU, then text [Q]: as few passes as the scratch memory
        allows, of which one may take tokens of both. Waits for nothing."""
        seen, chunk = len(visual), self._prefill.chunk
        for start in range(0, seen + len(text), chunk):
            stop = start + chunk
            new, said = visual[start:stop], text[max(start - seen, 0) : max(stop - seen, 0)]
            if counts is not None:
                kv.weigh_next(counts[:, start : start + len(new)])
            at = Positions(positions.places[start:stop], positions.first, positions.text + max(start - seen, 0))
            self._prefill.run(kv, new, said, at)
            self._count(kv, len(new) + len(said))
            if len(new):
                kv.grow_left(len(new))
            kv.grow_right(len(said))

    def steps(self, kv: KVBuffer, position: int, compression: Compression, sampling: Sampling) -> Iterator[Step]:
        """Tokens. Greedy ones are computed ahead of being read, so that the GPU never waits for the host."""
        attends = compression.keep == "attention" and compression.prune_ratio > 0
        choosing = attends and kv.num_visual > 0 and not kv.freed
        covers = keeps_cover(kv, compression)
        step, sampler, most = self._step(kv, choosing), Sampler(sampling), sampling.max_new_tokens
        self._begin(step, kv, position, compression, choosing)
        greedy, first = sampling.temperature == 0, step.records.count
        step.first(self._prefill.x)
        for read in range(most):
            ahead = AHEAD if greedy and read else 0  # not before the first, which somebody may be timing
            if covers and read == 1:  # the GPU is done with the first token, and with what was counted
                kv.refresh(kv.covering())
                kv.freed = compression.free_parked
                step.records.tell("num_active", kv.num_active)
            while step.records.count - first < min(most, read + 1 + ahead):
                step.next(self.captured)
                self._count(kv, 1)
            record = step.records.wait(first + read)
            if read:
                kv.grow_right(1)
                kv.num_active = int(record["active"])
                kv.freed |= choosing and compression.free_parked
            token = int(record["token"])
            if not greedy:  # drawn on the host, then told to the GPU
                token = sampler(self._scratch.logits.numpy())
                step.records.tell("token", token)
            yield Step(token, kv.num_active, bool(record["refreshed"]), int(record["swaps"]), None)

    def _begin(self, step: DecodeStep, kv: KVBuffer, position: int, compression: Compression, choosing: bool) -> None:
        """Tell the GPU where it stands."""
        assert isinstance(kv.rows, DeviceRows)
        if choosing:
            kv.rows.decide(kv.slot[: kv.num_visual])
        step.records.begin(
            position=position,
            origin=kv.origin,
            num_visual=kv.num_visual,
            num_active=kv.num_active,
            num_text=kv.num_text,
            keep=KEEP[compression.mode if choosing else "off"],
            num_keep=int(kv.num_visual * (1 - compression.prune_ratio)),
            first=1,
            one_shot=compression.free_parked,
            threshold=compression.refresh_threshold,
        )

    def _count(self, kv: KVBuffer, new: int) -> None:
        """Bytes of one pass; of what it attends to as the host knows it, a step or two behind."""
        row, cut = self.spec.kv_bytes_per_token // self.spec.num_layers, self.spec.split_layer
        shallow, deep = (rows.stop - rows.start + new for rows in (kv.shallow, kv.deep))
        self._moved += self.weights.nbytes + row * (cut * shallow + (self.spec.num_layers - cut) * deep)

    def _step(self, kv: KVBuffer, choosing: bool) -> DecodeStep:
        assert isinstance(kv.rows, DeviceRows)
        kind = choosing, kv.weighed
        if kind not in kv.rows.steps:
            kv.rows.steps[kind] = DecodeStep(self._scratch, kv.rows, choosing)
        step: DecodeStep = kv.rows.steps[kind]
        return step
