"""Draws a token from logits: greedy, temperature, top-p."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dycoke_edge.config import Sampling


class Sampler:
    """One object a request; the same seed draws the same tokens."""

    def __init__(self, sampling: Sampling) -> None:
        self.temperature = sampling.temperature
        self.top_p = sampling.top_p
        self._random = np.random.default_rng(sampling.seed)

    def __call__(self, logits: NDArray[np.float32]) -> int:
        """Draw from logits fp32 [V]; ties go to the lower id."""
        if self.temperature == 0:
            return int(logits.argmax())
        below = logits.astype(np.float64) - logits.max()
        with np.errstate(over="ignore"):  # a temperature near 0 takes all but the best to -inf, which is meant
            probabilities = np.exp(below / self.temperature)
        probabilities /= probabilities.sum()
        if self.top_p < 1:
            probabilities = nucleus(probabilities, self.top_p)
        return int(self._random.choice(probabilities.size, p=probabilities))


def nucleus(probabilities: NDArray[np.float64], top_p: float) -> NDArray[np.float64]:
    """Keep the smallest set of most likely tokens whose probability reaches top_p (at least one), renormalised."""
    order = np.argsort(-probabilities, kind="stable")
    before = np.cumsum(probabilities[order]) - probabilities[order]
    dropped = order[(before >= top_p) & (np.arange(order.size) > 0)]
    kept: NDArray[np.float64] = probabilities.copy()
    kept[dropped] = 0.0
    kept /= kept.sum()
    return kept
