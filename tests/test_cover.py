"""Merge by coverage: what it promises, and that a GPU's kernels and live video choose what the reference chooses."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from dycoke_edge.config import Compression
from dycoke_edge.dycoke import active_per_frame, count_kept, cover_frame, coverage, covered_per_frame
from dycoke_edge.errors import UsageError
from dycoke_edge.runtime.gpu import cover
from dycoke_edge.runtime.gpu.device import Device, DeviceArray


def clip(frames: int, per_frame: int, width: int = 40, seed: int = 0) -> NDArray[np.float32]:
    """Tokens [F, N, C] of which many repeat: what a place shows changes in one frame of three."""
    random = np.random.default_rng(seed)
    tokens = np.repeat(random.standard_normal((1, per_frame, width)), frames, 0)
    tokens += 0.3 * random.standard_normal(tokens.shape)
    tokens[1::3, ::5] = random.standard_normal(tokens[1::3, ::5].shape)
    return tokens.astype(np.float32)


def gained(frame: NDArray[np.float32], known: NDArray[np.float32], places: list[int]) -> float:
    """The sum over all tokens of the best cosine to the known ones or to those at `places`, 0 at least; written
    anew."""
    total = 0.0
    for token in frame:
        best = 0.0
        for other in [*known, *frame[places]]:
            length = float(np.linalg.norm(token)) * float(np.linalg.norm(other))
            best = max(best, float(token @ other) / length if length else 0.0)
        total += best
    return total


def test_every_pick_gains_most() -> None:
    """Against all single tokens that could have been picked instead."""
    frame, known = clip(1, 12)[0], clip(1, 3, seed=1)[0]
    for size in range(1, 6):
        places = set(cover_frame(frame, known, size, 1).places.tolist())
        before = set(cover_frame(frame, known, size - 1, 1).places.tolist()) if size > 1 else set()
        (new,) = places - before
        assert before < places
        worth = {i: gained(frame, known, [*before, i]) for i in range(12) if i not in before}
        assert worth[new] == pytest.approx(max(worth.values()), abs=1e-5)


def test_counts_add_up_and_parked_ones_count_nothing() -> None:
    tokens = clip(5, 49)
    index, counts = coverage(tokens, 0.25, 0.5)
    assert index.tolist() == sorted(index.tolist()) and index.dtype == np.int32
    assert len(index) == 5 * 12 == count_kept(5, 49, Compression(budget=0.25))
    for f in range(5):
        mine = counts[:, 12 * f : 12 * (f + 1)]
        assert mine.sum(1).tolist() == [49, 49]
        assert (mine[0] >= 1).all() and (mine[1] > 0).sum() == 6
    assert ((index // 49) == np.repeat(np.arange(5), 12)).all()


def test_pairs_stream() -> None:
    """What is chosen of a frame depends on nothing later, and on nothing before its pair."""
    tokens = clip(6, 25)
    whole, counts = coverage(tokens, 0.3, 0.5)
    for frames in range(1, 7):
        index, found = coverage(tokens[:frames], 0.3, 0.5)
        np.testing.assert_array_equal(index, whole[: 7 * frames])
        np.testing.assert_array_equal(found, counts[:, : 7 * frames])
    np.testing.assert_array_equal(coverage(tokens[2:], 0.3)[0], whole[14:] - 50)
    other = tokens.copy()
    other[2] = clip(1, 25, seed=9)[0]
    assert (coverage(other, 0.3)[0][21:28] != whole[21:28]).any()  # frame 3 looks at frame 2
    np.testing.assert_array_equal(coverage(other, 0.3)[0][28:], whole[28:])


def test_the_second_of_a_pair_covers_what_the_first_does_not() -> None:
    still = np.repeat(clip(1, 25), 2, 0)
    still[1, 7] = 10 * np.eye(40, dtype=np.float32)[0]
    index, _ = coverage(still, 0.3)
    assert 25 + 7 in index.tolist()


def test_ties_go_to_the_lower_place_and_zeros_are_like_nothing() -> None:
    assert coverage(np.ones((1, 6, 4), np.float32), 0.5)[0].tolist() == [0, 1, 2]
    zeros = np.zeros((1, 4, 4), np.float32)
    zeros[0, 2, 0] = 1
    index, counts = coverage(zeros, 0.25)
    assert index.tolist() == [2] and counts.tolist() == [[4], [4]]


@pytest.mark.parametrize(
    ("per_frame", "budget", "kept"), [(196, 0.25, 49), (49, 0.25, 12), (49, 0.01, 1), (196, 1.0, 196)]
)
def test_how_many_stay(per_frame: int, budget: float, kept: int) -> None:
    assert covered_per_frame(per_frame, budget) == kept
    assert active_per_frame(kept, 0.5) == max(1, kept // 2)


def test_defaults_follow_the_mode() -> None:
    ours, paper = Compression(), Compression(merge_ratio=0.5)
    assert (ours.mode, ours.budget, ours.merge_ratio, ours.keep, ours.positions) == (
        "coverage",
        0.25,
        0,
        "coverage",
        "keep",
    )
    assert (paper.mode, paper.budget, paper.merge_ratio, paper.keep) == ("paper", 1, 0.5, "attention")
    assert (paper.prune_ratio, paper.positions) == (0.7, "reassign")
    assert (
        not Compression.off().merges
        and Compression(budget=1).merges
        and not Compression(budget=1, prune_ratio=0).merges
    )


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"mode": "coverage", "merge_ratio": 0.7}, "--mode paper"),
        ({"mode": "paper", "budget": 0.3}, "--mode coverage"),
        ({"merge_ratio": 0.7, "keep": "coverage"}, "--mode coverage"),
        ({"budget": 0.0}, "--budget"),
        ({"mode": "other"}, "coverage, paper, official"),
    ],
)
def test_what_means_nothing_is_refused(options: dict[str, object], word: str) -> None:
    with pytest.raises(UsageError, match=word):
        Compression(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize(
    ("frames", "per_frame", "kept", "active"), [(1, 16, 4, 2), (2, 49, 12, 6), (5, 49, 22, 6), (3, 196, 49, 24)]
)
def test_on_a_gpu(
    device: Device, frames: int, per_frame: int, kept: int, active: int, dtype: type[np.floating]
) -> None:
    tokens = clip(frames, per_frame, seed=frames).astype(dtype)
    tokens[:, 5] = 0
    found, places, counts = cover.cover(DeviceArray.of(device, tokens), kept, active)
    index = places.numpy()
    want, numbers = coverage(tokens, kept / per_frame + 1e-9, 1 - active / kept - 1e-9)
    differing = np.setdiff1d(want, index)
    assert index.shape == want.shape and (np.diff(index) > 0).all()
    assert differing.size <= frames  # rounding may turn two that are as good as equal
    np.testing.assert_array_equal(found.numpy(), tokens.reshape(-1, 40)[index])
    numbers_there = counts.numpy()
    assert numbers_there.sum(1).tolist() == [frames * per_frame] * 2
    np.testing.assert_array_equal(counts[:, 1:3].numpy(), numbers_there[:, 1:3])
    if not differing.size:
        np.testing.assert_array_equal(numbers_there, numbers)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("known", [0, 12])
def test_one_frame_on_a_gpu(device: Device, known: int, dtype: type[np.floating]) -> None:
    frame, before = clip(1, 49, seed=4)[0].astype(dtype), clip(1, 12, seed=5)[0].astype(dtype)[:known]
    given = DeviceArray.of(device, before) if known else None
    found, places, counts = cover.cover_frame(DeviceArray.of(device, frame), given, 12, 6)
    want = cover_frame(frame, before, 12, 6)
    np.testing.assert_array_equal(places.numpy(), want.places)
    np.testing.assert_array_equal(counts.numpy(), want.counts)
    np.testing.assert_array_equal(found.numpy(), frame[want.places])


def test_settings_with_others_instead() -> None:
    ours = Compression(free_parked=True, refresh_threshold=0.5, prune_ratio=0.1)
    assert ours.but() == ours and ours.but(budget=0.5) == Compression(
        budget=0.5, free_parked=True, refresh_threshold=0.5, prune_ratio=0.1
    )
    paper = Compression(merge_ratio=0.5, free_parked=True, refresh_threshold=0.5)
    assert ours.but(merge_ratio=0.5) == paper and paper.but(prune_ratio=0.1).mode == "paper"
    assert paper.but(budget=0.5) == Compression(budget=0.5, free_parked=True, refresh_threshold=0.5)
    assert paper.but(mode="official").merge_ratio == 0.7 and Compression(mode="official").but(merge_ratio=0.3) == (
        Compression(mode="official", merge_ratio=0.3)
    )
    with pytest.raises(UsageError, match="--merge-ratio"):
        ours.but(mode="coverage", merge_ratio=0.5)
