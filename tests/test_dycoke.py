"""The reference of both stages: mode "official" against recordings of the released code, mode "paper" by hand."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from dycoke_edge.bundle import Bundle, open_bundle
from dycoke_edge.config import Compression, EngineSpec
from dycoke_edge.dycoke import KeepPolicy, anchors, cosine, count_merged, kept_per_frame, merge_indices, stands_for
from dycoke_edge.errors import UsageError
from dycoke_edge.runtime.engine import Engine, open_engine
from dycoke_edge.runtime.visual import merge

RECORDED = Path(__file__).parent / "data" / "official_dycoke.npz"
RIGHT, UP, LEFT, ZERO = (1.0, 0.0), (0.0, 1.0), (-1.0, 0.0), (0.0, 0.0)  # cosines 1, 0 and -1; ZERO has none
LETTERS = {"R": RIGHT, "U": UP, "L": LEFT, "0": ZERO}
# vectors with whole norms: their cosines are fractions, so ties are exact in fp32 as well
EXACT: list[tuple[int, ...]] = [
    (0, 0, 0),
    (1, 0, 0),
    (0, -2, 0),
    (3, 4, 0),
    (4, 3, 0),
    (0, 3, -4),
    (1, 2, 2),
    (2, -1, 2),
    (-2, 2, 1),
]


@pytest.fixture(scope="module")
def recorded() -> dict[str, NDArray[Any]]:
    with np.load(RECORDED) as file:
        return dict(file)


def clip(*frames: str) -> NDArray[np.float32]:
    """Frames written as one letter a token: clip("RR", "RU") is [2, 2, 2]."""
    return np.array([[LETTERS[letter] for letter in frame] for frame in frames], np.float32)


def random_clip(frames: int, per_frame: int, width: int = 8, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((frames, per_frame, width)).astype(np.float32)


# mode "official"


@pytest.mark.parametrize("case", range(8))
def test_official_merge_is_what_the_released_code_returned(recorded: dict[str, NDArray[Any]], case: int) -> None:
    tokens, ratio = recorded[f"ttm{case}_x"], float(recorded[f"ttm{case}_K"])
    index = merge_indices(tokens, ratio, "official")
    assert index.dtype == np.int32
    np.testing.assert_array_equal(index, recorded[f"ttm{case}_idx"])
    assert count_merged(tokens.shape[0], tokens.shape[1], ratio, "official") == len(index)


@pytest.mark.parametrize("case", range(3))
def test_official_keep_is_what_the_released_code_saw(recorded: dict[str, NDArray[Any]], case: int) -> None:
    attention, kept = recorded[f"dp{case}_attn"], recorded[f"dp{case}_kept"]
    policy = KeepPolicy(attention.shape[1], float(recorded[f"dp{case}_P"]), mode="official")
    np.testing.assert_array_equal([policy.step(row) for row in attention], kept)


def test_every_recorded_case_is_used(recorded: dict[str, NDArray[Any]]) -> None:
    assert {name for name in recorded if name.endswith("_idx")} == {f"ttm{case}_idx" for case in range(8)}
    assert {name for name in recorded if name.endswith("_kept")} == {f"dp{case}_kept" for case in range(3)}


@pytest.mark.parametrize("frames", range(1, 5))
def test_official_refuses_short_clips_and_says_what_works(frames: int) -> None:
    with pytest.raises(UsageError, match="--mode paper") as error:
        merge_indices(random_clip(frames, 4), 0.7, "official")
    assert "\n" not in str(error.value) and f"{frames} frames" in str(error.value)


def test_official_leaves_the_third_frame_of_the_last_window_whole() -> None:
    index = merge_indices(random_clip(8, 10), 0.5, "official")
    assert np.bincount(index // 10, minlength=8).tolist() == [10, 5, 5, 5, 10, 5, 10, 5]


def test_official_keep_uses_the_whole_cache_while_attention_stays() -> None:
    policy = KeepPolicy(4, 0.5, mode="official")
    attention = np.array([4, 3, 2, 1], np.float32)
    assert policy.step(attention).tolist() == [True, True, False, False]
    assert policy.step(attention).all() and policy.refreshed
    assert policy.refreshes == 1


# merge, mode "paper"


def test_each_frame_is_compared_with_its_own_anchor() -> None:
    tokens = clip("RRR", "RUR", "LUR", "LRR")  # 1 with 0, 2 with 0, 3 with 2
    assert merge_indices(tokens, 0.5).tolist() == [0, 1, 2, 3 + 1, 6 + 0, 9 + 1]


def test_the_next_window_has_an_anchor_of_its_own() -> None:
    tokens = clip("RRR", "RRU", "RUR", "RUL", "UUU", "UUR", "LUU")
    assert merge_indices(tokens, 0.5).tolist() == [0, 1, 2, 5, 7, 11, 12, 13, 14, 17, 18]


@pytest.mark.parametrize("frames", range(1, 10))
def test_a_static_clip_keeps_the_lowest_places(frames: int) -> None:
    by_frame = [[0, 1, 2], [3], [6], [9], [12, 13, 14], [15], [18], [21], [24, 25, 26]]
    index = merge_indices(clip(*["RUL"] * frames), 0.5)
    assert index.tolist() == [place for frame in by_frame[:frames] for place in frame]
    assert index.dtype == np.int32


def test_ties_go_to_the_lower_index() -> None:
    tokens = clip("RRRRR", "RURUR")  # similarities 1 0 1 0 1, three stay
    assert merge_indices(tokens, 0.4).tolist() == [0, 1, 2, 3, 4, 5 + 0, 5 + 1, 5 + 3]


def test_kept_tokens_come_in_raster_order_not_by_similarity() -> None:
    tokens = clip("RRRRR", "RURRL")  # the last token is the least similar
    assert merge_indices(tokens, 0.5).tolist() == [0, 1, 2, 3, 4, 5 + 1, 5 + 4]


def test_a_kept_token_stands_for_those_that_were_like_it() -> None:
    """Frames of 2: frame 1 is compared with 0, 2 with 0, 3 with 2; what frame 2 dropped, frame 0 stands for in 3."""
    assert stands_for(np.array([0, 1, 2, 4, 6], np.int32), 4, 2).tolist() == [1, 4, 1, 1, 1]
    assert stands_for(np.array([0, 1, 5], np.int32), 4, 2).tolist() == [4, 2, 2]
    assert stands_for(np.arange(32, dtype=np.int32), 8, 4).tolist() == [1] * 32


@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.7, 1.0])
@pytest.mark.parametrize("frames", [1, 2, 5, 9, 16])
def test_what_a_token_stands_for_is_the_naive_walk(frames: int, ratio: float) -> None:
    index = merge_indices(random_clip(frames, 5), ratio)
    kept, before = {int(i): 0 for i in index}, {frame: anchor for anchor, frame in anchors(frames)}
    for frame, place in np.ndindex(frames, 5):
        while frame * 5 + place not in kept:
            frame = before[frame]
        kept[frame * 5 + place] += 1
    assert stands_for(index, frames, 5).tolist() == list(kept.values())
    assert sum(kept.values()) == frames * 5


def test_zero_vectors_have_similarity_zero() -> None:
    """Less similar than an equal token, more than an opposite one, on whichever side the zero is."""
    assert merge_indices(clip("RRR", "R0R"), 0.5).tolist() == [0, 1, 2, 3 + 1]
    assert merge_indices(clip("R0R", "RRR"), 0.5).tolist() == [0, 1, 2, 3 + 1]
    assert merge_indices(clip("R0R", "R0L"), 0.5).tolist() == [0, 1, 2, 3 + 2]
    assert merge_indices(clip("000", "000"), 0.5).tolist() == [0, 1, 2, 3 + 0]


def test_length_does_not_count_only_direction_does() -> None:
    tokens = clip("RRR", "RUR")
    tokens[1, 0] *= 1e-3
    tokens[1, 2] *= 1e3
    assert merge_indices(tokens, 0.5).tolist() == [0, 1, 2, 3 + 1]


def test_a_scene_cut_inside_a_window_keeps_no_more_tokens() -> None:
    tokens = clip("RRRR", "RRRU", "UUUU", "UURU")  # all of frame 2 is new, yet the ratio rules
    assert merge_indices(tokens, 0.75).tolist() == [0, 1, 2, 3, 4 + 3, 8 + 0, 12 + 2]


@pytest.mark.parametrize("per_frame", [1, 3, 5, 49])
def test_ratio_0_keeps_all_and_ratio_1_only_anchors(per_frame: int) -> None:
    tokens = random_clip(6, per_frame)
    assert merge_indices(tokens, 0.0).tolist() == list(range(6 * per_frame))
    assert merge_indices(tokens, 1.0).tolist() == [*range(per_frame), *range(4 * per_frame, 5 * per_frame)]


@pytest.mark.parametrize(
    ("ratio", "per_frame", "kept"),
    [
        (0.7, 196, 58),
        (0.3, 196, 137),
        (0.9, 196, 19),
        (0.5, 5, 2),
        (0.7, 10, 3),
        (0.4, 5, 3),
        (0.9, 10, 0),  # (1 - 0.9) * 10 is 0.9999999999999998
        (0.8, 5, 0),  # (1 - 0.8) * 5 is 0.9999999999999998
        (0.3, 49, 34),
        (0.0, 7, 7),
        (1.0, 7, 0),
    ],
)
def test_the_number_kept_is_rounded_as_doubles_are(ratio: float, per_frame: int, kept: int) -> None:
    assert kept_per_frame(per_frame, ratio) == kept
    assert len(merge_indices(random_clip(2, per_frame), ratio)) == per_frame + kept


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.5, 0.7, 0.9, 1.0])
@pytest.mark.parametrize("per_frame", [3, 5, 49])
def test_a_frame_depends_on_earlier_frames_only(ratio: float, per_frame: int) -> None:
    tokens = random_clip(9, per_frame)
    whole = merge_indices(tokens, ratio)
    for frames in range(1, 9):
        first = merge_indices(tokens[:frames], ratio)
        assert first.tolist() == whole[whole < frames * per_frame].tolist()


def test_half_precision_tokens_are_compared_in_fp32() -> None:
    tokens = (random_clip(4, 49) * 200).astype(np.float16)  # dot products beyond fp16
    np.testing.assert_array_equal(merge_indices(tokens, 0.7), merge_indices(tokens.astype(np.float32), 0.7))


def exact_similarity(a: tuple[int, ...], b: tuple[int, ...]) -> Fraction:
    norms = round(sum(x * x for x in a) ** 0.5) * round(sum(x * x for x in b) ** 0.5)
    return Fraction(sum(x * y for x, y in zip(a, b, strict=True)), norms) if norms else Fraction(0)


def naive_merge(frames: list[list[tuple[int, ...]]], ratio: float) -> list[int]:
    """The paper's rule token by token, in exact arithmetic."""
    kept: list[int] = []
    for f, frame in enumerate(frames):
        start, places = f * len(frame), list(range(len(frame)))
        if f % 4:
            anchor = frames[f - 1] if f % 4 in (1, 3) else frames[f - 2]
            places.sort(key=lambda n: (exact_similarity(anchor[n], frame[n]), n))
            places = sorted(places[: int((1 - ratio) * len(frame))])
        kept += [start + place for place in places]
    return kept


@st.composite
def exact_clips(draw: st.DrawFn) -> list[list[tuple[int, ...]]]:
    per_frame = draw(st.integers(1, 12))
    frame = st.lists(st.sampled_from(EXACT), min_size=per_frame, max_size=per_frame)
    return draw(st.lists(frame, min_size=1, max_size=9))


@settings(max_examples=200, deadline=None)
@given(exact_clips(), st.one_of(st.sampled_from([0.0, 0.3, 0.5, 0.7, 0.9, 1.0]), st.floats(0, 1)))
def test_merge_is_the_naive_loop(frames: list[list[tuple[int, ...]]], ratio: float) -> None:
    index = merge_indices(np.array(frames, np.float32), ratio)
    assert index.tolist() == naive_merge(frames, ratio)
    assert len(index) == count_merged(len(frames), len(frames[0]), ratio)


# the exported graph


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path) -> Bundle:
    return open_bundle(tiny_bundle)


@pytest.fixture(scope="module")
def engine(bundle: Bundle) -> Engine:
    return open_engine(bundle, EngineSpec(threads=1))


@pytest.mark.parametrize("frames", range(1, 10))
@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.7, 0.9])
def test_the_merge_graph_chooses_the_same(bundle: Bundle, engine: Engine, ratio: float, frames: int) -> None:
    tokens = random_clip(frames, bundle.model.tokens_per_frame, bundle.model.hidden_size, seed=frames)
    merged = merge(bundle, engine, tokens, Compression(merge_ratio=ratio))
    kept, index = merged.tokens, merged.index
    np.testing.assert_array_equal(index, merge_indices(tokens, ratio))
    rows = tokens.reshape(-1, tokens.shape[-1])[index]
    assert index.dtype == np.int32 and kept.dtype == tokens.dtype
    assert np.asarray(kept).tobytes() == rows.tobytes()


def test_the_half_precision_merge_graph_chooses_the_same(half_bundle: Path) -> None:
    bundle = open_bundle(half_bundle)
    tokens = random_clip(8, bundle.model.tokens_per_frame, bundle.model.hidden_size).astype(np.float16)
    merged = merge(bundle, open_engine(bundle, EngineSpec(threads=1)), tokens, Compression(merge_ratio=0.5))
    kept, index = merged.tokens, merged.index
    np.testing.assert_array_equal(index, merge_indices(tokens, 0.5))
    assert np.asarray(kept).tobytes() == tokens.reshape(-1, tokens.shape[-1])[index].tobytes()


def test_the_merge_graph_takes_zero_vectors(bundle: Bundle, engine: Engine) -> None:
    tokens = random_clip(4, bundle.model.tokens_per_frame, bundle.model.hidden_size)
    tokens[0, 3] = tokens[2, 5] = tokens[1, 7] = 0
    index = merge(bundle, engine, tokens, Compression(merge_ratio=0.7)).index
    np.testing.assert_array_equal(index, merge_indices(tokens, 0.7))


@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_ratios_0_and_1_need_no_graph(bundle: Bundle, engine: Engine, ratio: float) -> None:
    tokens = random_clip(5, bundle.model.tokens_per_frame, bundle.model.hidden_size)
    merged = merge(bundle, engine, tokens, Compression(merge_ratio=ratio))
    kept, index = merged.tokens, merged.index
    np.testing.assert_array_equal(index, merge_indices(tokens, ratio))
    np.testing.assert_array_equal(kept, tokens.reshape(-1, tokens.shape[-1])[index])


# keep, mode "paper"


def step(policy: KeepPolicy, *attention: float) -> list[int]:
    """The active tokens after a step."""
    return [int(token) for token in np.flatnonzero(policy.step(np.array(attention, np.float32)))]


def test_the_first_step_chooses_the_largest() -> None:
    policy = KeepPolicy(5, 0.6)
    assert step(policy, 0.1, 0.5, 0.2, 0.05, 0.15) == [1, 2]
    assert (policy.refreshed, policy.refreshes) == (True, 1)


def test_the_set_stays_while_attention_does() -> None:
    policy = KeepPolicy(3, 0.5)
    assert step(policy, 1.0, 0.9, 0.0) == [0]
    assert step(policy, 0.9, 1.0, 0.0) == [0]  # cosine 0.994, though another token leads now
    assert (policy.refreshed, policy.refreshes) == (False, 1)


def test_the_set_is_chosen_anew_when_attention_turns() -> None:
    policy = KeepPolicy(3, 0.5)
    assert step(policy, 1, 0, 0) == [0]
    assert step(policy, 0, 1, 0) == [1]
    assert (policy.refreshed, policy.refreshes) == (True, 2)
    assert step(policy, 1, 0, 0) == [0], "a token set aside can come back"


def test_a_cosine_equal_to_the_threshold_is_not_below_it() -> None:
    policy = KeepPolicy(2, 0.5, refresh_threshold=float(cosine(np.array([1.0, 0.0]), np.array([3.0, 4.0]))))
    assert step(policy, 1, 0) == [0]
    assert step(policy, 3, 4) == [0]
    assert not policy.refreshed
    policy = KeepPolicy(2, 0.5, refresh_threshold=0.61)
    assert (step(policy, 1, 0), step(policy, 3, 4)) == ([0], [1])


def test_a_slow_drift_never_turns_and_a_jump_of_the_same_size_does() -> None:
    angles = np.linspace(0, np.pi / 2, 10)  # ten degrees a step: cosine 0.985
    policy = KeepPolicy(2, 0.5)
    assert [step(policy, np.cos(angle), np.sin(angle)) for angle in angles] == [[0]] * 10
    assert policy.refreshes == 1
    jump = KeepPolicy(2, 0.5)
    assert [step(jump, 1, 0), step(jump, 0, 1)] == [[0], [1]]


def test_the_previous_vector_is_that_of_the_last_step_not_of_the_last_choice() -> None:
    policy = KeepPolicy(2, 0.5, refresh_threshold=0.9)
    for angle in (0, 20, 40):
        assert step(policy, np.cos(np.radians(angle)), np.sin(np.radians(angle))) == [0]
    assert step(policy, 1, 0) == [0]  # 40 degrees back: chosen anew, though equal to the vector first chosen on
    assert (policy.refreshes, policy.refreshed) == (2, False)


def test_the_previous_vector_is_a_copy_of_the_callers_memory() -> None:
    policy, attention = KeepPolicy(2, 0.5), np.array([1, 0], np.float32)
    assert policy.step(attention).tolist() == [True, False]
    attention[:] = 0, 1  # the engine writes every step to the same place
    assert policy.step(attention).tolist() == [False, True]


def test_ties_of_attention_go_to_the_lower_index() -> None:
    assert step(KeepPolicy(5, 0.6), 0.2, 0.1, 0.2, 0.2, 0.1) == [0, 2]
    assert step(KeepPolicy(4, 0.5), 1, 1, 1, 1) == [0, 1]


@pytest.mark.parametrize(
    ("num_visual", "ratio", "kept"),
    [(10, 0.7, 3), (10, 0.9, 0), (5, 0.8, 0), (3, 0.5, 1), (200, 0.7, 60), (2960, 0.7, 888), (7, 0.3, 4)],
)
def test_the_number_active_is_rounded_as_doubles_are(num_visual: int, ratio: float, kept: int) -> None:
    policy = KeepPolicy(num_visual, ratio)
    assert policy.num_active == kept
    assert policy.step(np.arange(num_visual, dtype=np.float32)).sum() == kept


def test_prune_ratio_0_keeps_all_and_never_changes() -> None:
    policy = KeepPolicy(3, 0.0)
    assert step(policy, 1, 0, 0) == [0, 1, 2]
    assert not policy.refreshed, "all were active before"
    assert step(policy, 0, 1, 0) == [0, 1, 2]
    assert (policy.refreshed, policy.refreshes) == (False, 2)


def test_prune_ratio_1_keeps_none() -> None:
    policy = KeepPolicy(3, 1.0)
    assert step(policy, 1, 0, 0) == []
    assert policy.refreshed
    assert step(policy, 0, 1, 0) == []
    assert not policy.refreshed, "chosen anew, but the same"


def test_no_attention_at_all_counts_as_turned() -> None:
    policy = KeepPolicy(3, 0.5)
    assert step(policy, 0, 0, 1) == [2]
    assert step(policy, 0, 0, 0) == [0]
    assert step(policy, 0, 1, 0) == [1]
    assert policy.refreshes == 3
    never = KeepPolicy(3, 0.5, refresh_threshold=0.0)
    assert [step(never, 0, 0, 1), step(never, 0, 0, 0)] == [[2], [2]], "0 is not below 0"


def test_a_returned_set_is_not_changed_by_later_steps() -> None:
    policy = KeepPolicy(3, 0.5)
    first = policy.step(np.array([1, 0, 0], np.float32))
    policy.step(np.array([0, 1, 0], np.float32))
    assert first.tolist() == [True, False, False]
