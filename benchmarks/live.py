"""A question after 30 s, 5 min and 30 min of video: time to first token and memory, against encoding the window anew.

    python -m benchmarks.live                    0.5B shape with 6 of its 24 layers, about 8 minutes on two cores
    python -m benchmarks.live --layers 24        the whole shape, about half an hour

The clock is simulated, one frame a second. Random visual tokens with a still background stand in for the encoder's,
for 1,800 frames of it would take more than an hour; merge, prefill and answers are the real ones. What the encoder
takes is measured on real pixels, and counted for every frame that an app without streaming would encode again; that
app's question is asked beside ours, in a process of its own. The gate sees real pixels: a still scene with noise,
drifting light and somebody who crosses it for 10 s every 5 minutes. "to short" is the time to the first token against
that of a video as long as the memory, asked in turn.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from benchmarks.environment import stamp, status_bytes

PROMPT = "Is a person in view?"
QUESTIONS, ANSWER_TOKENS = 9, 16
people = Console(stderr=True, soft_wrap=True, highlight=False, width=130)
Array = NDArray[Any]


def load(args: argparse.Namespace) -> Any:
    """The model, with room for the window uncompressed."""
    from dycoke_edge import VideoLLM

    return VideoLLM.load(args.bundle, threads=args.threads, kv_capacity=args.memory_frames * 196 + 1024)


def tokens(llm: Any) -> Callable[[], Array]:
    """Makes a frame's visual tokens [N, E], a still background with noise, like those of `benchmarks.growth`."""
    model, random = llm.bundle.model, np.random.default_rng(0)
    shape = model.tokens_per_frame, model.hidden_size
    still = random.standard_normal(shape, np.float32)
    return lambda: (still + 0.2 * random.standard_normal(shape, np.float32)).astype(model.numpy_dtype)


def stream(args: argparse.Namespace) -> dict[str, Any]:
    """One long video, asked at the given times, in turn with one that ended when its memory was full."""
    from dycoke_edge import LiveSpec

    llm, spec = load(args), LiveSpec(memory_frames=args.memory_frames, gate_threshold=None)
    live, short, frame, rows = llm.live(spec=spec), llm.live(spec=spec), tokens(llm), []
    for _ in range(args.memory_frames):
        short.push_tokens(frame())
    for second in range(1, max(args.seconds) + 1):
        live.push_tokens(frame(), float(second))
        if second in args.seconds:
            rows.append({"seconds": second, **asked(live, short), "anew": part("again", args, live.num_frames)})
            people.print(f"{second} s seen: first token after {rows[-1]['first_token'] * 1e3:.0f} ms")
    return {"rows": rows, "stats": live.stats.as_dict()}


def asked(live: Any, short: Any) -> dict[str, Any]:
    """What questions to a video cost, the same ones to the other between them, and the memory it takes."""
    from dycoke_edge import Sampling

    sampling = Sampling(max_new_tokens=ANSWER_TOKENS, stop_token_ids=())
    pairs = [[list(video.ask(PROMPT, sampling))[-1].stats for video in (live, short)] for _ in range(QUESTIONS)]
    first = [[stats.time_to_first_token for stats in pair] for pair in pairs]
    return {
        "frames": live.num_frames,
        "visual_rows": live.kv.num_visual,
        "first_token": median(long for long, _ in first),
        "first_token_to_short": median(long / brief for long, brief in first),
        "first_token_all": first,
        "inter_token": median(pair[0].percentile(50) for pair in pairs),
        "kv_bytes": live.kv.live_nbytes,
        "live_bytes": live.nbytes,
        "anonymous_bytes": status_bytes("RssAnon"),
        "rebases": live.stats.rebases,
    }


def again(args: argparse.Namespace) -> dict[str, Any]:
    """What a question costs where the window is encoded again: vision, merge and prefill of all its frames."""
    from dycoke_edge import Compression, Sampling
    from dycoke_edge.runtime import visual
    from dycoke_edge.runtime.loop import Prompt

    llm, random = load(args), np.random.default_rng(0)
    pictures = random.integers(0, 256, (3, 384, 384, 3), np.uint8)
    llm.engine.load("vision")
    began = perf_counter()
    visual.encode(llm.bundle, llm.engine, pictures, 1)
    vision, frame = (perf_counter() - began) / len(pictures), tokens(llm)
    llm.engine.unload("vision")
    prefix, suffix = llm.text.encode(PROMPT, "video")
    window, prefill = np.stack([frame() for _ in range(args.memory_frames)]), []
    next(llm._decoder.decode(Prompt(prefix, suffix), Compression(), Sampling()))  # opens the graphs
    for ratio in (0.0, 0.7):
        began = perf_counter()
        kept = visual.merge(llm.bundle, llm.engine, window, Compression(merge_ratio=ratio)).tokens
        prompt = Prompt(prefix, suffix, kept, np.arange(len(kept), dtype=np.int32), len(kept))
        next(llm._decoder.decode(prompt, Compression(), Sampling()))
        prefill.append(perf_counter() - began)
    return {
        "vision_a_frame": vision,
        "vision": vision * len(window),
        "prefill": prefill[0],
        "prefill_merged": prefill[1],
    }


def gate(args: argparse.Namespace) -> dict[str, Any]:
    """Half an hour of a scene where little happens, gate on; the encoder is left out."""
    from dycoke_edge import LiveSpec

    llm = load(args)
    live, frame, random = (
        llm.live(spec=LiveSpec(memory_frames=args.memory_frames)),
        tokens(llm),
        np.random.default_rng(1),
    )
    run = llm.engine.run

    def without_vision(graph: str, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> None:
        if graph == "vision":
            outputs["tokens"][0] = frame()
        else:
            run(graph, inputs, outputs)

    llm.engine.run = without_vision
    still = random.uniform(30, 200, (12, 12, 3)).repeat(32, 0).repeat(32, 1)
    noise = [random.normal(0, 2, still.shape).astype(np.float32) for _ in range(16)]
    missed = 0
    for second in range(max(args.seconds)):
        picture = still * (1 + 0.1 * np.sin(second / 300)) + noise[random.integers(16)]
        somebody = second % 300 >= 290
        if somebody:
            left = (second % 300 - 290) * 36
            picture[200:260, left : left + 20] = 20
        gated = live.push(picture.clip(0, 255).astype(np.uint8), float(second)).gated
        missed += gated and somebody
    stats = live.stats
    return {"missed": missed, "gate_a_frame": stats.seconds["gate"] / stats.frames, "stats": stats.as_dict()}


def show(live: dict[str, Any], held: dict[str, Any]) -> None:
    """The tables."""
    table = Table(title="a question to a live video, against encoding its window anew", title_justify="left")
    for name in ("seen s", "frames", "rows", "first token ms", "to short", "KV MiB", "own MiB", "anew s, off", "ratio"):
        table.add_column(name, justify="right")
    for name in ("anew s, merge 0.7", "ratio"):
        table.add_column(name, justify="right")
    for row in live["rows"]:
        anew, cells = row["anew"], list[str]()
        for prefill in (anew["prefill"], anew["prefill_merged"]):
            cells += [f"{anew['vision']:.1f} + {prefill:.1f}", f"{(anew['vision'] + prefill) / row['first_token']:.0f}"]
        table.add_row(
            str(row["seconds"]),
            str(row["frames"]),
            str(row["visual_rows"]),
            f"{row['first_token'] * 1e3:.0f}",
            f"{row['first_token_to_short']:.2f}",
            f"{row['kv_bytes'] / 2**20:.1f}",
            f"{row['anonymous_bytes'] / 2**20:.0f}",
            *cells,
        )
    people.print(table)
    stats, vision = held["stats"], median(row["anew"]["vision_a_frame"] for row in live["rows"])
    rest = sum(live["stats"]["seconds"][stage] for stage in ("merge", "evict", "prefill")) / live["stats"]["frames"]
    people.print(
        f"a frame: {vision:.2f} s vision, {rest:.2f} s merge and prefill, {held['gate_a_frame'] * 1e3:.1f} ms gate. "
        f"A still scene: {stats['encoded']} of {stats['frames']} frames encoded, {held['missed']} with people missed; "
        f"{stats['gated'] * (vision + rest) / 60:.0f} of {stats['frames'] * (vision + rest) / 60:.0f} minutes saved"
    )


PARTS = {"stream": stream, "again": again, "gate": gate}


def part(name: str, args: argparse.Namespace, frames: int) -> dict[str, Any]:
    """Run one part in a process of its own, for its own memory."""
    command = [sys.executable, "-m", "benchmarks.live", "--bundle", str(args.bundle), "--part", name]
    command += ["--seconds", *map(str, args.seconds), "--memory-frames", str(frames), "--threads", str(args.threads)]
    result: dict[str, Any] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, help="an fp32 bundle (default: made under build/)")
    parser.add_argument("--shape", default="0.5b")
    parser.add_argument("--layers", type=int, default=6, help="decoder layers of the shape, if a bundle is made")
    parser.add_argument("--seconds", type=int, nargs="+", default=[30, 300, 1800])
    parser.add_argument("--memory-frames", type=int, default=24)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--part", choices=PARTS, help="one part, in this process, as JSON")
    args = parser.parse_args()
    if args.part:
        print(json.dumps(PARTS[args.part](args)))
        return
    if not args.bundle:
        from benchmarks.models import prepare  # here, for it loads torch

        args.bundle = prepare(args.shape, layers=args.layers)[1]
    results = {name: part(name, args, args.memory_frames) for name in ("stream", "gate")}
    show(results["stream"], results["gate"])
    model = {"shape": args.shape, "layers": args.layers, "memory_frames": args.memory_frames}
    print(json.dumps({"benchmark": "live", "environment": stamp(), **model, "results": results}))


if __name__ == "__main__":
    main()
