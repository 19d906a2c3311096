"""Candidates for both stages, as tried on `tiny` before one of each became the product's: `python -m
benchmarks.ablation` prints how they fare. A chooser takes the tokens of a clip [F, N, E] and says which of them
enter the decoder, for how many each stands, and with which values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Floats = NDArray[np.float32]
Score = Callable[[Floats, "Memory"], Floats]  # unit tokens of a frame [N, E] -> what a token is worth [N]


@dataclass(frozen=True)
class Chosen:
    """Tokens that enter the decoder, in raster order."""

    index: NDArray[np.int32]  # [M] flat indices into F * N
    counts: Array | None = None  # [M], for how many tokens each stands
    values: Array | None = None  # [M, E] instead of the tokens themselves
    rank: NDArray[np.int64] | None = None  # [M], when a token was picked in its frame or window: 0 is first


@dataclass
class Memory:
    """Unit vectors of what was kept, frame by frame."""

    frames: list[Floats] = field(default_factory=list)
    mean: Floats | None = None
    last: Floats | None = None  # unit tokens [N, E] of the frame before


def unit(tokens: Array) -> Floats:
    """tokens [.., E] as unit vectors, fp32; zero stays zero."""
    tokens = tokens.astype(np.float32)
    length = np.linalg.norm(tokens, axis=-1, keepdims=True)
    return np.asarray(tokens / np.maximum(length, np.finfo(np.float32).tiny), np.float32)


def greedy(rows: Floats, memory: Floats, budget: int, weight: Floats | None = None, base: float = 0.0) -> list[int]:
    """Facility location: `budget` of the rows [n, E], each the one that raises most the sum over all rows of the best
    cosine to anything kept, `memory` [m, E] included."""
    alike = rows @ rows.T
    best = np.maximum((rows @ memory.T).max(1), base) if len(memory) else np.full(len(rows), base, np.float32)
    taken = list[int]()
    for _ in range(budget):
        gain = np.maximum(alike - best[:, None], 0)
        gain = (gain if weight is None else gain * weight[:, None]).sum(0)
        gain[taken] = -1
        taken.append(int(np.argmax(gain)))
        best = np.maximum(best, alike[taken[-1]])
    return taken


def coverage(
    tokens: Array,
    total: int,
    memory: int = 4,
    window: int = 1,
    reset: int = 0,
    follow: float = 0.0,
    power: float = 1.0,
    mix: str = "",
    reach: int | None = None,
    weigh: str = "",
    base: float = 0.0,
) -> Chosen:
    """Coverage: windows of `window` frames share a budget; `memory` frames before are covered already; `reset` forgets
    them every so many frames; `follow` moves budgets towards what changed; counts to the power `power`; `mix` says how
    values are mixed; dropped tokens count for kept ones of the last `reach` frames; `weigh` weighs the tokens that are
    to be covered."""
    frames, per_frame, _ = tokens.shape
    directions = unit(tokens)
    rows = [np.empty(0, np.int64) for _ in range(frames)]
    ranks = [np.empty(0, np.int64) for _ in range(frames)]
    budgets = _budgets(directions, total, window, follow)
    for number, first in enumerate(range(0, frames, window)):
        group = range(first, min(first + window, frames))
        since = max(0, first - memory, first // reset * reset if reset else 0)
        known = [directions[f][rows[f]] for f in range(since, first)]
        seen = np.concatenate(known) if known else np.empty((0, tokens.shape[2]), np.float32)
        flat = directions[list(group)].reshape(-1, tokens.shape[2])
        weight: Floats | None = None
        if weigh == "change" and first:
            before = directions[first - 1]
            weight = np.concatenate([1 - (directions[f] * before).sum(-1) for f in group], dtype=np.float32) + 0.05
        elif weigh == "centre":
            middle = [1 - directions[f] @ _unit(directions[f].mean(0)) for f in group]
            weight = np.concatenate(middle, dtype=np.float32) + 0.05
        taken = greedy(flat, seen, budgets[number], weight, base)
        for order, place in enumerate(taken):
            f = first + place // per_frame
            rows[f] = np.append(rows[f], place % per_frame)
            ranks[f] = np.append(ranks[f], order)
    return _gathered(tokens, directions, rows, ranks, power, mix, memory if reach is None else reach, window)


def _unit(vector: Floats) -> Floats:
    return np.asarray(vector / max(float(np.linalg.norm(vector)), 1e-9), np.float32)


def _budgets(directions: Floats, total: int, window: int, follow: float) -> list[int]:
    """Tokens of each window: equal but for rounding, or in part by how much it differs from the frame before."""
    frames, per_frame = directions.shape[:2]
    groups = [range(f, min(f + window, frames)) for f in range(0, frames, window)]
    share = np.array([len(g) for g in groups], float) / frames
    if follow:
        change = np.array([1 - float((directions[max(g[0] - 1, 0)] * directions[g[0]]).sum(-1).mean()) for g in groups])
        change[0] = change[1:].max() if len(change) > 1 else 1
        share = (1 - follow) * share + follow * change / max(change.sum(), 1e-9)
    ends = np.round(np.cumsum(share) * total).astype(int)
    sizes = np.diff(np.concatenate(([0], ends))).tolist()
    return [min(size, per_frame * len(g)) for size, g in zip(sizes, groups, strict=True)]


def _gathered(
    tokens: Array,
    directions: Floats,
    rows: list[NDArray[np.int64]],
    ranks: list[NDArray[np.int64]],
    power: float,
    mix: str,
    reach: int,
    window: int,
) -> Chosen:
    """Raster order; each dropped token counts for its most similar kept one of the frames within reach."""
    frames, per_frame, width = tokens.shape
    order = [np.argsort(found, kind="stable") for found in rows]
    index = np.concatenate([f * per_frame + rows[f][order[f]] for f in range(frames)]).astype(np.int32)
    rank = np.concatenate([ranks[f][order[f]] for f in range(frames)])
    frame, flat = index // per_frame, tokens.reshape(-1, width).astype(np.float32)
    kept = directions.reshape(-1, width)[index]
    counts, sums = np.ones(len(index), np.int64), flat[index].copy()
    for f in range(frames):
        dropped = np.setdiff1d(np.arange(per_frame), rows[f])
        near = np.flatnonzero((frame >= f - reach) & (frame < f + window))
        if len(dropped) and len(near):
            to = near[(directions[f][dropped] @ kept[near].T).argmax(1)]
            np.add.at(counts, to, 1)
            np.add.at(sums, to, tokens[f][dropped].astype(np.float32))
    values = _mixed(flat[index], sums, counts, mix)
    weights = None if power == 0 else counts if power == 1 else counts.astype(np.float64) ** power
    return Chosen(index, weights, values, rank)


def _mixed(own: Floats, sums: Floats, counts: NDArray[np.int64], mix: str) -> Array | None:
    if not mix:
        return None
    least = float(mix)  # of a kept token's own share
    others = (sums - own) / np.maximum(counts - 1, 1)[:, None]
    share = np.maximum(1 / counts, least)[:, None]
    return np.asarray(share * own + (1 - share) * np.where(counts[:, None] > 1, others, own), np.float32)


def scored(tokens: Array, total: int, score: str, memory: int = 4, power: float = 1.0, seed: int = 0) -> Chosen:
    """The best by a score of their own, equal budgets: `random`, `grid`, `stc` (outliers), `temporal`, `sum` of
    both, `far` (farthest point)."""
    frames, per_frame, _ = tokens.shape
    directions, random = unit(tokens), np.random.default_rng(seed)
    budgets = _budgets(directions, total, 1, 0.0)
    mean, at = directions[0].mean(0), 0
    rows, ranks = list[NDArray[np.int64]](), list[NDArray[np.int64]]()
    spread = np.argsort([(i * 2654435761) % (1 << 32) for i in range(per_frame)])
    for f in range(frames):
        here, size = directions[f], budgets[f]
        outlier = _near(here, here.mean(0)) + _near(here, mean)
        same = (here * directions[f - 1]).sum(-1) if f else np.zeros(per_frame)
        if score == "random":
            taken = random.permutation(per_frame)[:size]
        elif score == "grid":
            taken = spread[(at + np.arange(size)) % per_frame]
            at += size
        elif score == "far":
            taken = _far(here, [directions[g][rows[g]] for g in range(max(0, f - memory), f)], size)
        else:
            worth = {"stc": outlier, "temporal": same, "sum": _z(outlier) + _z(same)}[score]
            taken = np.argsort(worth, kind="stable")[:size]
        mean = mean + (here.mean(0) - mean) / (f + 1)
        rows.append(np.asarray(taken, np.int64))
        ranks.append(np.arange(size))
    return _gathered(tokens, directions, rows, ranks, power, "", memory, 1)


def _near(rows: Floats, centre: Floats) -> Floats:
    far = ((rows - centre) ** 2).sum(-1)
    return np.asarray(sum(np.exp(-far / (2 * a)) for a in (0.125, 0.25, 0.5, 1, 2)), np.float32)


def _z(values: Array) -> Array:
    return np.asarray((values - values.mean()) / (values.std() + 1e-9))


def _far(rows: Floats, known: list[Floats], size: int) -> NDArray[np.int64]:
    best = (rows @ np.concatenate(known).T).max(1) if known else rows @ _unit(rows.mean(0))
    taken = list[int]()
    for _ in range(size):
        taken.append(int(np.argmin(best)))
        best = np.maximum(best, rows @ rows[taken[-1]])
        best[taken] = 9
    return np.array(taken)
