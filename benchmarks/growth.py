"""How inter-token latency and memory grow with the length of the video: compression off, merge only, both, one-shot.

    python -m benchmarks.growth --bundle DIR

The vision encoder is left out: random visual tokens with a still background stand in for its output, so that 64 frames
take minutes. Merge, prefill and decode are the real ones. Each row is a process of its own, for its own peak memory.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.environment import stamp, status_bytes

MODES: dict[str, dict[str, Any]] = {
    "off": {"merge_ratio": 0.0, "prune_ratio": 0.0},
    "merge 0.7": {"merge_ratio": 0.7, "prune_ratio": 0.0},
    "merge+prune 0.7": {"merge_ratio": 0.7, "prune_ratio": 0.7},
    "merge+prune 0.7, free_parked": {"merge_ratio": 0.7, "prune_ratio": 0.7, "free_parked": True},
}
people = Console(stderr=True, soft_wrap=True, highlight=False, width=130)


def measure(bundle: Path, frames: int, mode: str, new_tokens: int, threads: int) -> dict[str, Any]:
    """One answer over made-up visual tokens, in this process."""
    from dycoke_edge import Compression, Sampling, VideoLLM
    from dycoke_edge.runtime import visual
    from dycoke_edge.runtime.loop import Prompt

    compression = Compression(**MODES[mode])
    llm = VideoLLM.load(bundle, threads=threads, kv_capacity=frames * 196 + 256)
    model, random = llm.bundle.model, np.random.default_rng(0)
    still = random.standard_normal((1, model.tokens_per_frame, model.hidden_size), np.float32)
    noise = random.standard_normal((frames, *still.shape[1:]), np.float32)
    kept = visual.merge(llm.bundle, llm.engine, (still + 0.2 * noise).astype(model.numpy_dtype), compression).tokens
    ids = np.arange(1, 21, dtype=np.int64)
    prompt = Prompt(ids, ids, kept, np.arange(len(kept), dtype=np.int32), len(kept))
    before, times, active, refreshes = perf_counter(), list[float](), list[int](), 0
    for step in llm._decoder.decode(prompt, compression, Sampling(max_new_tokens=new_tokens, stop_token_ids=())):
        now = perf_counter()
        times.append(now - before)
        active.append(step.active)
        refreshes += step.refreshed
        before = now
    p50, p90 = np.percentile(times[1:], [50, 90])
    return {
        "frames": frames,
        "mode": mode,
        "visual_tokens": len(kept),
        "active": active[-1],
        "refreshes": refreshes,
        "prefill": times[0],
        "inter_token_p50": float(p50),
        "inter_token_p90": float(p90),
        "kv_bytes": llm.kv.live_nbytes,
        "anonymous_bytes": status_bytes("RssAnon"),
        "peak_bytes": status_bytes("VmHWM"),
    }


def show(rows: list[dict[str, Any]]) -> None:
    """The table."""
    table = Table(title="growth with the length of the video", title_justify="left")
    for name in (
        "frames",
        "mode",
        "visual tokens / active",
        "prefill s",
        "inter-token ms p50 / p90",
        "KV MiB",
        "peak MiB",
    ):
        table.add_column(name, justify="left" if name == "mode" else "right")
    for row in rows:
        table.add_row(
            str(row["frames"]),
            row["mode"],
            f"{row['visual_tokens']} / {row['active']}",
            f"{row['prefill']:.2f}",
            f"{row['inter_token_p50'] * 1e3:.1f} / {row['inter_token_p90'] * 1e3:.1f}",
            f"{row['kv_bytes'] / 2**20:.1f}",
            f"{row['peak_bytes'] / 2**20:.0f}",
        )
    people.print(table)


def _made(shape: str) -> Path:
    from benchmarks.models import prepare  # here, for it loads torch, which would count as memory of the rows

    return prepare(shape)[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, help="an fp32 bundle (default: the 0.5B shape, made under build/)")
    parser.add_argument("--shape", default="0.5b")
    parser.add_argument("--frames", type=int, nargs="+", default=[8, 16, 32, 64])
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--mode", choices=MODES, help="one mode, in this process, as JSON")
    args = parser.parse_args()
    bundle = args.bundle or _made(args.shape)
    if args.mode:
        print(json.dumps(measure(bundle, args.frames[0], args.mode, args.new_tokens, args.threads)))
        return
    rows = []
    for frames in args.frames:
        for mode in MODES:
            command = [sys.executable, "-m", "benchmarks.growth", "--bundle", str(bundle), "--mode", mode]
            command += ["--frames", str(frames), "--new-tokens", str(args.new_tokens), "--threads", str(args.threads)]
            rows.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
            people.print(f"{frames} frames, {mode}: {rows[-1]['inter_token_p50'] * 1e3:.1f} ms a token")
    show(rows)
    print(json.dumps({"benchmark": "growth", "environment": stamp(), "results": rows}))


if __name__ == "__main__":
    main()
