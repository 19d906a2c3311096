"""The rows of the accuracy bench: each is a way to choose tokens and a way to decode, run on the device runtime."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks import fastv, keepers
from benchmarks.candidates import Chosen, scored
from benchmarks.selectors import Selector, changed_tokens, last_frames, random_tokens, spread_frames
from dycoke_edge import Compression, Sampling, UsageError, VideoLLM
from dycoke_edge.dycoke import stands_for
from dycoke_edge.runtime import layers, visual
from dycoke_edge.runtime.kv import KVBuffer
from dycoke_edge.runtime.loop import Decoder
from dycoke_edge.runtime.step import Step

Array = NDArray[Any]
Ids = NDArray[np.int64]
MERGES = (0.3, 0.5, 0.7, 0.9, 1.0)
SHARES = (0.464, 0.31, 0.25, 0.145, 0.105)  # of the tokens: what merge 0.7, 0.9 and 1 leave, and less
SPLIT = 3  # the layer where the bundles are cut unless a method says otherwise
OFF = Compression.off()
BOTH = Compression(merge_ratio=0.7, prune_ratio=0.7)  # the paper's 14.25 %
NEW_TOKENS = 160


@dataclass(frozen=True)
class Method:
    """A row. `line` is the curve that it belongs to; a baseline takes `total`, a share of the tokens: as many as
    coverage does at that budget."""

    name: str
    line: str
    compression: Compression = OFF
    select: Selector | None = None
    fastv: bool = False
    split: int = SPLIT
    choose: Callable[..., Chosen] | None = None  # of tokens and their number, and the clip's `seed`
    total: float = 1.0
    keep: str = ""  # a set of keepers.SETS, or how attention is remembered, or both: "nested/2+max"
    prune: float = 0.0  # with `keep`, the share that it sets aside
    heirs: bool = False  # parked rows leave their counts to active ones
    deep: bool = True  # parked rows enter the deep layers


@dataclass(frozen=True)
class Answer:
    """Token ids of one answer, and how many visual rows the deep layers saw, mean over its tokens."""

    ids: list[int]
    active: float


def methods() -> dict[str, Method]:
    """Every row by name, no compression first."""
    rows = [Method("no compression", "no compression"), *_coverage(), *_ours(), *_baselines()]
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


def percent(share: float) -> str:
    """46 % of 0.464."""
    return f"{int(100 * share)} %"


def _coverage() -> Iterator[Method]:
    for share in SHARES:
        yield Method(f"coverage {percent(share)}", "coverage", Compression(budget=share, prune_ratio=0.0))
    for share, prune in ((0.464, 0.7), (0.25, 0.5), (0.145, 0.5)):
        name, kept = f"coverage {percent(share)}, keep {prune:g}", Compression(budget=share, prune_ratio=prune)
        yield Method(name, "coverage and keep", kept)
    attended = Compression(budget=0.464, prune_ratio=0.7, keep="attention")
    yield Method("coverage 46 %, keep 0.7 by attention", "variants", attended)


def _dycoke(merge: float, prune: float = 0.0, weigh: bool = False) -> Compression:
    return Compression(merge_ratio=merge, prune_ratio=prune, weigh=weigh)


def _baselines() -> Iterator[Method]:
    selectors = {
        "random tokens": (random_tokens, OFF),
        "changed tokens (EVS)": (changed_tokens, replace(OFF, positions="keep")),
        "frames spread": (spread_frames, OFF),
        "last frames": (last_frames, OFF),
    }
    for share in SHARES:
        for line, (select, compression) in selectors.items():
            yield Method(f"{line} {percent(share)}", line, compression, select, total=share)
        yield Method(f"FastV {percent(share)}", "FastV", fastv=True, total=share)
        choose = partial(scored, score="random", memory=0)
        counted = replace(OFF, positions="keep")
        line = "random tokens, counted"
        yield Method(f"{line} {percent(share)}", line, counted, choose=choose, total=share)


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
        chosen = self.chosen(method, tokens, seed)
        self._see(method, tokens, chosen, prefix, text_rows)
        answers = []
        for suffix in suffixes:
            if self.decoder.kv.freed:
                self._see(method, tokens, chosen, prefix, text_rows)
            with keeping(method, chosen, tokens, self.decoder.kv):
                answers.append(self._answer(list(self._steps(method, len(tokens), suffix, chosen, tokens))))
        return len(chosen.index), answers

    def chosen(self, method: Method, tokens: Array, seed: int) -> Chosen:
        """The tokens that enter the decoder, and what they count; FastV drops them later."""
        if method.choose is not None:
            return method.choose(tokens, self._budget(method, tokens), seed=seed)
        if method.select is None:
            merged = visual.merge(self.llm.bundle, self.llm.engine, tokens, method.compression)
            assert merged.counts is None or isinstance(merged.counts, np.ndarray), "this bench runs on the CPU"
            return Chosen(np.asarray(merged.index), merged.counts)
        index = method.select(tokens, self._budget(method, tokens), np.random.default_rng(seed))
        return Chosen(index, stands_for(index, *tokens.shape[:2]) if method.compression.weigh else None)

    def _budget(self, method: Method, tokens: Array) -> int:
        return len(tokens) * int(method.total * tokens.shape[1])

    def _see(self, method: Method, tokens: Array, chosen: Chosen, prefix: Ids, text_rows: int) -> None:
        flat, kept = tokens.reshape(-1, tokens.shape[-1]), method.compression.positions == "keep"
        positions = chosen.index if kept else np.arange(len(chosen.index), dtype=np.int32)
        span = len(flat) if kept else len(positions)
        counts = chosen.counts if chosen.counts is None or chosen.counts.ndim == 2 else np.stack([chosen.counts] * 2)
        values = flat[chosen.index] if chosen.values is None else chosen.values.astype(flat.dtype)
        self.decoder.begin(prefix, text_rows)
        if method.fastv or not method.deep:
            self._hidden = fastv.see(self.decoder, values, positions, span, counts)
        else:
            self.decoder.see(values, positions, span, counts)

    def _steps(self, method: Method, frames: int, suffix: Ids, chosen: Chosen, tokens: Array) -> Iterator[Step]:
        sampling = Sampling(max_new_tokens=NEW_TOKENS, stop_token_ids=self.llm.bundle.manifest.stop_token_ids)
        places = chosen.index if method.compression.positions == "keep" else np.arange(len(chosen.index))
        if method.fastv:
            return fastv.answer(self.decoder, self._hidden, suffix, self._budget(method, tokens), sampling, places)
        if not method.deep:
            mask = keepers.SETS[method.keep](chosen, tokens, 1 - method.prune)
            return fastv.answer(self.decoder, self._hidden, suffix, int(mask.sum()), sampling, places, mask)
        compression = replace(method.compression, prune_ratio=method.prune) if method.keep else method.compression
        return self.decoder.answer(suffix, compression, sampling)

    def _suffix(self, question: str) -> Ids:
        ids = self.llm.text.encode(question, "video")[1]
        return np.concatenate([[self.llm.bundle.manifest.newline_id], ids]).astype(np.int64)

    def _answer(self, steps: list[Step]) -> Answer:
        return Answer([step.token for step in steps], float(np.mean([step.active for step in steps])))


@contextmanager
def keeping(method: Method, chosen: Chosen, tokens: Array, kv: KVBuffer) -> Iterator[None]:
    """The method's own way to keep, where it has one."""
    if not method.keep:
        yield
        return
    own, bias = layers._keep_policy, kv.bias
    policy = _policy(method, chosen, tokens)
    layers._keep_policy = lambda kv, compression: policy
    if method.heirs:
        assert isinstance(policy, keepers.Fixed)
        inherited = np.log(keepers.heirs(policy.mask, chosen, tokens))

        def deep_bias(rows: slice) -> NDArray[np.float32]:
            found = bias(rows)
            if rows == kv.deep and kv.num_active < kv.num_visual:
                slot = kv.slot[: kv.num_visual]
                there = slot >= rows.start
                found[1, slot[there] - rows.start] = inherited[there]
            return found

        kv.bias = deep_bias  # type: ignore[method-assign]
    try:
        yield
    finally:
        layers._keep_policy = own
        kv.bias = bias  # type: ignore[method-assign]


def _policy(method: Method, chosen: Chosen, tokens: Array) -> Any:
    """`even`: a set that stays; `even/2+max`: half of the places by it, the others by attention remembered so."""
    name, _, how = method.keep.partition("+")
    share = 1 - method.prune
    if not how and name in keepers.SETS:
        return keepers.Fixed(keepers.SETS[name](chosen, tokens, share))
    count = int(len(chosen.index) * share)
    fixed = np.zeros(len(chosen.index), np.bool_)
    if how:
        set_name, _, part = name.partition("/")
        fixed = keepers.SETS[set_name](chosen, tokens, share / float(part or 1))
    return keepers.Remembered(fixed, count, how or name)
