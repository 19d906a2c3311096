"""The search for tokens that a question lacked, on a model of which it is known."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from benchmarks import lost
from benchmarks.candidates import Chosen
from benchmarks.methods import Method, chosen
from benchmarks.scenes import world
from benchmarks.scenes.questions import Question

KEPT = np.array([0, 1, 2, 3, 6, 9], np.int32)  # of three frames of four tokens


class Needing:
    """Answers "yes" where it sees a token, at any time while decoding."""

    def __init__(self, needed: int) -> None:
        self._needed = needed
        self.llm = SimpleNamespace(text=SimpleNamespace(decode=lambda ids: "yes" if ids else "no"))

    def encode(self, frames: object) -> NDArray[Any]:
        return np.zeros((3, 4, 2), np.float32)

    def chosen(self, method: Method, tokens: object, seed: int) -> Chosen:
        return Chosen(KEPT)

    def answer(self, method: Method, tokens: Any, asked: list[str], seed: int) -> tuple[int, list[Any]]:
        index = KEPT if method.compression.merge_ratio else np.arange(12, dtype=np.int32)
        if method.select is not None:
            index = method.select(tokens, 0, np.random.default_rng(0))
        return len(index), [SimpleNamespace(ids=[1] * (self._needed in index))]


@pytest.mark.parametrize(("needed", "count"), [(7, 1), (6, 0)])
def test_the_token_that_was_needed_is_found(monkeypatch: pytest.MonkeyPatch, needed: int, count: int) -> None:
    question = Question("first", "Which one?", "yes")
    monkeypatch.setattr(lost, "asked_about", lambda seed, frames, kinds: [question])
    monkeypatch.setattr(world, "draw", lambda plan: None)
    (method,) = chosen(["both 0.7"])
    contestant: Any = Needing(needed)
    found = list(lost.lost(contestant, 0, 3, ("first",), method))
    assert len(found) == count
    for line in found:
        assert (line["frames_that_mend"], line["tokens_that_mend"]) == ([1], [(1, 3)])
        assert (line["merge_alone"], line["weighed"], line["prune_alone"]) == ("wrong", "wrong", "right")
