"""Both stages as pure array functions: the reference every other implementation is held to.

Paper: arXiv 2411.15024 (CVPR 2025), section 3.2 (merge) and 3.3 (keep). Mode "official" copies what the released code
(KD-TAO/DyCoke, commit dd74634) does where it differs, for comparison only. Mode "coverage" is the project's own: what
stays of a frame covers all of it (facility location), and a token counts for those that it covers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dycoke_edge.config import Compression, MergeMode
from dycoke_edge.errors import UsageError

WINDOW = 4  # frames; the paper's sliding window
PAIR = 2  # frames; coverage looks back to the first of a pair, no further
STEPS = 1024  # of a gain of 1: what is finer is rounding
Counts = NDArray[np.int64]  # [2, M]: for how many tokens each kept one stands, and for how many while keep is at work


def kept_per_frame(tokens_per_frame: int, merge_ratio: float) -> int:
    """Tokens of a compared frame that stay: int((1 - K) N) in double precision, as the released code rounds."""
    return int((1 - merge_ratio) * tokens_per_frame)


def anchors(num_frames: int) -> list[tuple[int, int]]:
    """(anchor, frame) pairs of mode "paper": of each window of 4, frame 1 with 0, 2 with 0, 3 with 2.

    Frames that are no second member are kept whole. A frame depends on earlier frames only.
    """
    offset = {1: 1, 2: 2, 3: 1}
    return [(f - offset[f % WINDOW], f) for f in range(num_frames) if f % WINDOW]


def official_anchors(num_frames: int) -> list[tuple[int, int]]:
    """(anchor, frame) pairs of the released code: (0,1),(2,3),... and 2 with 0 in all windows but the last."""
    if num_frames <= WINDOW:
        raise UsageError(
            f"mode='official' (--mode) fails on {num_frames} frames, as the released code does; "
            "use 5 or more frames or --mode paper"
        )
    pairs = [(f, f + 1) for f in range(0, num_frames - 1, 2)]
    return pairs + [(f, f + 2) for f in range(0, num_frames - WINDOW, WINDOW)]


def cosine(a: NDArray[np.floating], b: NDArray[np.floating]) -> NDArray[np.float32]:
    """Cosine along the last axis, fp32; zero vectors have similarity 0."""
    a, b = a.astype(np.float32), b.astype(np.float32)
    tiny = np.finfo(np.float32).tiny
    norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return np.asarray((a * b).sum(-1) / np.maximum(norms, tiny), np.float32)


def merge_indices(tokens: NDArray[np.floating], merge_ratio: float, mode: MergeMode = "paper") -> NDArray[np.int32]:
    """Flat indices into F*N of the visual tokens that merge keeps (stage 1).

    tokens: [F, N, C] any float; returns int32 [M]. Mode "paper" gives raster order for every F >= 1. Mode "official"
    gives a pruned frame's tokens in order of similarity, drops an odd last frame, and raises UsageError for F <= 4.
    """
    num_frames, per_frame, _ = tokens.shape
    kept = kept_per_frame(per_frame, merge_ratio)
    pairs = anchors(num_frames) if mode == "paper" else official_anchors(num_frames)
    whole = np.arange(per_frame)
    rows = {f: whole for f in range(num_frames if mode == "paper" else num_frames // 2 * 2)}
    for anchor, frame in pairs:
        order = np.argsort(cosine(tokens[anchor], tokens[frame]), kind="stable")[:kept]
        rows[frame] = np.sort(order) if mode == "paper" else order
    flat = [frame * per_frame + index for frame, index in sorted(rows.items())]
    return np.concatenate(flat).astype(np.int32)


def merged_layout(num_frames: int, per_frame: int, kept: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Mode "paper", for those that merge frame by frame: the anchor of each frame, -1 for one that is kept whole, and
    how many tokens of it stay; both int32 [F]."""
    anchor = np.full(num_frames, -1, np.int32)
    for first, second in anchors(num_frames):
        anchor[second] = first
    return anchor, np.where(anchor < 0, per_frame, kept).astype(np.int32)


def stand_ins(places: NDArray[np.int32], first: int, anchor: NDArray[np.int64] | None = None) -> NDArray[np.int64]:
    """The number of the kept token that stands for each of a frame's N tokens: those kept, at `places` [m], for
    themselves, numbered from `first` on; for the others those of the same places in the `anchor`'s numbers [N].

    Without an anchor the frame is kept whole.
    """
    own = np.arange(first, first + len(places))
    if anchor is None:
        return own
    numbers: NDArray[np.int64] = anchor.copy()
    numbers[places] = own
    return numbers


def stands_for(index: NDArray[np.int32], num_frames: int, per_frame: int) -> NDArray[np.int64]:
    """For how many of the F*N tokens each kept one stands [M], by merge's flat indices [M] in mode "paper". They sum to
    F*N."""
    anchor, _ = merged_layout(num_frames, per_frame, 0)
    ends = np.searchsorted(index, np.arange(1, num_frames + 1) * per_frame).tolist()
    numbers = list[NDArray[np.int64]]()
    for frame, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        of_anchor = numbers[anchor[frame]] if anchor[frame] >= 0 else None
        numbers.append(stand_ins(index[start:end] - frame * per_frame, start, of_anchor))
    counts: NDArray[np.int64] = np.bincount(np.concatenate(numbers), minlength=len(index))
    return counts


@dataclass(frozen=True)
class Covered:
    """What coverage keeps of a frame [N, C]: places int32 [B] in raster order, and counts int64 [2, B]. Row 0 sums to N
    over all kept tokens; row 1 sums to N over those that keep leaves active, and is 0 for those that it parks."""

    places: NDArray[np.int32]
    counts: Counts


def covered_per_frame(per_frame: int, budget: float) -> int:
    """B, the tokens of every frame that stay: one at least."""
    return max(1, int(budget * per_frame))


def active_per_frame(kept: int, prune_ratio: float) -> int:
    """How many of a frame's B kept tokens stay active with keep by coverage: one at least."""
    return max(1, int(kept * (1 - prune_ratio)))


def cover_frame(frame: NDArray[np.floating], known: NDArray[np.floating] | None, kept: int, active: int) -> Covered:
    """Choose `kept` tokens of a frame [N, C] that cover it, one after the other: each is the one that raises most
    the sum over all N tokens of the largest cosine (0 at least) to anything kept, `known` [m, C] included. Gains are
    compared in steps of 1 / STEPS, ties go to the lower place: two tokens that are only like each other gain the
    same but for rounding.

    The first `active` of them are those that keep leaves active. A token counts for each of the N that is most similar
    to it among the frame's kept ones (row 1: among the active ones); ties: the lower place.
    """
    rows = _unit(frame)
    alike = rows @ rows.T
    best = np.zeros(len(rows), np.float32)
    if known is not None and len(known):
        best = np.maximum(best, (rows @ _unit(known).T).max(1))
    gains = np.maximum(alike - best[:, None], 0).sum(0)
    picks = list[int]()
    for _ in range(kept):
        worth = np.floor(np.maximum(gains, 0) * STEPS + 0.5)
        worth[picks] = -1
        picks.append(int(np.argmax(worth)))
        better = np.flatnonzero(alike[picks[-1]] > best)  # few rows after the first picks: a fifth of the time
        before, now = best[better, None], alike[picks[-1], better, None]
        gains += (np.maximum(alike[better] - now, 0) - np.maximum(alike[better] - before, 0)).sum(0)
        best[better] = now[:, 0]
    places = np.sort(np.array(picks, np.int32))
    counts = np.stack([_stands(alike, places, places), _stands(alike, places, np.sort(picks[:active]))])
    return Covered(places, counts)


def _unit(rows: NDArray[np.floating]) -> NDArray[np.float32]:
    """Rows as unit vectors, fp32; a zero vector stays zero."""
    rows = rows.astype(np.float32)
    norms = np.linalg.norm(rows, axis=-1, keepdims=True)
    return np.asarray(rows / np.maximum(norms, np.finfo(np.float32).tiny), np.float32)


def _stands(alike: NDArray[np.float32], places: NDArray[np.int32], among: NDArray[np.integer]) -> NDArray[np.int64]:
    """For how many of the N tokens each of `places` stands, when only those `among` them do. A token stands for
    itself."""
    nearest = among[np.argmax(alike[:, among], 1)]
    nearest[among] = among
    counts: NDArray[np.int64] = np.bincount(np.searchsorted(places, nearest), minlength=len(places))
    return counts


def coverage(tokens: NDArray[np.floating], budget: float, prune_ratio: float = 0.0) -> tuple[NDArray[np.int32], Counts]:
    """Mode "coverage" over a clip [F, N, C]: flat indices int32 [M] in raster order, and counts [2, M].

    Frames go in pairs: the first of a pair covers itself, the second what the kept tokens of the first do not. So a
    frame depends on the one before it at most, and the video streams.
    """
    per_frame = tokens.shape[1]
    kept = covered_per_frame(per_frame, budget)
    active = active_per_frame(kept, prune_ratio)
    index, counts, known = list[NDArray[np.int32]](), list[Counts](), None
    for number, frame in enumerate(tokens):
        covered = cover_frame(frame, known if number % PAIR else None, kept, active)
        index.append(number * per_frame + covered.places)
        counts.append(covered.counts)
        known = frame[covered.places]
    return np.concatenate(index).astype(np.int32), np.concatenate(counts, 1)


def count_kept(num_frames: int, per_frame: int, compression: Compression) -> int:
    """M, the visual tokens that merge keeps: known before any pixel is seen. UsageError as in `merge_indices`."""
    if compression.mode == "coverage":
        return num_frames * covered_per_frame(per_frame, compression.budget)
    return count_merged(num_frames, per_frame, compression.merge_ratio, compression.mode)


def count_merged(num_frames: int, per_frame: int, merge_ratio: float, mode: MergeMode = "paper") -> int:
    """M, the visual tokens that merge keeps: known before any pixel is seen. UsageError as in `merge_indices`."""
    if merge_ratio == 0:
        return num_frames * per_frame
    whole, compared = num_frames, len(anchors(num_frames))
    if mode == "official":
        whole, compared = num_frames // 2 * 2, len(official_anchors(num_frames))
    return (whole - compared) * per_frame + compared * kept_per_frame(per_frame, merge_ratio)


class KeepPolicy:
    """Which visual tokens the deep layers attend to at each decode step (stage 2). One object a request.

    Mode "paper": the `int(num_visual (1 - prune_ratio))` most attended tokens, chosen at the first step and again
    whenever the attention turns (cosine with the previous step below `refresh_threshold`); in between the set stays.
    Mode "official": in a step that does not choose, the whole cache is used, as in the released code.
    """

    def __init__(
        self, num_visual: int, prune_ratio: float, refresh_threshold: float = 0.9, mode: MergeMode = "paper"
    ) -> None:
        self.num_active = int(num_visual * (1 - prune_ratio))
        self.refresh_threshold = refresh_threshold
        self.mode = mode
        self.refreshes = 0
        self.refreshed = False
        self._previous: NDArray[np.float32] | None = None
        self._active = np.ones(num_visual, np.bool_)

    def step(self, attention: NDArray[np.float32]) -> NDArray[np.bool_]:
        """Take one step. attention: fp32 [num_visual], layer L-1, mean over heads, of the token being computed.

        Returns bool [num_visual], True = active in this step; `refreshed` says whether the set changed.
        """
        before = self._active
        turned = self._previous is None or cosine(self._previous, attention) < self.refresh_threshold
        self._previous = attention.copy()
        if turned:
            self.refreshes += 1
            self._active = self._choose(attention)
        elif self.mode == "official":
            self._active = np.ones_like(before)
        self.refreshed = not np.array_equal(before, self._active)
        return self._active

    def _choose(self, attention: NDArray[np.float32]) -> NDArray[np.bool_]:
        active = np.zeros(attention.size, np.bool_)
        active[np.argsort(-attention, kind="stable")[: self.num_active]] = True
        return active
