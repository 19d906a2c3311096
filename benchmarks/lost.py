"""Which tokens the questions lacked that compression made wrong: each is given back what was dropped, piece by piece.

    python -m benchmarks.lost [--method "both 0.7"] [--kinds first enter needle stop]

For every question that is right without compression and wrong with it: whether merge alone or prune alone loses it too,
whether weights (--weigh) mend it, which frames do when all their tokens are given back, and which of the dropped tokens
do one by one, as frame and place. The questions are those of benchmarks.accuracy. A line of JSON a question.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.accuracy import SEED, asked_about, clips, contestant_of, prepare
from benchmarks.methods import Contestant, Method, chosen
from benchmarks.scenes import questions, world
from dycoke_edge.export.shipped import named

Array = NDArray[Any]


class Case:
    """One question about one clip, asked with any tokens."""

    def __init__(self, contestant: Contestant, tokens: Array, question: questions.Question, seed: int) -> None:
        self._contestant, self._tokens, self._question, self._seed = contestant, tokens, question, seed

    def right(self, method: Method, index: NDArray[np.int32] | None = None) -> bool:
        """Under a method, or with its way of decoding and these tokens."""
        if index is not None:
            method = replace(method, select=lambda tokens, count, random: index)
        _, (answer,) = self._contestant.answer(method, self._tokens, [self._question.text], self._seed)
        return self._contestant.llm.text.decode(answer.ids).strip() == self._question.answer


def lost(contestant: Contestant, seed: int, frames: int, kinds: tuple[str, ...], method: Method) -> Iterator[Any]:
    """A line a question of one clip that `method` loses."""
    (off,) = chosen(["no compression"])
    tokens = contestant.encode(world.draw(world.plan(seed, "test", frames)))
    kept = contestant.chosen(method, tokens, seed).index
    per_frame, every = tokens.shape[1], np.arange(tokens.shape[0] * tokens.shape[1], dtype=np.int32)
    dropped = np.setdiff1d(every, kept)
    for question in asked_about(seed, frames, kinds):
        case = Case(contestant, tokens, question, seed)
        if not case.right(off) or case.right(method):
            continue
        whole = [np.union1d(kept, every[f * per_frame : (f + 1) * per_frame]) for f in range(len(tokens))]
        single = [int(token) for token in dropped if case.right(method, np.union1d(kept, [token]).astype(np.int32))]
        merged, weighed = (
            replace(method, compression=replace(method.compression, **change))
            for change in ({"prune_ratio": 0.0}, {"weigh": True})
        )
        yield {
            "seed": seed,
            "kind": question.kind,
            "question": question.text,
            "answer": question.answer,
            "merge_alone": "right" if case.right(merged) else "wrong",
            "weighed": "right" if case.right(weighed) else "wrong",
            "prune_alone": "right" if case.right(method, every) else "wrong",
            "frames_that_mend": [f for f, index in enumerate(whole) if case.right(method, index.astype(np.int32))],
            "dropped": len(dropped),
            "tokens_that_mend": [divmod(token, per_frame) for token in single],
        }


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="both 0.7", help="a row of benchmarks.accuracy that merges")
    parser.add_argument("--kinds", nargs="+", default=["first", "enter", "needle", "stop"], choices=questions.KINDS)
    parser.add_argument("--questions", type=int, default=1000, help="of all kinds, as benchmarks.accuracy counts")
    parser.add_argument("--frames", type=int, default=16)
    args = parser.parse_args()
    (method,) = chosen([args.method])
    contestant = contestant_of(prepare(named("tiny"), {method.split}), method.split)
    for seed in clips(args.questions, args.frames, tuple(questions.KINDS), SEED):
        for line in lost(contestant, seed, args.frames, tuple(args.kinds), method):
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
