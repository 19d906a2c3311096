"""What every side can do, which sides there are, and what one is told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from time import perf_counter
from typing import Protocol

from dycoke_edge.config import Compression

PROMPT = "What is going on now"  # 20 tokens of the byte-level tokenizer of random models


@dataclass
class Answer:
    """One answer: ids, and when each was there, in seconds from when the frames were handed over."""

    ids: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    rows: int = 0  # tokens of the prompt that entered the decoder
    visual: int = 0  # of which visual
    active: float = 0.0  # visual rows that deep layers attended to, mean over decode steps
    refreshes: int = 0


class Contestant(Protocol):
    """A loaded model with its frames, uint8 [F, R, R, 3] in host memory, and its question."""

    def vision(self) -> None:
        """From the frames to visual tokens on the device, done when it returns."""

    def answer(self, new_tokens: int) -> Answer:
        """From the frames to an answer of exactly `new_tokens`, greedy."""


@dataclass(frozen=True)
class Job:
    """One side and its case."""

    name: str
    checkpoint: str
    bundle: str
    frames: int
    new_tokens: int
    device: str  # cuda or cpu
    half: bool
    split_layer: int = 3


@dataclass(frozen=True)
class Side:
    """Where a side's class is, and what it is made with."""

    module: str
    title: str
    compression: Compression | None = None

    def load(self) -> Callable[[Job, Side], Contestant]:
        """The class; imports what it needs only here."""
        from importlib import import_module

        made: Callable[[Job, Side], Contestant] = import_module(f"benchmarks.rivals.{self.module}").Make
        return made


OFF, MERGE, BOTH = Compression.off(), Compression(mode="paper", prune_ratio=0.0), Compression(mode="paper")
SIDES = {
    "transformers": Side("generate", "transformers, SDPA, generate"),
    "compiled": Side("compiled", "transformers, static cache, torch.compile(reduce-overhead)"),
    "official": Side(
        "official", "DyCoke as released: K and V gathered in every deep layer", Compression(mode="official")
    ),
    "ours-off": Side("ours", "ours, compression off", OFF),
    "ours-merge": Side("ours", "ours, merge 0.7", MERGE),
    "ours-both": Side("ours", "ours, merge 0.7 and prune 0.7", BOTH),
    "ours-coverage": Side("ours", "ours, coverage 25 %, keep half of it", Compression()),
    "ours-coverage-14": Side("ours", "ours, coverage 14 %, keep half of it", Compression(budget=0.145)),
}


def side_of(name: str) -> Side:
    """The side of a name such as ours-off, ours-off@tensorrt or ours-off@cuda,decoder=launched."""
    return SIDES[name.partition("@")[0]]


def engine_of(name: str, device: str) -> dict[str, str | int]:
    """Options of EngineSpec that a name asks for: @PROVIDER,OPTION=VALUE,..."""
    provider, *options = name.partition("@")[2].split(",")
    pairs = [option.split("=", 1) for option in options]
    return {"provider": provider or device} | {key: int(value) if value.isdigit() else value for key, value in pairs}


def stopwatch() -> Callable[[], float]:
    """Seconds since this call, by the host's clock."""
    began = perf_counter()
    return lambda: perf_counter() - began
