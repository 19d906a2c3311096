"""Repetition: whether an answer repeats itself, told from its token ids alone."""

from __future__ import annotations

import numpy as np

LONGEST = 128  # tokens of a phrase that is looked for
TIMES = 3


class Repetition:
    """The end of one answer. It repeats itself when its last tokens are one phrase of at most `LONGEST` tokens, at
    least `TIMES` times in a row, and at least `limit` tokens in all: "ha ha ha" alone is none. `limit` 0 finds none."""

    def __init__(self, limit: int) -> None:
        lengths = np.arange(1, LONGEST + 1)
        self._limit = limit
        # of a phrase of n tokens, how many in a row must be the same as n before
        self._enough = np.maximum((TIMES - 1) * lengths, limit - lengths)
        self._runs = np.zeros(LONGEST, np.int64)
        self._recent = np.full(LONGEST, -1, np.int64)  # the newest first

    def push(self, token: int) -> bool:
        """Take the next token; whether the answer repeats itself now."""
        if not self._limit:
            return False
        self._runs = np.where(self._recent == token, self._runs + 1, 0)
        self._recent[1:] = self._recent[:-1]
        self._recent[0] = token
        return bool((self._runs >= self._enough).any())
