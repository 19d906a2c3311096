"""How the candidates for merge and keep fare on `tiny`: `python -m benchmarks.ablation [--group memory keep] [--seed
N]`.

The clips and questions are those of benchmarks.accuracy at another seed. Prints a table; nothing is chosen by hand
after the reported seeds were seen.
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import accuracy, accuracy_report
from benchmarks.candidates import Chosen, coverage, scored
from benchmarks.methods import OFF, SPLIT, Method
from benchmarks.scenes import questions
from dycoke_edge.config import Compression
from dycoke_edge.export.shipped import named

SEED = 300_000  # for choosing; what is reported is measured at others
KEPT = Compression(merge_ratio=0.0, prune_ratio=0.0, positions="keep")


def _cover(tokens: Any, total: int, seed: int, **options: Any) -> Chosen:
    return coverage(tokens, total, **options)


def _scored(tokens: Any, total: int, seed: int, **options: Any) -> Chosen:
    return scored(tokens, total, seed=seed, **options)


def cover(name: str, share: float, positions: str = "keep", **options: Any) -> Method:
    """A row of coverage."""
    compression = KEPT if positions == "keep" else OFF
    label = f"{name} {100 * share:g} %" + ("" if positions == "keep" else ", renumbered")
    return Method(label, name, compression, choose=partial(_cover, **options), total=share)


def score(name: str, share: float, positions: str = "keep", **options: Any) -> Method:
    """A row of a score."""
    compression = KEPT if positions == "keep" else OFF
    label = f"{name} {100 * share:g} %" + ("" if positions == "keep" else ", renumbered")
    return Method(label, name, compression, choose=partial(_scored, **options), total=share)


CHOSEN = {"memory": 3, "reset": 4, "reach": 0}


def kept(keep: str, total: float = 0.464, prune: float = 0.7, positions: str = "keep", **more: Any) -> Method:
    """A row of keep behind coverage."""
    compression = KEPT if positions == "keep" else OFF
    label = f"keep {keep} {prune:g} behind {100 * total:g} %" + "".join(f", {k}={v}" for k, v in more.items())
    label += "" if positions == "keep" else ", renumbered"
    chooser = partial(_cover, **CHOSEN)
    return Method(label, "keep", compression, choose=chooser, total=total, keep=keep, prune=prune, **more)


def groups() -> dict[str, list[Method]]:
    """Rows by what they vary."""
    found: dict[str, list[Method]] = {"none": [Method("no compression", "no compression")]}
    low = (0.25, 0.145)
    for positions in ("reassign", "keep"):
        found[f"memory-{positions}"] = [
            cover(f"memory {m}", share, positions, memory=m) for share in low for m in (0, 2, 4, 8, 16)
        ]
    found["scores"] = [
        score(f"{s}, reach {r}", share, score=s, memory=r)
        for share in low
        for s in ("random", "grid", "stc", "temporal", "sum", "far")
        for r in (0, 4)
    ]
    found["reset"] = [cover(f"reset {r}", share, memory=r, reset=r) for share in low for r in (4, 8, 16)]
    found["windows"] = [cover(f"window {w}", share, window=w, memory=4) for share in low for w in (2, 4, 16)]
    found["power"] = [cover(f"power {p}", share, power=p) for share in low for p in (0.0, 0.5, 0.75, 1.25)]
    found["mix"] = [cover(f"mix {m}", share, mix=m) for share in low for m in ("0.0", "0.6", "0.8")]
    found["follow"] = [cover(f"follow {x}", share, follow=x) for share in low for x in (0.25, 0.5)]
    found["weigh"] = [cover(f"weigh {x}", share, weigh=x) for share in low for x in ("change", "centre")]
    found["base"] = [cover(f"base {x}", share, base=x) for share in low for x in (-1.0, 0.5, 0.8)]
    found["reach"] = [cover(f"reach {x}", share, reach=x) for share in low for x in (0, 1, 16)]
    found["own"] = [
        cover(f"memory {m}, reach 0, power {p}", share, positions, memory=m, reach=0, power=p)
        for share in low
        for m in (1, 2, 4, 8)
        for p in (1.0, 0.75)
        for positions in ("keep", "reassign")
    ]
    more: dict[str, dict[str, Any]] = {
        "reset 4": {"memory": 4, "reset": 4},
        "reset 8": {"memory": 8, "reset": 8},
        "mix 0.6": {"mix": "0.6"},
        "follow 0.25": {"follow": 0.25},
        "follow 0.5": {"follow": 0.5},
        "weigh change": {"weigh": "change"},
        "weigh centre": {"weigh": "centre"},
        "base -1": {"base": -1.0},
        "base 0.5": {"base": 0.5},
        "base 0.8": {"base": 0.8},
    }
    found["own-more"] = [
        cover(f"{name}, reach 0", share, reach=0, **options) for share in low for name, options in more.items()
    ]
    sets = ("even", "nested", "covering", "framewise", "windowed")
    found["keep"] = [kept(k) for k in ("own", "max", "sum", "half", *sets, "random", "heaviest")]
    found["keep-shares"] = [kept(k) for k in ("even/2+own", "even/2+max", "nested/2+max", "covering/2+max")]
    found["keep-heirs"] = [kept(k, heirs=True) for k in sets]
    found["keep-shallow"] = [kept(k, deep=False) for k in sets]
    found["keep-low"] = [kept(k, 0.25, prune=0.5, heirs=True) for k in sets]
    found["final"] = [
        cover(f"{name}, power {p}", share, positions, power=p, reach=0, **more)
        for share in (0.464, 0.31, 0.25, 0.145, 0.105)
        for name, more in {
            "memory 1": {"memory": 1},
            "memory 2": {"memory": 2},
            "reset 2": {"memory": 1, "reset": 2},
            "reset 4": {"memory": 3, "reset": 4},
        }.items()
        for p in (1.0, 0.75)
        for positions in (("keep", "reassign") if share > 0.3 else ("keep",))
    ]
    return found


def main(argv: list[str] | None = None) -> int:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--group", nargs="+", default=list(groups()), choices=list(groups()))
    parser.add_argument("--questions", type=int, default=1000)
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path("build/ablation.jsonl"))
    args = parser.parse_args(argv)
    rows = [row for group in args.group for row in groups()[group]]
    folder = accuracy.prepare(named("tiny"), {SPLIT})
    kinds = tuple(questions.KINDS)
    setup = {"model": folder.name, "frames": args.frames, "seed": args.seed, "kinds": list(kinds)}
    seeds = accuracy.clips(args.questions, args.frames, kinds, args.seed)
    args.work.parent.mkdir(parents=True, exist_ok=True)
    lines = accuracy.run(folder, args.work, seeds, rows, setup, args.workers)
    scores = accuracy_report._scores(lines)
    for row in rows:
        mine = [line for line in lines if line["method"] == row.name]
        made = accuracy_report._row(row, scores[row.name], mine)
        print(json.dumps({key: made[key] for key in ("method", "entered", "active", "short", "describe", "kinds")}))
    sys.stdout.flush()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
