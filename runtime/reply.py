"""What an answer is: pieces as they come, and the whole."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from time import perf_counter
from typing import Any

from dycoke_edge.bundle import Bundle
from dycoke_edge.runtime.kv import KVBuffer
from dycoke_edge.runtime.stats import Stats
from dycoke_edge.runtime.step import FinishReason, Step
from dycoke_edge.runtime.text import TextStream


@dataclass(frozen=True)
class Reply:
    """A whole answer. `token_ids` include the stop token if there was one; `finish_reason` is then "stop". It is
    "repetition" where the answer repeated itself (`Sampling.repeat_limit`), "length" where it was cut off."""

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    stats: Stats

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "text": self.text,
            "token_ids": self.token_ids,
            "finish_reason": self.finish_reason,
            "stats": self.stats.as_dict(),
        }


@dataclass(frozen=True)
class Piece:
    """A part of an answer: the text that `token` completes (empty inside a character), the running stats, and with
    the last token why it is the last."""

    text: str
    token: int
    stats: Stats
    finish_reason: FinishReason | None = None


def of_one_bundle(bundle: Bundle, answer: Generator[Piece, None, None]) -> Generator[Piece, None, None]:
    """An answer whose last piece comes only if the bundle is what it was before the first; else ReplacedError."""
    bundle.check_same()
    with closing(answer):
        for piece in answer:
            if piece.finish_reason is not None:
                bundle.check_same()
            yield piece


def pieces(
    steps: Iterator[Step],
    text: TextStream,
    kv: KVBuffer,
    stats: Stats,
    began: float,
    on_first: Callable[[], None] = lambda: None,
) -> Iterator[Piece]:
    """Steps with their text and what they cost. `began` is when the request did, by perf_counter; `on_first` is called
    when the first token is there, and then knows what vision and merge took."""
    last = began
    for step in steps:
        seconds = perf_counter() - last
        if stats.new_tokens == 0:
            stats.time_to_first_token = seconds
            on_first()
            stats.prefill_latency = seconds - stats.vision_latency - stats.merge_latency
        else:
            stats.inter_token_latencies.append(seconds)
        stats.count(step)
        stats.kv_bytes, stats.kv_bytes_reserved = kv.live_nbytes, kv.nbytes
        yield Piece(text.push(step.token), step.token, stats, step.finish_reason)
        last = perf_counter()
