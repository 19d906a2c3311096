"""Merge by coverage on a GPU: how alike all tokens of a pair of frames are, by a matrix product, and a block a pair
that picks."""

from __future__ import annotations

from ctypes import c_int32

import numpy as np
from numpy.typing import NDArray

from dycoke_edge.dycoke import PAIR, Counts
from dycoke_edge.runtime.gpu.device import DeviceArray
from dycoke_edge.runtime.gpu.kernels import BLOCK, suffix, warps

COVER_BLOCK = 1024  # threads; of kernels/cover.cu
# kept tokens [M, E]; on the host flat places int32 [M] and counts [2, M]
Found = tuple[DeviceArray, NDArray[np.int32], Counts]


def cover(tokens: DeviceArray, kept: int, active: int) -> Found:
    """Mode "coverage" for tokens [F, N, E], `kept` of every frame. Waits for places and counts."""
    device, (frames, per_frame, width) = tokens.device, tokens.shape
    pairs, odd = divmod(frames, PAIR)
    alike = DeviceArray.empty(device, (pairs + odd, PAIR * per_frame * PAIR * per_frame), np.float32)
    for pair in range(pairs + odd):
        rows = tokens[PAIR * pair : PAIR * (pair + 1)].reshape(-1, width)
        device.product(rows, rows, alike[pair][: len(rows) ** 2].reshape(len(rows), len(rows)))
    return _picked(tokens.reshape(-1, width), alike, 0, frames, per_frame, kept, active)


def cover_frame(frame: DeviceArray, known: DeviceArray | None, kept: int, active: int) -> Found:
    """One frame [N, E]; `known` [m, E] is covered already."""
    device, (per_frame, width), before = frame.device, frame.shape, 0 if known is None else len(known)
    rows = DeviceArray.empty(device, (before + per_frame, width), frame.dtype)
    if known is not None:
        rows[:before] = known
    rows[before:] = frame
    alike = DeviceArray.empty(device, (1, len(rows) ** 2), np.float32)
    device.product(rows, rows, alike[0].reshape(len(rows), len(rows)))
    return _picked(frame, alike, before, 1, per_frame, kept, active)


def _picked(
    tokens: DeviceArray, alike: DeviceArray, known: int, frames: int, per_frame: int, kept: int, active: int
) -> Found:
    """Tokens [F * N, E], and of each pair the products of its rows, the `known` ones first."""
    device, total, width = tokens.device, frames * kept, tokens.shape[1]
    found = DeviceArray.empty(device, (3, total), np.int32)  # together, so that they are waited for once
    index, counts = found[0], found[1:]
    out = DeviceArray.empty(device, (total, width), tokens.dtype)
    sizes = known, frames, per_frame, kept, active
    chosen = alike, c_int32(alike.shape[1]), index, counts
    device.kernel("cover", len(alike), COVER_BLOCK, *chosen, *map(c_int32, sizes))()
    moved = tokens, index, out
    name = f"gather_{suffix(tokens.dtype)}"
    device.kernel(name, warps(total), BLOCK, *moved, c_int32(total), c_int32(width))()
    host = found.numpy()
    return out, host[0], host[1:].astype(np.int64)
