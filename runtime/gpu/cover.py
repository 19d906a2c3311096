"""Merge by coverage on a GPU: how alike all tokens of a pair of frames are, by a matrix product, and a block a pair
that picks."""

from __future__ import annotations

from ctypes import c_int32

import numpy as np

from dycoke_edge.dycoke import PAIR, Counts
from dycoke_edge.runtime.gpu.device import DeviceArray
from dycoke_edge.runtime.gpu.kernels import BLOCK, suffix, warps

COVER_BLOCK = 1024  # threads; of kernels/cover.cu


class DeviceCounts:
    """Counts [2, n] in a GPU's memory: some columns of an array int32 [2, M], taken as numpy takes them."""

    def __init__(self, counts: DeviceArray, first: int, stop: int, whole: DeviceCounts | None = None) -> None:
        self.array, self.first, self.shape = counts, first, (2, stop - first)
        self._whole = whole or self
        self._host: Counts | None = None  # fetched once for all parts

    def __getitem__(self, key: tuple[slice, slice]) -> DeviceCounts:
        """`[:, a:b]`, and nothing else."""
        rows, columns = key
        assert rows == slice(None), "both rows go together"
        start, stop, _ = columns.indices(self.shape[1])
        return DeviceCounts(self.array, self.first + start, self.first + max(start, stop), self._whole)

    def numpy(self) -> Counts:
        """int64 on the host; waits, once for all parts of an array."""
        whole = self._whole
        if whole._host is None:
            whole._host = self.array.numpy().astype(np.int64)
        return whole._host[:, self.first : self.first + self.shape[1]]


Found = tuple[DeviceArray, DeviceArray, DeviceCounts]  # kept tokens [M, E], flat places int32 [M], counts [2, M]


def cover(tokens: DeviceArray, kept: int, active: int) -> Found:
    """Mode "coverage" for tokens [F, N, E], `kept` of every frame."""
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
    index = DeviceArray.empty(device, (total,), np.int32)
    counts = DeviceArray.empty(device, (2, total), np.int32)
    out = DeviceArray.empty(device, (total, width), tokens.dtype)
    sizes = known, frames, per_frame, kept, active
    chosen = alike, c_int32(alike.shape[1]), index, counts
    device.kernel("cover", len(alike), COVER_BLOCK, *chosen, *map(c_int32, sizes))()
    moved = tokens, index, out
    name = f"gather_{suffix(tokens.dtype)}"
    device.kernel(name, warps(total), BLOCK, *moved, c_int32(total), c_int32(width))()
    return out, index, DeviceCounts(counts, 0, total)
