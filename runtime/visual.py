"""From frames to the visual tokens that enter the decoder: encode, then merge (stage 1).

Tokens stay in the engine's memory, which may be a GPU's, and so may the places of those kept: who needs these on the
host takes `np.asarray` of them, which waits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dycoke_edge import dycoke
from dycoke_edge.bundle import Bundle
from dycoke_edge.config import Compression
from dycoke_edge.dycoke import (
    Counts,
    active_per_frame,
    coverage,
    covered_per_frame,
    kept_per_frame,
    merge_indices,
    merged_layout,
    stands_for,
)
from dycoke_edge.runtime.engine import AnyArray, Engine, device_of
from dycoke_edge.runtime.gpu import merge as on_gpu
from dycoke_edge.runtime.gpu.cover import DeviceCounts
from dycoke_edge.runtime.gpu.cover import cover as cover_on_gpu
from dycoke_edge.runtime.gpu.cover import cover_frame as cover_frame_on_gpu
from dycoke_edge.runtime.gpu.device import DeviceArray
from dycoke_edge.runtime.gpu.pixels import batches
from dycoke_edge.runtime.video import to_pixels


def encode(
    bundle: Bundle,
    engine: Engine,
    frames: NDArray[np.uint8],
    batch: int,
    on_frame: Callable[[int, int], None] = lambda done, total: None,
) -> AnyArray:
    """frames uint8 [F, R, R, 3] -> tokens [F, N, E], `batch` frames at a time, written where they stay."""
    spec = bundle.model
    tokens = engine.empty((len(frames), spec.tokens_per_frame, spec.hidden_size), spec.numpy_dtype)
    done = 0
    for pixels in _pixels(bundle, engine, frames, batch):
        part = slice(done, done + len(pixels))
        engine.run("vision", {"pixels": pixels}, {"tokens": tokens[part]})
        done = part.stop
        on_frame(done, len(frames))
    return tokens


def _pixels(bundle: Bundle, engine: Engine, frames: NDArray[np.uint8], batch: int) -> Iterator[AnyArray]:
    """What the vision graph takes, `batch` frames at a time, in the bundle's dtype."""
    manifest, dtype, device = bundle.manifest, bundle.model.numpy_dtype, device_of(engine)
    if device is not None:
        yield from batches(device, frames, batch, manifest.image_mean, manifest.image_std, dtype)
        return
    for start in range(0, len(frames), batch):
        pixels = to_pixels(frames[start : start + batch], manifest.image_mean, manifest.image_std)
        yield pixels.astype(dtype, copy=False)


@dataclass(frozen=True)
class Merged:
    """What merge keeps: tokens [M, E], their flat places int32 [M] in F*N (of one frame: in N), and for how many tokens
    each stands, int64 [2, M] as `dycoke.Covered` has them; None where nothing is counted."""

    tokens: AnyArray
    index: AnyArray
    counts: Counts | DeviceCounts | None = None


def merge(bundle: Bundle, engine: Engine, tokens: AnyArray, compression: Compression) -> Merged:
    """Stage 1 for a clip's tokens [F, N, E]."""
    if not compression.merges:
        return Merged(tokens.reshape(-1, tokens.shape[-1]), np.arange(math.prod(tokens.shape[:2]), dtype=np.int32))
    if compression.mode == "coverage":
        return _cover(engine, tokens, compression)
    kept, index = _merge_by_ratio(bundle, engine, tokens, compression)
    if not compression.counted:
        return Merged(kept, index)
    counts = stands_for(np.asarray(index), *tokens.shape[:2])
    return Merged(kept, index, np.stack((counts, counts)))


def _cover(engine: Engine, tokens: AnyArray, compression: Compression) -> Merged:
    if isinstance(tokens, DeviceArray) and on_gpu.covers(tokens.shape[1], tokens.shape[2], tokens.dtype):
        return Merged(*cover_on_gpu(tokens, *_sizes(tokens.shape[1], compression)))
    host = np.asarray(tokens)
    index, counts = coverage(host, compression.budget, compression.covered_ratio)
    return Merged(_placed(engine, host.reshape(-1, host.shape[-1])[index]), index, counts)


def _sizes(per_frame: int, compression: Compression) -> tuple[int, int]:
    """Of a frame, the tokens that stay and those of them that stay active."""
    kept = covered_per_frame(per_frame, compression.budget)
    return kept, active_per_frame(kept, compression.covered_ratio)


def cover_frame(engine: Engine, frame: AnyArray, known: AnyArray | None, compression: Compression) -> Merged:
    """Mode "coverage" for one frame [N, E]; `known` [m, E] is what was kept of the first frame of its pair."""
    kept, active = _sizes(len(frame), compression)
    if isinstance(frame, DeviceArray) and on_gpu.covers(len(frame), frame.shape[1], frame.dtype):
        assert known is None or isinstance(known, DeviceArray)
        return Merged(*cover_frame_on_gpu(frame, known, kept, active))
    host = np.asarray(frame)
    covered = dycoke.cover_frame(host, None if known is None else np.asarray(known), kept, active)
    return Merged(_placed(engine, host[covered.places]), covered.places, covered.counts)


def _merge_by_ratio(
    bundle: Bundle, engine: Engine, tokens: AnyArray, compression: Compression
) -> tuple[AnyArray, AnyArray]:
    """Modes "paper" and "official": kept tokens [M, E] and their flat indices int32 [M] into F*N."""
    graph = bundle.merge_graph(compression.merge_ratio)
    if compression.mode == "paper" and isinstance(tokens, DeviceArray) and _own(engine, tokens):
        return on_gpu.merge(tokens, compression.merge_ratio)
    if compression.mode == "official" or graph is None:
        # only for comparison, or nothing to rank: the reference itself
        host = np.asarray(tokens)
        index = merge_indices(host, compression.merge_ratio, compression.mode)
        return _placed(engine, host.reshape(-1, host.shape[-1])[index]), index
    return _merge_by_graph(engine, graph, tokens, kept_per_frame(tokens.shape[1], compression.merge_ratio))


def merge_frame(
    bundle: Bundle, engine: Engine, anchor: AnyArray | None, frame: AnyArray, merge_ratio: float
) -> tuple[AnyArray, AnyArray]:
    """One frame [N, E] against its anchor, mode "paper" -> kept tokens [m, E] and their places [m] in the frame.

    Without an anchor, or with merge_ratio 0, the frame is kept whole.
    """
    if anchor is None or merge_ratio == 0:
        return frame, np.arange(len(frame), dtype=np.int32)
    graph, count = bundle.merge_graph(merge_ratio), kept_per_frame(len(frame), merge_ratio)
    if graph is not None and isinstance(frame, DeviceArray) and _own(engine, frame[None]):
        assert isinstance(anchor, DeviceArray)
        return on_gpu.merge_frame(anchor, frame, merge_ratio)
    kept, index = engine.empty((count, frame.shape[1]), frame.dtype), np.arange(count, dtype=np.int32)
    if graph is None:  # nothing to rank: none of it stays, or all
        kept[...] = frame[:count]
    else:
        _run_merge(engine, graph, anchor, frame, kept, index)
    return kept, index


def _own(engine: Engine, tokens: DeviceArray) -> bool:
    """Whether kernels of our own merge: TensorRT has plans for it."""
    return engine.provider == "cuda" and on_gpu.covers(tokens.shape[1], tokens.shape[2], tokens.dtype)


def _merge_by_graph(engine: Engine, graph: str, tokens: AnyArray, kept: int) -> tuple[AnyArray, AnyArray]:
    num_frames, per_frame, width = tokens.shape
    anchor, sizes = merged_layout(num_frames, per_frame, kept)
    ends = np.cumsum(sizes).tolist()
    out, places = engine.empty((ends[-1], width), tokens.dtype), engine.empty((ends[-1],), np.int32)
    for frame, (end, size) in enumerate(zip(ends, sizes.tolist(), strict=True)):
        rows, here = out[end - size : end], places[end - size : end]
        if anchor[frame] >= 0:
            _run_merge(engine, graph, tokens[int(anchor[frame])], tokens[frame], rows, here)
        else:
            rows[...], here[...] = tokens[frame], np.arange(per_frame, dtype=np.int32)
    index = np.asarray(places) + np.repeat(np.arange(num_frames, dtype=np.int32) * per_frame, sizes)
    return out, index.astype(np.int32, copy=False)


def _placed(engine: Engine, rows: NDArray[Any]) -> AnyArray:
    """Rows of the host in the engine's memory."""
    out = engine.empty(rows.shape, rows.dtype)
    out[...] = rows
    return out


def _run_merge(engine: Engine, graph: str, anchor: AnyArray, frame: AnyArray, kept: AnyArray, index: AnyArray) -> None:
    pair = {"reference": anchor[None], "frame": frame[None]}
    engine.run(graph, pair, {"kept": kept[None], "index": index[None]})
