"""Merge on a device is that of the host."""

from __future__ import annotations

import numpy as np
import pytest

from dycoke_edge.dycoke import merge_indices
from dycoke_edge.runtime.gpu import merge
from dycoke_edge.runtime.gpu.device import Device, DeviceArray


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("ratio", [0.3, 0.7, 0.99, 1.0])
@pytest.mark.parametrize(("frames", "per_frame"), [(1, 16), (4, 49), (7, 196), (2, 300)])
def test_merge(device: Device, frames: int, per_frame: int, ratio: float, dtype: type[np.floating]) -> None:
    random = np.random.default_rng(frames)
    tokens = random.standard_normal((frames, per_frame, 40)).astype(dtype)
    tokens[1:, ::3] += 2 * tokens[:-1, ::3]
    tokens[:, 5] = 0  # similarity 0
    if frames > 1:
        tokens[1, 7:12] = tokens[0, 7:12]  # equal: the lower index goes first
    kept, places = merge.merge(DeviceArray.of(device, tokens), ratio)
    index = places.numpy()
    want = merge_indices(tokens, ratio)
    differing = np.setdiff1d(want, index)
    assert index.shape == want.shape and (np.diff(index) > 0).all()
    assert differing.size <= frames // 3  # rounding may turn two that are as good as equal
    np.testing.assert_array_equal(kept.numpy(), tokens.reshape(-1, 40)[index])


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_one_frame_against_its_anchor(device: Device, dtype: type[np.floating]) -> None:
    tokens = np.random.default_rng(3).standard_normal((2, 49, 40)).astype(dtype)
    anchor, frame = (DeviceArray.of(device, one) for one in tokens)
    kept, found = merge.merge_frame(anchor, frame, 0.7)
    places = found.numpy()
    assert places.tolist() == (merge_indices(tokens, 0.7)[49:] - 49).tolist() and len(places) == 14
    np.testing.assert_array_equal(kept.numpy(), tokens[1][places])


def test_equal_tokens_stay_in_order(device: Device) -> None:
    frame = np.ones((64, 8), np.float32)
    tokens = np.stack([frame, frame])
    assert merge.merge(DeviceArray.of(device, tokens), 0.5)[1].numpy().tolist() == list(range(64 + 32))


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_pairs_are_merged_as_by_the_graph(device: Device, dtype: type[np.floating]) -> None:
    """What graph and reference give for two frames, of which the first is the anchor of the second."""
    random = np.random.default_rng(0)
    reference, frame = (random.standard_normal((3, 49, 40)).astype(dtype) for _ in "ab")
    frame[:, ::3] += 2 * reference[:, ::3]
    kept, index = merge.merge_pairs(DeviceArray.of(device, reference), DeviceArray.of(device, frame), 14)
    assert index.dtype == np.int32 and index.shape == (3, 14)
    for i in range(3):
        want = merge_indices(np.stack([reference[i], frame[i]]), 0.7)[49:] - 49
        np.testing.assert_array_equal(index[i], want)
        np.testing.assert_array_equal(kept.numpy()[i], frame[i, want])


def test_what_the_kernels_cover() -> None:
    assert merge.covers(1024, 8, np.float16)
    assert not merge.covers(1025, 8, np.float16) and not merge.covers(16, 6, np.float32)
