"""The rows of the accuracy bench: each is a way to choose tokens and a way to decode, run on the device runtime."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks import fastv
from benchmarks.selectors import Selector, changed_tokens, last_frames, random_tokens, spread_frames
from dycoke_edge import Compression, Sampling, UsageError, VideoLLM
from dycoke_edge.dycoke import count_merged, stands_for
from dycoke_edge.runtime import visual
from dycoke_edge.runtime.loop import Decoder
from dycoke_edge.runtime.step import Step

Array = NDArray[Any]
Ids = NDArray[np.int64]
MERGES = (0.3, 0.5, 0.7, 0.9, 1.0)
SPLIT = 3  # the layer where the bundles are cut unless a method says otherwise
OFF = Compression.off()
BOTH = Compression(merge_ratio=0.7, prune_ratio=0.7)  # the paper's 14.25 %
NEW_TOKENS = 160


@dataclass(frozen=True)
class Method:
    """A row. `line` is the curve that it belongs to; a baseline has `share` of what merge at `budget` keeps."""

    name: str
    line: str
    compression: Compression = OFF
    select: Selector | None = None
    fastv: bool = False
    budget: float = 0.0  # merge ratio
    share: float = 1.0  # of that number
    split: int = SPLIT


@dataclass(frozen=True)
class Answer:
    """Token ids of one answer, and how many visual rows the deep layers saw, mean over its tokens."""

    ids: list[int]
    active: float


def methods() -> dict[str, Method]:
    """Every row by name, no compression first."""
    rows = [Method("no compression", "no compression"), *_ours(), *_baselines()]
    return {row.name: row for row in rows}


def chosen(names: list[str] | None) -> list[Method]:
    """Rows by name; UsageError for one that is not there."""
    known = methods()
    for name in names or ():
        if name not in known:
            raise UsageError(f"--methods {name!r} is not known; choose from: {', '.join(map(repr, known))}")
    return [known[name] for name in names or known]


def _ours() -> Iterator[Method]:
    for ratio in MERGES:
        yield Method(f"merge {ratio:g}", "merge", _dycoke(ratio))
    for ratio in (0.5, 0.7, 0.9):
        yield Method(f"prune {ratio:g}", "prune", _dycoke(0.0, ratio))
    for ratio in (0.5, 0.7, 0.9):
        yield Method(f"both {ratio:g}", "merge and prune", _dycoke(ratio, ratio))
    official = Compression(merge_ratio=0.7, prune_ratio=0.7, mode="official")
    yield Method("both 0.7, official", "variants", official)
    yield Method("both 0.7, one-shot", "variants", Compression(merge_ratio=0.7, prune_ratio=0.7, free_parked=True))
    yield Method(
        "both 0.7, positions kept", "variants", Compression(merge_ratio=0.7, prune_ratio=0.7, positions="keep")
    )
    for ratio in MERGES:
        yield Method(f"merge {ratio:g}, weighed", "merge, weighed", _dycoke(ratio, weigh=True))
    for ratio in (0.5, 0.7, 0.9):
        yield Method(f"both {ratio:g}, weighed", "merge and prune, weighed", _dycoke(ratio, ratio, weigh=True))
    for split in (1, 5):
        yield Method(f"both 0.7, split layer {split}", "variants", BOTH, split=split)


def _dycoke(merge: float, prune: float = 0.0, weigh: bool = False) -> Compression:
    return Compression(merge_ratio=merge, prune_ratio=prune, weigh=weigh)


def _baselines() -> Iterator[Method]:
    selectors = {
        "random tokens": (random_tokens, OFF),
        "changed tokens (EVS)": (changed_tokens, replace(OFF, positions="keep")),
        "frames spread": (spread_frames, OFF),
        "last frames": (last_frames, OFF),
    }
    for line, (select, compression) in selectors.items():
        for ratio in MERGES:
            yield Method(f"{line} at merge {ratio:g}", line, compression, select, budget=ratio)
        yield Method(f"{line} at 14 %", line, compression, select, budget=0.7, share=0.3)
    for ratio in MERGES:
        yield Method(f"FastV at merge {ratio:g}", "FastV", fastv=True, budget=ratio)
    yield Method("FastV at 14 %", "FastV", fastv=True, budget=0.7, share=0.3)


class Contestant:
    """Answers questions about one clip after another with any method."""

    def __init__(self, llm: VideoLLM) -> None:
        self.llm, self.decoder = llm, Decoder(llm.layers, llm.kv)

    def encode(self, frames: NDArray[np.uint8]) -> Array:
        """frames uint8 [F, R, R, 3] -> tokens [F, N, E]."""
        return self.llm.encode(frames)

    def answer(self, method: Method, tokens: Array, questions: list[str], seed: int) -> tuple[int, list[Answer]]:
        """Tokens that entered the decoder, and an answer a question."""
        prefix, _ = self.llm.text.encode("?", "video")
        suffixes = [self._suffix(question) for question in questions]
        text_rows = len(prefix) + max(map(len, suffixes)) + NEW_TOKENS
        index = self.index(method, tokens, seed)
        self._see(method, tokens, index, prefix, text_rows)
        answers = []
        for suffix in suffixes:
            if self.decoder.kv.freed:
                self._see(method, tokens, index, prefix, text_rows)
            answers.append(self._answer(list(self._steps(method, len(tokens), suffix))))
        return len(index), answers

    def index(self, method: Method, tokens: Array, seed: int) -> NDArray[np.int32]:
        """The tokens that enter the decoder; FastV drops them later."""
        if method.select is None:
            return np.asarray(visual.merge(self.llm.bundle, self.llm.engine, tokens, method.compression)[1])
        return method.select(tokens, self._budget(method, len(tokens)), np.random.default_rng(seed))

    def _budget(self, method: Method, frames: int) -> int:
        return int(count_merged(frames, self.llm.bundle.model.tokens_per_frame, method.budget) * method.share)

    def _see(self, method: Method, tokens: Array, index: NDArray[np.int32], prefix: Ids, text_rows: int) -> None:
        flat, kept = tokens.reshape(-1, tokens.shape[-1]), method.compression.positions == "keep"
        positions = index if kept else np.arange(len(index), dtype=np.int32)
        counts = stands_for(index, *tokens.shape[:2]) if method.compression.weigh else None
        self.decoder.begin(prefix, text_rows)
        if method.fastv:
            self._hidden = fastv.see(self.decoder, flat[index])
        else:
            self.decoder.see(flat[index], positions, len(flat) if kept else len(index), counts)

    def _steps(self, method: Method, frames: int, suffix: Ids) -> Iterator[Step]:
        sampling = Sampling(max_new_tokens=NEW_TOKENS, stop_token_ids=self.llm.bundle.manifest.stop_token_ids)
        if method.fastv:
            return fastv.answer(self.decoder, self._hidden, suffix, self._budget(method, frames), sampling)
        return self.decoder.answer(suffix, method.compression, sampling)

    def _suffix(self, question: str) -> Ids:
        ids = self.llm.text.encode(question, "video")[1]
        return np.concatenate([[self.llm.bundle.manifest.newline_id], ids]).astype(np.int64)

    def _answer(self, steps: list[Step]) -> Answer:
        return Answer([step.token for step in steps], float(np.mean([step.active for step in steps])))
