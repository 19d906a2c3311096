"""Scores: how likely each of some answers is, and whether the model wants to give any of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Scores(Mapping[str, float]):
    """The share of each answer, all of them 1 together: `scores["yes"]`. `mass` is the probability, 0 to 1, that the
    reply begins with any of them; where it is small the model has something else to say, and shares mean nothing."""

    shares: Mapping[str, float]
    mass: float

    def __getitem__(self, answer: str) -> float:
        return self.shares[answer]

    def __iter__(self) -> Iterator[str]:
        return iter(self.shares)

    def __len__(self) -> int:
        return len(self.shares)


def scores(answers: Sequence[str], first: Sequence[Sequence[int]], logits: NDArray[np.float32]) -> Scores:
    """The scores of answers from the logits [V] of the first token, `first` being the ids that each may begin with."""
    exact = logits.astype(np.float64)
    answered = np.array([np.logaddexp.reduce(exact[list(ids)]) for ids in first])
    together = np.logaddexp.reduce(answered)
    shares = np.exp(answered - together)
    mass = min(1.0, float(np.exp(together - np.logaddexp.reduce(exact))))
    return Scores(dict(zip(answers, shares.tolist(), strict=True)), mass)
