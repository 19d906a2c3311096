"""Ours and what one would use instead, side by side on one NVIDIA GPU: the same random weights, alternating in one run.

    python -m benchmarks.gpu --shape 0.5b --frames 32
    python -m benchmarks.gpu --shape tiny --device cpu --frames 8 --new-tokens 8     a dry run
    python -m benchmarks.gpu --merge PART.json ...                                  results of several runs in one

Each side is a process of its own, all are loaded, and they answer in turn. The host's clock times them: a stage ends
when the device has done it. Every side begins with frames as bytes in host memory, and none stops early. Peak memory is
what the device's driver counts while a side works alone, context and libraries included. Before that the run measures
what the machine can do at most. Results go to OUT/gpu.json, .md and .png after the rounds and again after each profile,
so a run that is cut short has left something; a later run adds to them. fp16 on a GPU, fp32 on the CPU.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
from rich.console import Console

from benchmarks import gpu_report
from benchmarks.environment import stamp
from benchmarks.gpu_limits import Floors, reached
from benchmarks.models import BUILD, prepare
from benchmarks.random_model import SHAPES
from benchmarks.rivals.contestant import SIDES, Job
from benchmarks.rivals.device_memory import Holding, Meter
from benchmarks.rivals.worker import Lost, Worker
from dycoke_edge.config import DType

SPLIT_LAYER = 3
STAGES = ("vision", "prefill", "first_token", "inter_token", "whole")
people = Console(stderr=True, soft_wrap=True, highlight=False, width=140)
Line = dict[str, Any]


class Sides:
    """The running sides of one case. One that fails is dropped, with the reason in `failed`."""

    def __init__(self, jobs: list[Job], device: str, deadline: float) -> None:
        self.meter, self.deadline = Meter(device), deadline
        self.workers = {job.name: Worker(job) for job in jobs}
        self.holdings = {name: Holding(self.meter) for name in self.workers}
        self.failed: dict[str, str] = {}

    def open(self) -> None:
        """Import together, load one after the other: what a side takes of the device is its own."""
        for worker in self.workers.values():
            worker.tell("import")
        for name in list(self.workers):
            self._try(name, lambda worker: worker.hear(self.left))
        self.all("load")

    def all(self, command: str, watched: bool = False) -> dict[str, Line]:
        """The answers of all sides to a command, in turn."""
        found = {}
        for name in list(self.workers):
            with self.holdings[name].working(watched):
                answer = self._try(name, lambda worker: worker.ask(command, self.left))
            if answer is not None:
                found[name] = answer
        return found

    def one(self, name: str, command: str) -> Line | None:
        """The answer of one side."""
        return self._try(name, lambda worker: worker.ask(command, self.left))

    def close(self) -> None:
        """End them all."""
        for worker in self.workers.values():
            worker.close()

    @property
    def left(self) -> float:
        """Seconds until this run must have ended."""
        return max(0.0, self.deadline - monotonic())

    def _try(self, name: str, ask: Any) -> Line | None:
        try:
            answer: Line = ask(self.workers[name])
            return answer
        except Lost as error:
            self.failed[name] = str(error)
            people.print(f"{name}: {error}")
            self.workers.pop(name).close()
            return None


def run(args: argparse.Namespace, deadline: float) -> None:
    """One case: load, warm up, measure memory, measure times in turn, profile."""
    dtype: DType = "fp32" if args.device == "cpu" else "fp16"
    checkpoint, bundle = prepare(args.shape, args.checkpoint, args.bundle, dtype=dtype, build=args.build)
    case = {
        "shape": args.shape,
        "frames": args.frames,
        "new_tokens": args.new_tokens,
        "device": args.device,
        "dtype": dtype,
        "split_layer": SPLIT_LAYER,
        "rounds": args.rounds,
    }
    common = (str(checkpoint), str(bundle), args.frames, args.new_tokens, args.device, dtype == "fp16", SPLIT_LAYER)
    limits = ceilings(args.device)
    sides = Sides([Job(name, *common) for name in args.contestant], args.device, deadline)
    try:
        sides.open()
        for _ in range(args.warmup):
            sides.all("round")
        for holding in sides.holdings.values():
            holding.peak = holding.held  # what compiling took is over
        sides.all("round", watched=True)
        rounds: dict[str, list[Line]] = {name: [] for name in args.contestant}
        slowest = 0.0
        for _ in range(args.rounds):
            began = monotonic()
            if sides.left < 1.5 * slowest:
                people.print("no time for another round")
                break
            for name, found in sides.all("round").items():
                rounds[name].append(found)
            slowest = max(slowest, monotonic() - began)
        done = {name: found for name, found in rounds.items() if found and name in sides.workers}
        results = {name: figures(found, sides.holdings[name]) for name, found in done.items()}
        floors = Floors(json.loads((checkpoint / "config.json").read_text()), 2 if dtype == "fp16" else 4)
        for name, found in results.items():
            found["limits"] = reached(found, floors, limits, case)
            found["same_ids"] = same(done, name)
        whole = {"case": case, "environment": stamp() | sides.meter.describe(), "ceilings": limits}
        whole |= {"sides": results, "failed": sides.failed}
        store(args.out, whole)
        for name in list(sides.workers) if args.profile else []:
            profiled = sides.one(name, "profile")
            if profiled is not None:
                results[name]["profile"] = profiled
            store(args.out, whole)
    finally:
        sides.close()


def ceilings(device: str) -> Line:
    """Copy bandwidth and matrix rate, measured by a process that is gone before the sides come."""
    command = [sys.executable, "-m", "benchmarks.rivals.ceilings", device]
    found: Line = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found


def figures(rounds: list[Line], holding: Holding) -> Line:
    """Median, least and most over rounds; a token's time is the mean over its answer, for tokens may come in bursts."""
    found: Line = {}
    for stage in STAGES:
        values = [seconds(stage, round_) for round_ in rounds]
        found[stage] = {"median": float(np.median(values)), "least": min(values), "most": max(values)}
    gaps = np.concatenate([np.diff(round_["times"]) for round_ in rounds])
    found["gaps"] = {f"p{share}": float(np.percentile(gaps, share)) for share in (50, 90, 99)}
    last = rounds[-1]
    found |= {name: last[name] for name in ("rows", "visual", "active", "refreshes")}
    return found | {"peak_bytes": holding.peak or last["host_bytes"], "rounds": len(rounds)}


def seconds(stage: str, found: Line) -> float:
    """One stage of one round."""
    first, whole = found["times"][0], found["times"][-1]
    by_name: dict[str, float] = {
        "vision": found["vision"],
        "prefill": first - found["vision"],
        "first_token": first,
        "inter_token": (whole - first) / (len(found["times"]) - 1),
        "whole": whole,
    }
    return by_name[stage]


def same(rounds: dict[str, list[Line]], name: str) -> int | None:
    """How many first ids are those of transformers, which decodes without compression; None if it did not run."""
    if "transformers" not in rounds:
        return None
    ids, want = rounds[name][-1]["ids"], rounds["transformers"][-1]["ids"]
    return int(np.argmin([*(a == b for a, b in zip(ids, want, strict=True)), False]))


def store(out: Path, whole: Line) -> None:
    """Put a run in the place of the one with the same case and sides, and write everything anew."""
    out.mkdir(parents=True, exist_ok=True)
    file = out / "gpu.json"
    runs: list[Line] = json.loads(file.read_text())["runs"] if file.exists() else []
    kept = [run for run in runs if gpu_report.key(run) != gpu_report.key(whole)]
    gpu_report.write([*kept, whole], out)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="0.5b")
    parser.add_argument("--frames", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--contestant", nargs="+", default=list(SIDES), help="ours take @PROVIDER,OPTION=VALUE,...")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--checkpoint", type=Path, help="Hugging Face directory (default: made under --build)")
    parser.add_argument("--bundle", type=Path, help="its bundle (default: exported under --build)")
    parser.add_argument("--build", type=Path, default=BUILD, help="where models are made")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=2, help="rounds before that; one more measures memory")
    parser.add_argument("--limit", type=float, default=560, help="seconds this run may take, models not counted")
    parser.add_argument("--profile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--prepare", action="store_true", help="make the models and end")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--merge", type=Path, nargs="+", help="add these results to those in --out; run nothing")
    parser.add_argument("--redraw", action="store_true", help="draw the plot of the results in --out; run nothing")
    args = parser.parse_args(argv)
    if args.redraw:
        gpu_report.plot(json.loads((args.out / "gpu.json").read_text())["runs"], args.out / "gpu.png")
        return
    unknown = [name for name in args.contestant if name.partition("@")[0] not in SIDES]
    if unknown:
        parser.error(f"--contestant {unknown[0]}: known are {', '.join(SIDES)}")
    if args.merge:
        for file in args.merge:
            for whole in json.loads(file.read_text())["runs"]:
                store(args.out, whole)
    elif args.prepare:
        prepare(args.shape, dtype="fp32" if args.device == "cpu" else "fp16", build=args.build)
    else:
        run(args, monotonic() + args.limit)
    people.print((args.out / "gpu.md").read_text() if not args.prepare else "made")


if __name__ == "__main__":
    main()
