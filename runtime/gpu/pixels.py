"""Frames as the vision graph takes them, made on the GPU: bytes cross the bus, and the host only copies (what it
would take to compute them: benchmarks/NOTES.md)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from ctypes import c_float, c_int32

import numpy as np
from numpy.typing import NDArray

from dycoke_edge.runtime.gpu.device import Device, DeviceArray
from dycoke_edge.runtime.gpu.kernels import BLOCK, suffix

AT_ONCE = 64 << 20  # bytes of frames that are uploaded together: an upload waits for what the GPU does


def batches(
    device: Device,
    frames: NDArray[np.uint8],
    batch: int,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: type[np.generic],
) -> Iterator[DeviceArray]:
    """uint8 [F, R, R, 3] -> pixels [B, 3, R, R], (x / 255 - mean) / std by channel, B = `batch` or what is left; each
    valid until the next is asked for."""
    count, size = len(frames), frames.shape[1]
    held = min(count, max(1, AT_ONCE // (batch * frames[0].nbytes)) * batch)
    raw = DeviceArray.empty(device, (held, size, size, 3), np.uint8)
    pixels = DeviceArray.empty(device, (min(batch, count), 3, size, size), dtype)
    scale = [c_float(1 / (255 * s)) for s in std]
    shift = [c_float(m / s) for m, s in zip(mean, std, strict=True)]
    for start in range(0, count, held):
        piece = frames[start : start + held]
        raw[: len(piece)] = piece
        for first in range(0, len(piece), batch):
            part = raw[first : min(first + batch, len(piece))]
            grid, name = (-(-size * size // BLOCK), len(part), 1), f"pixels_{suffix(dtype)}"
            device.kernel(name, grid, BLOCK, part, pixels, c_int32(size * size), *scale, *shift)()
            yield pixels[: len(part)]
