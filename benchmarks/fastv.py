"""FastV (arXiv 2403.06764) on the two decoder graphs: the shallow layers see every visual token; those that the
question's last token attends to most, at the cut, go on to the deep layers, once and for the whole answer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dycoke_edge.config import Sampling
from dycoke_edge.contract import MASKED
from dycoke_edge.runtime.kv import KVBuffer
from dycoke_edge.runtime.layers import GraphLayers
from dycoke_edge.runtime.loop import Decoder
from dycoke_edge.runtime.sampling import Sampler
from dycoke_edge.runtime.step import Step

Array = NDArray[Any]


def _graphs(decoder: Decoder) -> tuple[GraphLayers, KVBuffer]:
    assert isinstance(decoder.layers, GraphLayers), "FastV runs the shallow graph without the deep one"
    return decoder.layers, decoder.kv


def see(decoder: Decoder, visual: Array, positions: Array, span: int, counts: Array | None = None) -> Array:
    """Shallow layers over visual tokens [M, E] after `decoder.begin`; returns what the deep ones would take [M, E]."""
    layers, kv = _graphs(decoder)
    decoder.rewind()
    hidden = np.empty_like(visual)
    for part in layers.chunks(kv, len(visual)):
        if counts is not None:
            kv.weigh(counts[:, : part.stop])
        inputs, _ = layers.shallow(kv, visual[part], decoder.position + positions[part], "left")
        hidden[part] = inputs["hidden"]
        kv.grow_left(part.stop - part.start)
    decoder.position = decoder._newest = decoder.position + span
    return hidden


def answer(
    decoder: Decoder,
    hidden: Array,
    suffix: NDArray[np.int64],
    budget: int,
    sampling: Sampling,
    places: NDArray[np.integer],
    chosen: NDArray[np.bool_] | None = None,
) -> Iterator[Step]:
    """Read a question, keep `budget` visual tokens for the deep layers (those `chosen` [M] where it is given), yield
    the answer's tokens, forget both. `places` [M] are positions in the video."""
    layers, kv = _graphs(decoder)
    decoder.rewind()
    prefix = kv.num_text
    positions = decoder.position + np.arange(len(suffix))
    inputs, rows = layers.shallow(kv, layers.embed[suffix], positions, "right")
    inputs = {name: array.copy() for name, array in inputs.items()}  # scratch, which the next call overwrites
    attention = layers.visual_attention(kv, len(suffix))
    active = np.zeros(kv.num_visual, np.bool_) if chosen is None else chosen
    if chosen is None:
        active[np.argsort(-attention, kind="stable")[:budget]] = True
    kv.refresh(active)
    _deepen(decoder, hidden, active, prefix, places)
    layers.deep(kv, inputs, rows)
    kv.grow_right(len(suffix))
    decoder.position += len(suffix)
    sampler, stop = Sampler(sampling), sampling.stop_token_ids or ()
    token = sampler(decoder.logits[0])
    for left in range(sampling.max_new_tokens - 1, -1, -1):
        yield Step(token, kv.num_active)
        if token in stop or not left:
            break
        layers.deep(kv, *layers.shallow(kv, layers.embed[token : token + 1], np.array([decoder.position]), "right"))
        kv.grow_right(1)
        decoder.position += 1
        token = sampler(decoder.logits[0])
    decoder.rewind()


def _deepen(
    decoder: Decoder, hidden: Array, active: NDArray[np.bool_], prefix: int, places: NDArray[np.integer]
) -> None:
    """Compute the deep layers' K and V of the active tokens, in order, behind the prefix; put them in their rows."""
    layers, kv = _graphs(decoder)
    spec, count = layers.spec, int(active.sum())
    deep = range(spec.split_layer, spec.num_layers)
    before = slice(kv.origin, kv.origin + prefix)
    mask = np.concatenate((np.zeros((count, prefix)), np.triu(np.full((count, count), MASKED), 1)), 1)
    if kv.weighed:
        mask[:, prefix:] += np.log(kv.counts[0, active])
    angles = (prefix + places[active]).astype(np.float32)[:, None] * layers.rope.inverse
    new = {
        f"new_{kind}_{i}": np.empty((count, spec.kv_heads, spec.head_dim), kv.slab.dtype) for i in deep for kind in "kv"
    }
    cached = {f"k_{i}": kv.keys(i, before) for i in deep} | {f"v_{i}": kv.values(i, before) for i in deep}
    inputs = {"hidden": hidden[active], "cos": np.cos(angles), "sin": np.sin(angles)}
    typed = {name: array.astype(spec.numpy_dtype, copy=False) for name, array in inputs.items()}
    logits = np.empty((1, spec.vocab_size), np.float32)
    layers.engine.run("decoder_deep", {**typed, "mask": mask.astype(np.float32), **cached}, {"logits": logits, **new})
    rows = kv.slot[: kv.num_visual][active]
    for i in deep:
        kv.slab[2 * i, rows], kv.slab[2 * i + 1, rows] = new[f"new_k_{i}"], new[f"new_v_{i}"]
