"""Ours against transformers on this CPU: same weights, same threads, alternating in one run.

    python -m benchmarks.cpu --checkpoint DIR --bundle DIR

Without --checkpoint a random model of the LLaVA-OneVision 0.5B shape is made and exported under build/ first. Prints a
table on stderr and one JSON line on stdout; the ratios are what carries over to another machine.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.contestants import Job, Worker
from benchmarks.environment import stamp
from benchmarks.models import prepare

THEIRS = "transformers"
people = Console(stderr=True, soft_wrap=True, highlight=False, width=130)


def jobs(checkpoint: Path, bundle: Path, args: argparse.Namespace) -> list[Job]:
    """The sides, in the order they alternate."""
    common = {"frames": args.frames, "new_tokens": args.new_tokens, "threads": args.threads}
    return [
        Job(THEIRS, checkpoint, **common),
        Job("ours off", bundle, **common, merge_ratio=0.0),
        Job("ours merge 0.7", bundle, **common, merge_ratio=0.7),
        Job("ours merge+prune 0.7", bundle, **common, merge_ratio=0.7, prune_ratio=0.7),
        Job("ours off, resident", bundle, **common, merge_ratio=0.0, resident=True),
        Job("ours merge+prune, resident", bundle, **common, merge_ratio=0.7, prune_ratio=0.7, resident=True),
    ]


def figures(runs: list[dict[str, Any]]) -> dict[str, float]:
    """Medians over rounds; inter-token percentiles over all tokens of all rounds."""
    tokens = np.concatenate([run["inter_token"] for run in runs])
    middle = {key: float(np.median([run[key] for run in runs])) for key in ("vision", "prefill", "first_token")}
    last = {key: runs[-1][key] for key in ("visual_tokens", "active", "refreshes", "peak_bytes")}
    p50, p90 = np.percentile(tokens, [50, 90])
    return {**middle, "inter_token_p50": float(p50), "inter_token_p90": float(p90), **last}


def show(results: dict[str, dict[str, float]]) -> None:
    """The table, with ratios to transformers in brackets."""
    table = Table(title="seconds (ratio to transformers)", title_justify="left")
    columns = ("vision", "prefill", "first_token", "inter_token_p50", "inter_token_p90", "peak_bytes")
    for name in ("", "visual tokens", *columns):
        table.add_column(name.replace("_", " ").replace("bytes", "GiB"), justify="right" if name else "left")
    base = results[THEIRS]
    for name, found in results.items():
        cells = [
            f"{found[key] / (2**30 if key == 'peak_bytes' else 1):.3f} ({found[key] / base[key]:.2f})"
            for key in columns
        ]
        table.add_row(name, f"{found['visual_tokens']} / {found['active']:.0f}", *cells)
    people.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="Hugging Face directory (default: made under build/)")
    parser.add_argument("--bundle", type=Path, help="its fp32 bundle (default: exported under build/)")
    parser.add_argument("--shape", default="0.5b", help="shape of the model to make")
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3, help="after one round of warm-up")
    args = parser.parse_args()
    checkpoint, bundle = prepare(args.shape, args.checkpoint, args.bundle)
    workers = [Worker(job) for job in jobs(checkpoint, bundle, args)]
    runs: dict[str, list[dict[str, Any]]] = {worker.job.name: [] for worker in workers}
    for number in track(range(args.rounds + 1), "rounds", console=people, disable=not people.is_terminal):
        for worker in workers:
            run = worker.run()
            if number:
                runs[worker.job.name].append(run)
    for worker in workers:
        worker.close()
    results = {name: figures(found) for name, found in runs.items()}
    show(results)
    print(
        json.dumps(
            {
                "benchmark": "cpu",
                "settings": vars(args) | {"checkpoint": args.shape, "bundle": None},
                "environment": stamp(),
                "results": results,
            }
        )
    )


if __name__ == "__main__":
    main()
