"""The options of every side, as frozen dataclasses (`config_camera`: of cameras; `config_serve`: of the server). A
default, a range and a help text are written here once; the command line, the Python API and the error messages read
them from here."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from dycoke_edge.errors import UsageError

MergeMode = Literal["coverage", "paper", "official"]
KeepMode = Literal["coverage", "attention"]
Positions = Literal["reassign", "keep"]
DType = Literal["fp32", "fp16"]
Provider = Literal["cpu", "cuda", "tensorrt"]
Decoding = Literal["captured", "launched", "graphs"]
Seeing = Literal["kernels", "graph"]
BUDGET = 0.25  # of mode coverage
RATIO = 0.7  # the paper's K
PRUNE = {"coverage": 0.5, "paper": 0.7, "official": 0.7}
MOST_PIXELS = 36_000_000  # a little over 8K
SCRATCH_ROWS = 4096  # a prefill chunk shrinks behind more rows than this, so that its scratch memory stays bounded


def option(
    default: Any,
    help: str,
    low: float | None = None,
    high: float | None = None,
    choices: tuple[str, ...] = (),
    example: Any = None,
) -> Any:
    """A dataclass field with the range (ends included) and help text that `Options` and the CLI read. Errors give the
    default as a value that works, or `example`."""
    metadata = {"help": help, "low": low, "high": high, "choices": choices, "example": example}
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
            if value is None and (field.default is None or "None" in str(field.type)):
                continue
            for item in value if isinstance(value, tuple) else (value,):
                _check(field, item)


def split(call: str, options: Mapping[str, Any], *groups: type[Options]) -> list[dict[str, Any]]:
    """The fields of each group among `options`, lists as tuples. UsageError for a name that is in none, with the
    nearest that is."""
    names = [{field.name for field in dataclasses.fields(group)} for group in groups]
    for name in options:
        if not any(name in own for own in names):
            near = difflib.get_close_matches(name, sorted(set().union(*names)), 1, 0.5)
            known = " and ".join(group.__name__ for group in groups)
            hint = f"did you mean {near[0]}?" if near else f"give {groups[0].__name__}'s, e.g. {sorted(names[0])[0]}"
            raise UsageError(f"{call}: there is no option {name}; {hint} (options are the fields of {known})")
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}
    return [{name: given[name] for name in given if name in own} for own in names]


def _check(field: dataclasses.Field[Any], value: object) -> None:
    low, high, choices = (field.metadata.get(key) for key in ("low", "high", "choices"))
    if choices and value not in choices:
        raise _bad(field, value, f"must be one of {', '.join(choices)}")
    if low is None and high is None:
        return
    whole = "int" in str(field.type)
    if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)) or not math.isfinite(value):
        raise _bad(field, value, "must be a whole number" if whole else "must be a number")
    if _outside(value, low, lambda v, bound: v < bound) or _outside(value, high, lambda v, bound: v > bound):
        span = f"between {low:.10g} and {high:.10g}" if high is not None else f"{low:.10g} or more"
        raise _bad(field, value, f"must be {span}")


def _outside(value: float, bound: float | None, beyond: Callable[[float, float], bool]) -> bool:
    return bound is not None and beyond(value, bound)


def _bad(field: dataclasses.Field[Any], value: object, rule: str) -> UsageError:
    default = field.default[0] if isinstance(field.default, tuple) else field.default
    known = (field.metadata["example"], default, field.metadata["low"])
    hint = next((value for value in known if value is not None), None)
    return UsageError(f"{field.name}={value!r} ({flag(field.name)}) {rule}, e.g. {flag(field.name)} {hint}")


@dataclass(frozen=True)
class Compression(Options):
    """Which visual tokens enter the decoder (merge), and which of them its deep layers see while decoding (keep): by
    coverage, the project's own way, or as DyCoke (arXiv 2411.15024) has it.

    Mode "coverage" is described in `dycoke.py`. Modes "paper" and "official" are DyCoke:
    `merge_ratio` is the paper's K, `prune_ratio` its P; its L is the bundle's split layer; `refresh_threshold` is the
    cosine of the released code, `weigh` what ToMe does (arXiv 2210.09461). A field that is not given takes the default
    of its mode; after that none is None, and `budget` is 1 outside of coverage, `merge_ratio` 0 within.
    """

    mode: MergeMode = option(
        None,
        "how merge chooses: by coverage, as the paper does, or as the released code does (default coverage; paper "
        "where a merge ratio is given)",
        choices=("coverage", "paper", "official"),
    )
    budget: float = option(
        None,
        f"coverage: share of every frame's visual tokens that stays; 1 = all (default {BUDGET:g})",
        *(0.001, 1),
        example=BUDGET,
    )
    merge_ratio: float = option(
        None,
        f"paper: share of a compared frame's tokens that is dropped; 0 = none (default {RATIO:g})",
        *(0, 1),
        example=RATIO,
    )
    prune_ratio: float = option(
        None,
        "share of visual tokens deep layers set aside while decoding; 0 = off "
        f"(default {PRUNE['coverage']:g} with coverage, {PRUNE['paper']:g} with the paper's merge)",
        *(0, 1),
        example=PRUNE["coverage"],
    )
    keep: KeepMode = option(
        None,
        "how keep chooses: what covers the frames, for good, or what is attended to, again and again (default coverage "
        "with coverage, else attention)",
        choices=("coverage", "attention"),
    )
    refresh_threshold: float = option(
        0.9, "keep by attention: choose anew below this cosine of two steps' attention", -1, 1
    )
    positions: Positions = option(
        None,
        "RoPE positions after merge: the original ones, or renumbered (default keep with coverage, else reassign)",
        choices=("reassign", "keep"),
    )
    free_parked: bool = option(
        False, "give back what is set aside after the first choice, one way (saves memory on the CPU)"
    )
    weigh: bool = option(
        False, "paper: a kept token counts for those that merge dropped because they resembled it (coverage: always)"
    )

    def __post_init__(self) -> None:
        mode = self.mode or ("coverage" if self.merge_ratio is None else "paper")
        covers = mode == "coverage"
        defaults = {
            "mode": mode,
            "budget": BUDGET if covers else 1.0,
            "merge_ratio": 0.0 if covers else RATIO,
            "prune_ratio": PRUNE.get(mode, 0.0),
            "keep": "coverage" if covers else "attention",
            "positions": "keep" if covers else "reassign",
        }
        for name, value in defaults.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        super().__post_init__()
        self._check_mode(covers)

    def _check_mode(self, covers: bool) -> None:
        """Refuse what means nothing in this mode."""
        if covers and self.merge_ratio:
            raise UsageError(
                f"merge_ratio={self.merge_ratio:g} (--merge-ratio) is the paper's; use it with --mode paper, or "
                f"--budget {1 - self.merge_ratio:.2g}"
            )
        if not covers and self.budget != 1:
            raise UsageError(
                f"budget={self.budget:g} (--budget) belongs to --mode coverage; use --merge-ratio with {self.mode}"
            )
        if not covers and self.keep == "coverage":
            raise UsageError("keep='coverage' (--keep) needs what merge by coverage finds; use it with --mode coverage")
        if self.weigh and self.mode == "official":
            raise UsageError(
                "weigh (--weigh) is nothing that the released code does; use it with --mode paper, or leave it out"
            )

    def of_picture(self) -> Compression:
        """These settings for a single picture, which repeats nothing: coverage leaves it whole."""
        return dataclasses.replace(self, budget=1.0, prune_ratio=0.0) if self.mode == "coverage" else self

    @classmethod
    def off(cls) -> Compression:
        """The same graphs without compression: nothing merged, nothing set aside."""
        return cls(merge_ratio=0.0, prune_ratio=0.0)

    def but(self, **given: Any) -> Compression:
        """These settings with some given instead, which may ask for another mode: `merge_ratio` for the paper's,
        `budget` for coverage. What the modes share stays then; the rest takes the defaults of the new one."""
        mode = given.get("mode") or self.mode
        if "mode" not in given and "merge_ratio" in given and self.mode == "coverage":
            mode = "paper"
        if "mode" not in given and "budget" in given:
            mode = "coverage"
        if mode == self.mode:
            return dataclasses.replace(self, **given)
        shared = {"refresh_threshold": self.refresh_threshold, "free_parked": self.free_parked}
        return Compression(**(shared | given | {"mode": mode}))

    @property
    def merges(self) -> bool:
        """Merge has something to do: tokens to drop, or rows to find that keep parks."""
        if self.mode == "coverage":
            return self.budget < 1 or self.covered_ratio > 0
        return self.merge_ratio > 0

    @property
    def covered_ratio(self) -> float:
        """The share of its tokens that keep by coverage parks; 0 where keep is by attention."""
        return self.prune_ratio if self.keep == "coverage" else 0.0

    @property
    def counted(self) -> bool:
        """Kept tokens count for those that were dropped."""
        return self.merges and (self.weigh or self.mode == "coverage")


@dataclass(frozen=True)
class Sampling(Options):
    """How tokens are drawn, and when an answer ends. `temperature` 0 is greedy. `stop_token_ids` None means the
    bundle's own; with () nothing but `max_new_tokens` ends an answer, not even `repeat_limit`: the most tokens that one
    phrase, said three times in a row or more, may fill."""

    max_new_tokens: int = option(128, "longest answer, in tokens", 1, 2**20)
    temperature: float = option(0.0, "0 is greedy; higher is more random", 0)
    top_p: float = option(1.0, "draw from the smallest set of tokens with this probability", 0, 1)
    seed: int = option(0, "seed of the random draw", 0, 2**63)
    stop_token_ids: tuple[int, ...] | None = option(None, "token ids that end the answer (the bundle's own)", 0)
    repeat_limit: int = option(
        32, "tokens that a phrase said again and again may fill before the answer is stopped; 0 is off", 0, 2**20
    )


@dataclass(frozen=True)
class Clip(Options):
    """Which frames of a video are looked at: `num_frames` spread evenly, or `fps` frames a second."""

    num_frames: int = option(32, "frames spread evenly over the clip", 1, 2**16)
    fps: float | None = option(None, "frames a second, instead of --num-frames", 1e-3, 1000)
    start: float = option(0.0, "where to begin, in seconds", 0)
    end: float | None = option(None, "where to stop, in seconds", 0)
    max_pixels: int = option(MOST_PIXELS, "most pixels (width x height) of a picture that is decoded", 1, 2**28)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.end is not None and self.end <= self.start:
            raise UsageError(f"end={self.end:g} (--end) must be later than start={self.start:g} (--start)")


@dataclass(frozen=True)
class EngineSpec(Options):
    """What runs the graphs and how much memory it may hold."""

    provider: Provider = option("cpu", "inference engine", choices=("cpu", "cuda", "tensorrt"))
    decoder: Decoding | None = option(
        None,
        "what decodes on a GPU: own kernels in one captured CUDA graph, the same ones launched one by one, or the "
        "bundle's decoder graphs; the CPU has only graphs (default captured on a GPU)",
        choices=("captured", "launched", "graphs"),
    )
    vision: Seeing | None = option(
        None,
        "what encodes frames with --provider cuda: own kernels, or the bundle's vision graph on onnxruntime-gpu; other "
        "providers have only the graph (default kernels with --provider cuda)",
        choices=("kernels", "graph"),
    )
    threads: int = option(0, "CPU threads; 0 is one a physical core", 0, 1024)
    kv_capacity: int = option(8192, "rows (tokens) of the KV buffer", 2, 2**24)
    prefill_chunk: int | None = option(
        None,
        "prompt tokens computed at a time (default 256 on the CPU; on a GPU 4096 with own kernels, 2048 with graphs)",
        1,
        2**14,
    )
    vision_batch: int | None = option(None, "frames encoded at a time (default 1 on the CPU, 8 on a GPU)", 1, 1024)
    resident: bool = option(
        False, "on the CPU, hold both stages in memory, weights packed: faster, needs almost twice the memory"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.decoder in ("captured", "launched") and not self.on_gpu:
            raise UsageError(
                f"decoder={self.decoder!r} (--decoder) needs a GPU; use --provider cuda with it, or --decoder graphs"
            )

        if self.vision == "kernels" and self.provider != "cuda":
            raise UsageError(
                f"vision='kernels' (--vision) needs --provider cuda, not {self.provider}; use --vision graph"
            )

    @property
    def on_gpu(self) -> bool:
        """Graphs run on a GPU."""
        return self.provider != "cpu"

    @property
    def stays(self) -> bool:
        """Vision and decoder stay in memory between requests; on a GPU always, for loading takes longer than a
        request."""
        return self.resident or self.on_gpu

    @property
    def decoding(self) -> Decoding:
        """`decoder`, or what it is where none was asked for."""
        return self.decoder or ("captured" if self.on_gpu else "graphs")

    @property
    def seeing(self) -> Seeing:
        """`vision`, or what it is where none was asked for."""
        return self.vision or ("kernels" if self.provider == "cuda" else "graph")

    @property
    def tokens_at_a_time(self) -> int:
        """`prefill_chunk`, or what it is where none was asked for."""
        return self.prefill_chunk or ((2048 if self.decoding == "graphs" else 4096) if self.on_gpu else 256)

    @property
    def frames_at_a_time(self) -> int:
        """`vision_batch`, or what it is where none was asked for."""
        return self.vision_batch or (8 if self.on_gpu else 1)


@dataclass(frozen=True)
class LiveSpec(Options):
    """How a video that is still arriving is held in memory: how much of it, and which frames are worth encoding."""

    memory_frames: int = option(32, "frames remembered; the oldest goes when another one comes", 1, 2**16)
    gate_threshold: float | None = option(
        4.0,
        "a frame in which no block of pixels differs by more of 255 levels is not encoded; 0 turns this off",
        0,
        255,
    )
    scene_cut: float | None = option(
        0.5, "a frame less similar than this to the one it is compared with is kept whole; -1 turns this off", -1, 1
    )
    max_question_tokens: int = option(256, "rows kept free for a question and its chat template", 1, 2**20)
    max_answer_tokens: int = option(256, "rows kept free for an answer", 1, 2**20)


@dataclass(frozen=True)
class ExportSpec(Options):
    """How a checkpoint becomes a bundle."""

    dtype: DType = option("fp32", "precision of the graphs", choices=("fp32", "fp16"))
    merge_ratio: tuple[float, ...] = option((0.3, 0.5, 0.7, 0.9), "merge ratios the bundle offers", 0, 1)
    split_layer: int = option(3, "layer where the decoder is cut: keep works from here on", 1)


BUILD_GRAPHS = ("vision", "merge", "decoder")


@dataclass(frozen=True)
class BuildSpec(Options):
    """What TensorRT builds from a bundle, and the largest shapes that its plans take."""

    graphs: tuple[str, ...] = option(
        ("vision", "merge"), "graphs to build; the decoder's are for --decoder graphs only", choices=BUILD_GRAPHS
    )
    vision_batch: int = option(8, "frames encoded at a time: more need more memory; fewer always work", 1, 1024)
    kv_capacity: int = option(8192, "decoder: rows (tokens) of the KV buffer", 2, 2**24)
    prefill_chunk: int = option(2048, "decoder: prompt tokens computed at a time", 1, 2**14)
    usual_rows: int = option(2048, "decoder: rows of the KV buffer that it is made fast for", 1, 2**24)
    workspace: int | None = option(None, "MiB that a kernel may use as scratch memory (all there are)", 1, 2**20)
    level: int = option(3, "how thoroughly kernels are tried: 0 fast build, 5 fast plan", 0, 5)
    time_limit: float = option(3600.0, "seconds that building one graph may take", 1, 86400)
    force: bool = option(False, "build again what is there and fits")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.graphs:
            raise UsageError(f"graphs=() (--graphs) builds nothing; use e.g. --graphs {BUILD_GRAPHS[0]}")


BENCH_MODES = ("vision", "merge", "prefill", "decode", "e2e")


@dataclass(frozen=True)
class BenchSpec(Options):
    """What is measured on a device, and how often."""

    stages: tuple[str, ...] = option(BENCH_MODES, "stages to measure", choices=BENCH_MODES)
    num_frames: int = option(8, "frames of the video", 1, 2**16)
    prompt_tokens: int = option(20, "tokens of the question, its chat template not counted", 1, 2**16)
    new_tokens: int = option(128, "tokens of the answer", 2, 2**16)
    rounds: int = option(6, "times everything is measured", 1, 2**20)
    warmup: int = option(2, "rounds before that, which do not count", 0, 2**20)
    bandwidth: float | None = option(
        None,
        "GB/s that the memory can be read at, e.g. from the data sheet (as the CPU measures, or as a GPU says)",
        1e-3,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.stages:
            raise UsageError(f"stages=() (--stages) measures nothing; use e.g. --stages {BENCH_MODES[0]}")
