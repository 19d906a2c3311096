"""Merge (stage 1) on a GPU: three launches, for a whole clip too, where a graph would be run once a compared frame."""

from __future__ import annotations

from ctypes import c_int32

import numpy as np
from numpy.typing import DTypeLike, NDArray

from dycoke_edge.dycoke import kept_per_frame, merged_layout
from dycoke_edge.runtime.gpu.device import DeviceArray
from dycoke_edge.runtime.gpu.kernels import BLOCK, suffix, warps

MOST_TOKENS = 1024  # a frame's, a thread each


def merge(tokens: DeviceArray, merge_ratio: float) -> tuple[DeviceArray, DeviceArray]:
    """Mode "paper" for tokens [F, N, E]: the kept ones [M, E] and their flat indices [M] into F*N."""
    kept = kept_per_frame(tokens.shape[1], merge_ratio)
    return _merged(tokens, tokens, *merged_layout(len(tokens), tokens.shape[1], kept), kept)


def merge_frame(anchor: DeviceArray, frame: DeviceArray, merge_ratio: float) -> tuple[DeviceArray, DeviceArray]:
    """One frame [N, E] against its anchor: the kept tokens [m, E] and their places [m]."""
    kept = kept_per_frame(len(frame), merge_ratio)
    return _merged(frame[None], anchor[None], np.zeros(1, np.int32), np.full(1, kept, np.int32), kept)


def merge_pairs(references: DeviceArray, frames: DeviceArray, kept: int) -> tuple[DeviceArray, NDArray[np.int32]]:
    """What a merge graph does: of each frame [B, N, E] the tokens [B, m, E] least similar to its reference [B, N, E],
    and their places [B, m]; waits for these."""
    pairs, per_frame, width = frames.shape
    numbers = np.arange(pairs, dtype=np.int32)
    out, index = _merged(frames, references, numbers, np.full(pairs, kept, np.int32), kept)
    places = index.numpy().reshape(pairs, kept) - numbers[:, None] * np.int32(per_frame)
    return out.reshape(pairs, kept, width), places


def _merged(
    tokens: DeviceArray, references: DeviceArray, anchor: NDArray[np.int32], sizes: NDArray[np.int32], kept: int
) -> tuple[DeviceArray, DeviceArray]:
    """Of frame f, `sizes[f]` tokens stay: all, or those least similar to number `anchor[f]` of the references."""
    device, (frames, per_frame, width), of = tokens.device, tokens.shape, suffix(tokens.dtype)
    start, rows = (np.cumsum(sizes) - sizes).astype(np.int32), int(sizes.sum())
    compared, begins = DeviceArray.of(device, anchor), DeviceArray.of(device, start)
    similarity = DeviceArray.empty(device, (frames, per_frame), np.float32)
    index, out = DeviceArray.empty(device, (rows,), np.int32), DeviceArray.empty(device, (rows, width), tokens.dtype)

    shape = c_int32(frames), c_int32(per_frame), c_int32(width)
    args = tokens, references, compared, similarity
    device.kernel(f"similarity_{of}", warps(frames * per_frame), BLOCK, *args, *shape)()
    chosen = similarity, compared, begins, index
    threads = -(-per_frame // 32) * 32
    device.kernel("least_similar", frames, threads, *chosen, c_int32(per_frame), c_int32(kept))()
    moved = tokens, index, out
    device.kernel(f"gather_{of}", warps(rows), BLOCK, *moved, c_int32(rows), c_int32(width))()
    return out, index


def covers(per_frame: int, width: int, dtype: DTypeLike) -> bool:
    """Whether the kernels take frames of so many tokens, `width` numbers each."""
    return per_frame <= MOST_TOKENS and width * np.dtype(dtype).itemsize % 16 == 0
