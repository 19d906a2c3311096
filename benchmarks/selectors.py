"""Other ways to choose the visual tokens that enter the decoder, which merge is compared with at equal numbers.

A selector takes tokens [F, N, E], a budget M and a random generator, and returns int32 [<= M], increasing flat indices
into F * N. They are baselines: the runtime has none of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dycoke_edge.dycoke import cosine

Index = NDArray[np.int32]
Selector = Callable[[NDArray[Any], int, np.random.Generator], Index]


def random_tokens(tokens: NDArray[Any], budget: int, random: np.random.Generator) -> Index:
    """Any `budget` tokens."""
    total = tokens.shape[0] * tokens.shape[1]
    return np.sort(random.permutation(total)[:budget]).astype(np.int32)


def changed_tokens(tokens: NDArray[Any], budget: int, random: np.random.Generator) -> Index:
    """Those that differ most from the frame before, ranked over the whole clip; the first frame counts as new.

    Efficient Video Sampling (arXiv 2510.14624), as in NVIDIA's EVS for vLLM.
    """
    change = 1 - cosine(tokens[:-1], tokens[1:])
    change = np.concatenate((np.full((1, tokens.shape[1]), np.inf), change)).ravel()
    return np.sort(np.argsort(-change, kind="stable")[:budget]).astype(np.int32)


def spread_frames(tokens: NDArray[Any], budget: int, random: np.random.Generator) -> Index:
    """Whole frames, evenly spread, the first among them: one in four at a quarter of the tokens."""
    frames, per_frame = tokens.shape[:2]
    count = max(1, budget // per_frame)
    return _frames(np.arange(count) * frames // count, per_frame)


def last_frames(tokens: NDArray[Any], budget: int, random: np.random.Generator) -> Index:
    """Whole frames, the latest: what a window that is cut short would see."""
    frames, per_frame = tokens.shape[:2]
    return _frames(np.arange(frames - max(1, budget // per_frame), frames), per_frame)


def _frames(chosen: NDArray[np.int64], per_frame: int) -> Index:
    return (chosen[:, None] * per_frame + np.arange(per_frame)).ravel().astype(np.int32)
