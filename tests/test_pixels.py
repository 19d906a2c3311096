"""Frames made into pixels on the GPU, against the host's."""

from __future__ import annotations

import numpy as np
import pytest

from dycoke_edge.runtime.gpu import pixels
from dycoke_edge.runtime.video import to_pixels
from tests.emulator import EmulatedDevice

MEAN, STD = (0.48, 0.5, 0.41), (0.27, 0.5, 0.26)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize(("count", "batch"), [(1, 1), (5, 2), (7, 16)])
def test_pixels_are_the_hosts(dtype: type[np.generic], count: int, batch: int) -> None:
    """Batches that do not divide the frames; a size that no block divides."""
    frames = np.random.default_rng(0).integers(0, 256, (count, 23, 23, 3), np.uint8)
    frames[0, 0], frames[-1, -1] = 0, 255
    device = EmulatedDevice()
    found = [part.numpy() for part in pixels.batches(device, frames, batch, MEAN, STD, dtype)]
    assert [len(part) for part in found] == [min(batch, count - start) for start in range(0, count, batch)]
    got, want = np.concatenate(found), to_pixels(frames, MEAN, STD).astype(dtype)
    assert got.dtype == dtype
    # half a unit in the last place of fp16, where the GPU rounds once and the host twice
    np.testing.assert_allclose(got, want, rtol=1e-6 if dtype is np.float32 else 1e-3, atol=1e-6)
    assert device.bytes_in_use == 0
