"""Frames as the vision graph takes them, made on the GPU: bytes cross the bus, and the host only copies (what it
would take to compute them: benchmarks/NOTES.md)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from ctypes import c_float, c_int32

import numpy as np
from numpy.typing import NDArray

from dycoke_edge.runtime.gpu.device import Device, DeviceArray
from dycoke_edge.runtime.gpu.kernels import BLOCK, suffix


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
    size, held = frames.shape[1], min(batch, len(frames))
    raw = DeviceArray.empty(device, (held, size, size, 3), np.uint8)
    pixels = DeviceArray.empty(device, (held, 3, size, size), dtype)
    scale = [c_float(1 / (255 * s)) for s in std]
    shift = [c_float(m / s) for m, s in zip(mean, std, strict=True)]
    for start in range(0, len(frames), batch):  # a batch is copied while the GPU encodes those before
        part = frames[start : start + batch]
        raw[: len(part)] = part
        grid, name = (-(-size * size // BLOCK), len(part), 1), f"pixels_{suffix(dtype)}"
        device.kernel(name, grid, BLOCK, raw, pixels, c_int32(size * size), *scale, *shift)()
        yield pixels[: len(part)]
