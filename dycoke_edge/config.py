"""The options of every side, as frozen dataclasses. A default, a range and a help text are written here once;
the command line, the Python API and the error messages read them from here."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from dycoke_edge.errors import UsageError

MergeMode = Literal["paper", "official"]
Positions = Literal["reassign", "keep"]
DType = Literal["fp32", "fp16"]
Provider = Literal["cpu"]
SCRATCH_ROWS = 4096  # a prefill chunk shrinks behind more rows than this, so that its scratch memory stays bounded


def option(
    default: Any, help: str, low: float | None = None, high: float | None = None, choices: tuple[str, ...] = ()
) -> Any:
    """A dataclass field with the range (ends included) and help text that `Options` and the CLI read."""
    metadata = {"help": help, "low": low, "high": high, "choices": choices}
    return dataclasses.field(default=default, metadata=metadata)


def flag(name: str) -> str:
    """The command-line spelling of a field: merge_ratio -> --merge-ratio."""
    return "--" + name.replace("_", "-")


@dataclass(frozen=True)
class Options:
    """Base of the option groups: checks every field against its declared range, raising UsageError."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is None and field.default is None:
                continue
            for item in value if isinstance(value, tuple) else (value,):
                _check(field, item)


def _check(field: dataclasses.Field[Any], value: object) -> None:
    low, high, choices = (field.metadata.get(key) for key in ("low", "high", "choices"))
    if choices and value not in choices:
        raise _bad(field, value, f"must be one of {', '.join(choices)}")
    if low is None and high is None:
        return
    whole = isinstance(field.default, int)
    if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)) or not math.isfinite(value):
        raise _bad(field, value, "must be a whole number" if whole else "must be a number")
    if _outside(value, low, lambda v, bound: v < bound) or _outside(value, high, lambda v, bound: v > bound):
        span = f"between {low:.10g} and {high:.10g}" if high is not None else f"{low:.10g} or more"
        raise _bad(field, value, f"must be {span}")


def _outside(value: float, bound: float | None, beyond: Callable[[float, float], bool]) -> bool:
    return bound is not None and beyond(value, bound)


def _bad(field: dataclasses.Field[Any], value: object, rule: str) -> UsageError:
    default = field.default[0] if isinstance(field.default, tuple) else field.default
    hint = default if default is not None else field.metadata["low"]
    return UsageError(f"{field.name}={value!r} ({flag(field.name)}) {rule}, e.g. {flag(field.name)} {hint}")


@dataclass(frozen=True)
class Compression(Options):
    """The settings of DyCoke (arXiv 2411.15024): `merge_ratio` is the paper's K, `prune_ratio` its P; its L is the
    bundle's split layer. `refresh_threshold` is the cosine of the released code."""

    merge_ratio: float = option(0.7, "share of a compared frame's tokens that merge drops; 0 turns merge off", 0, 1)
    prune_ratio: float = option(0.7, "share of visual tokens deep layers set aside while decoding; 0 = off", 0, 1)
    refresh_threshold: float = option(0.9, "choose the kept set anew below this cosine of attention", -1, 1)
    mode: MergeMode = option(
        "paper", "semantics: the paper's, or those of the released code", choices=("paper", "official")
    )
    positions: Positions = option(
        "reassign", "RoPE positions after merge: renumbered, or the original ones", choices=("reassign", "keep")
    )
    free_parked: bool = option(False, "give the rows set aside back after the first choice (saves memory, one way)")

    @classmethod
    def off(cls) -> Compression:
        """The same graphs without DyCoke: nothing merged, nothing set aside."""
        return cls(merge_ratio=0.0, prune_ratio=0.0)


@dataclass(frozen=True)
class Sampling(Options):
    """How tokens are drawn. `temperature` 0 is greedy. `stop_token_ids` None means the bundle's own, () none."""

    max_new_tokens: int = option(128, "longest answer, in tokens", 1, 2**20)
    temperature: float = option(0.0, "0 is greedy; higher is more random", 0)
    top_p: float = option(1.0, "draw from the smallest set of tokens with this probability", 0, 1)
    seed: int = option(0, "seed of the random draw", 0, 2**63)
    stop_token_ids: tuple[int, ...] | None = option(None, "token ids that end the answer (the bundle's own)", 0)


@dataclass(frozen=True)
class Clip(Options):
    """Which frames of a video are looked at: `num_frames` spread evenly, or `fps` frames a second."""

    num_frames: int = option(32, "frames spread evenly over the clip", 1, 2**16)
    fps: float | None = option(None, "frames a second, instead of --num-frames", 1e-3, 1000)
    start: float = option(0.0, "where to begin, in seconds", 0)
    end: float | None = option(None, "where to stop, in seconds", 0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.end is not None and self.end <= self.start:
            raise UsageError(f"end={self.end:g} (--end) must be later than start={self.start:g} (--start)")


@dataclass(frozen=True)
class EngineSpec(Options):
    """What runs the graphs and how much memory it may hold."""

    provider: Provider = option("cpu", "inference engine", choices=("cpu",))
    threads: int = option(0, "CPU threads; 0 is one a physical core", 0, 1024)
    kv_capacity: int = option(8192, "rows (tokens) of the KV buffer", 2, 2**24)
    prefill_chunk: int = option(256, "prompt tokens computed at a time", 1, 2**14)
    vision_batch: int = option(1, "frames encoded at a time", 1, 1024)
    resident: bool = option(False, "hold both stages in memory, weights packed: faster, needs almost twice the memory")


@dataclass(frozen=True)
class ExportSpec(Options):
    """How a checkpoint becomes a bundle."""

    dtype: DType = option("fp32", "precision of the graphs", choices=("fp32", "fp16"))
    merge_ratio: tuple[float, ...] = option((0.3, 0.5, 0.7, 0.9), "merge ratios the bundle offers", 0, 1)
    split_layer: int = option(3, "layer where the decoder is cut: keep works from here on", 1)
