"""Every figure that wants a GPU, one after the other. The models are made first, beside the tests and nothing timed.

    python -m benchmarks.suite --out out --build build        at most 22 minutes, models not counted
    python -m benchmarks.suite --out out --only tests vision  some of it

A step is a process with a time limit. What it prints goes to OUT/<step>.log; one that fails or takes too long does not
stop the others. OUT/suite.json says how each ended; what ended well is left out when the same OUT is given again.
Results of benchmarks.gpu land in OUT/gpu.json: `python -m benchmarks.gpu --merge OUT/gpu.json` takes them in. In a copy
of the tree without git, BENCHMARK_COMMIT says what is measured.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

from rich.console import Console

people = Console(stderr=True, soft_wrap=True, highlight=False, width=140)
FEW = ("transformers", "ours-off", "ours-merge", "ours-both")


@dataclass(frozen=True)
class Step:
    """What is run: arguments of Python, the shape whose models it needs, and seconds it may take."""

    name: str
    command: tuple[str, ...]
    limit: float
    shape: str | None = None


def side_by_side(name: str, shape: str, frames: int, rounds: int, limit: float, *more: str) -> Step:
    """A run of benchmarks.gpu, which keeps to its limit by itself and leaves results when it is reached."""
    options = ("--shape", shape, "--frames", str(frames), "--rounds", str(rounds), "--limit", f"{limit:g}", *more)
    return Step(name, ("-m", "benchmarks.gpu", *options, "--build", "{build}", "--out", "{out}"), limit + 60, shape)


# The files with tests for a GPU: they want the export extra and pytest, the others more than such a machine may have.
GPU_TESTS = tuple(
    f"tests/test_{name}.py"
    for name in (
        "cover",
        "gpu_device",
        "gpu_merge",
        "gpu_pipeline",
        "kernel_layers",
        "kernels",
        "kv",
        "parity",
        "tower",
    )
)
STEPS = (
    Step("tests", ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:benchmark", "-m", "gpu", *GPU_TESTS), 300),
    side_by_side("0.5b", "0.5b", 32, 4, 280),
    Step(
        "vision",
        (
            *("-m", "benchmarks.vision_gpu", "--no-graphs", "--checkpoint", "{build}/random-0.5b-fp16"),
            *("--bundle", "{build}/bundle-0.5b-fp16", "--export-json", "{out}/vision_gpu.json"),
        ),
        120,
        "0.5b",
    ),
    side_by_side("0.5b-128", "0.5b", 128, 2, 100, "--warmup", "1", "--no-profile", "--contestant", *FEW),
    side_by_side("7b", "7b", 32, 3, 300),
)


class Models:
    """Makes the models of some shapes, one after the other, beside what is not timed; quick where they are there."""

    def __init__(self, shapes: Sequence[str], build: Path, out: Path) -> None:
        self._one = ThreadPoolExecutor(1)
        self._process: subprocess.Popen[bytes] | None = None
        self._made = {shape: self._one.submit(self._make, shape, build, out) for shape in shapes}

    def wait(self, shape: str) -> bool:
        """Until none is being made any more, which takes every core; False if those of a shape could not be made."""
        return {name: made.result() for name, made in self._made.items()}[shape] == 0

    def close(self) -> None:
        """Stop making any."""
        self._one.shutdown(wait=False, cancel_futures=True)
        if self._process:
            self._process.terminate()

    def _make(self, shape: str, build: Path, out: Path) -> int:
        command = [sys.executable, "-m", "benchmarks.gpu", "--shape", shape, "--prepare", "--build", str(build)]
        with (out / f"models-{shape}.log").open("w") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
            return self._process.wait()


def run(steps: Sequence[Step], build: Path, out: Path) -> dict[str, str]:
    """How each step ended: "done", or what went wrong."""
    out.mkdir(parents=True, exist_ok=True)
    file = out / "suite.json"
    ended: dict[str, str] = json.loads(file.read_text()) if file.exists() else {}
    left = [step for step in steps if ended.get(step.name) != "done"]
    models = Models(list(dict.fromkeys(step.shape for step in left if step.shape)), build, out)
    try:
        for step in left:
            began = monotonic()
            there = step.shape is None or models.wait(step.shape)
            ended[step.name] = _ended(step, build, out) if there else "its models could not be made, see models-*.log"
            people.print(f"{step.name}: {ended[step.name]} after {monotonic() - began:.0f} s")
            file.write_text(json.dumps(ended, indent=1) + "\n")
    finally:
        models.close()
    return ended


def _ended(step: Step, build: Path, out: Path) -> str:
    command = [sys.executable, *(part.format(build=build, out=out) for part in step.command)]
    with (out / f"{step.name}.log").open("w") as log:
        try:
            code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, timeout=step.limit).returncode
        except subprocess.TimeoutExpired:
            return f"took more than {step.limit:g} s"
    return "done" if code == 0 else f"exit status {code}"


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--build", type=Path, default=Path("build"))
    names = [step.name for step in STEPS]
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    args = parser.parse_args()
    ended = run([step for step in STEPS if step.name in args.only], args.build, args.out)
    print(json.dumps(ended))
    sys.exit(any(how != "done" for how in ended.values()))


if __name__ == "__main__":
    main()
