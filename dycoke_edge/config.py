"""The options of every side, as frozen dataclasses (`config_camera`: of cameras; `config_serve`: of the server). A
default, a range and a help text are written here once; the command line, the Python API and the error messages read
them from here."""

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
Provider = Literal["cpu", "cuda", "tensorrt"]
Decoding = Literal["captured", "launched", "graphs"]
Seeing = Literal["kernels", "graph"]
MOST_PIXELS = 36_000_000  # a little over 8K
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
            if value is None and (field.default is None or "None" in str(field.type)):
                continue
            for item in value if isinstance(value, tuple) else (value,):
                _check(field, item)


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
    hint = default if default is not None else field.metadata["low"]
    return UsageError(f"{field.name}={value!r} ({flag(field.name)}) {rule}, e.g. {flag(field.name)} {hint}")


@dataclass(frozen=True)
class Compression(Options):
    """The settings of DyCoke (arXiv 2411.15024): `merge_ratio` is the paper's K, `prune_ratio` its P; its L is the
    bundle's split layer. `refresh_threshold` is the cosine of the released code, `weigh` what ToMe does (arXiv
    2210.09461)."""

    merge_ratio: float = option(0.7, "share of a compared frame's tokens that merge drops; 0 turns merge off", 0, 1)
    prune_ratio: float = option(0.7, "share of visual tokens deep layers set aside while decoding; 0 = off", 0, 1)
    refresh_threshold: float = option(0.9, "choose the kept set anew below this cosine of attention", -1, 1)
    mode: MergeMode = option(
        "paper", "semantics: the paper's, or those of the released code", choices=("paper", "official")
    )
    positions: Positions = option(
        "reassign", "RoPE positions after merge: renumbered, or the original ones", choices=("reassign", "keep")
    )
    free_parked: bool = option(
        False, "give back what is set aside after the first choice, one way (saves memory on the CPU)"
    )
    weigh: bool = option(False, "a kept token counts for those that merge dropped because they resembled it")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weigh and self.mode == "official":
            raise UsageError(
                "weigh (--weigh) is nothing that the released code does; use it with --mode paper, or leave it out"
            )

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

    mode: tuple[str, ...] = option(BENCH_MODES, "stages to measure", choices=BENCH_MODES)
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
        if not self.mode:
            raise UsageError(f"mode=() (--mode) measures nothing; use e.g. --mode {BENCH_MODES[0]}")
