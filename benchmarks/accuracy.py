"""Whether answers survive compression: held-out questions about scenes with known answers, on the device runtime.

    python -m benchmarks.accuracy [--questions 1000] [--methods "merge 0.7" "both 0.7"] [--workers 2]

Every question is asked under every method (benchmarks/methods.py), through ONNX Runtime. Answers are appended to a file
under build/ as they come, and a run that was stopped goes on from it. Writes accuracy.json, accuracy.md (the table) and
two plots (where matplotlib is) to --out; prints the table on stderr and the JSON on stdout.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import signal
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from benchmarks.accuracy_report import draw, report
from benchmarks.environment import stamp
from benchmarks.methods import MERGES, SPLIT, Contestant, Method, chosen
from benchmarks.scenes import questions, world
from dycoke_edge import DycokeEdgeError, UsageError, VideoLLM
from dycoke_edge.config import ExportSpec
from dycoke_edge.export.build import export
from dycoke_edge.export.shipped import named

BUILD = Path("build/accuracy")
TRACKED = Path("benchmarks/results")
SEED = 100_000  # of the test split; the first ones are looked at while training
CAPACITY = 4096
people = Console(stderr=True, soft_wrap=True, highlight=False, width=None if sys.stderr.isatty() else 140)
Line = dict[str, Any]
_contestants: dict[int, Contestant] = {}  # of a worker process, by split layer


def clips(wanted: int, frames: int, kinds: tuple[str, ...], seed: int) -> list[int]:
    """Seeds of as many scenes as it takes to ask `wanted` questions of these kinds."""
    seeds, asked = list[int](), 0
    while asked < wanted:
        seeds.append(seed + len(seeds))
        asked += len(asked_about(seeds[-1], frames, kinds))
    return seeds


def measure(seed: int, setup: Line, rows: list[Method], folder: Path) -> list[Line]:
    """One clip under every method, in a worker: a line a method."""
    frames = setup["frames"]
    asked = asked_about(seed, frames, tuple(setup["kinds"]))
    video = world.draw(world.plan(seed, "test", frames), noise=setup.get("noise", world.NOISE))
    tokens: dict[int, Any] = {}
    lines = []
    for method in rows:
        contestant = contestant_of(folder, method.split)
        if method.split not in tokens:
            tokens[method.split] = contestant.encode(video)
        entered, answers = contestant.answer(method, tokens[method.split], [q.text for q in asked], seed)
        total = tokens[method.split].shape[0] * tokens[method.split].shape[1]
        found = [contestant.llm.text.decode(answer.ids).strip() for answer in answers]
        lines.append(
            {
                "seed": seed,
                "method": method.name,
                "entered": entered / total,
                "active": sum(answer.active for answer in answers) / len(answers) / total,
                "answers": [
                    {"kind": q.kind, "right": score(q, text), "text": text}
                    for q, text in zip(asked, found, strict=True)
                ],
            }
        )
    return lines


def score(question: questions.Question, text: str) -> float:
    """1 or 0; of a description, the share of facts that are right, with every wrong one counted as a missing one."""
    if question.kind != "describe":
        return float(text == question.answer)
    wanted, found = questions.slots(question.answer), questions.slots(text)
    return len(wanted & found) / max(len(wanted), len(found))


def asked_about(seed: int, frames: int, kinds: tuple[str, ...]) -> list[questions.Question]:
    return [q for q in questions.ask(world.plan(seed, "test", frames), seed) if q.kind in kinds]


def contestant_of(folder: Path, split: int) -> Contestant:
    if split not in _contestants:
        llm = VideoLLM.load(folder / f"bundle-{split}", threads=1, kv_capacity=CAPACITY, resident=True)
        _contestants[split] = Contestant(llm)
    return _contestants[split]


def prepare(model: Path, splits: set[int]) -> Path:
    """Bundles of a checkpoint, one a split layer, made once under a folder that bears its hash."""
    weights = sorted(model.glob("*.safetensors"))
    if not weights:
        raise UsageError(
            f"--model {model} holds no *.safetensors; train one: python -m benchmarks.scenes.train {model}"
        )
    folder = BUILD / _digest(b"".join(file.read_bytes() for file in weights))
    for split in sorted(splits):
        if not (folder / f"bundle-{split}").exists():
            ratios = tuple(ratio for ratio in MERGES if ratio < 1)
            export(model, folder / f"bundle-{split}", ExportSpec(merge_ratio=ratios, split_layer=split))
    return folder


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:12]


def load(file: Path, setup: Line) -> list[Line]:
    """What an earlier run left; a last line that was cut off is dropped. UsageError if it asked something else."""
    if not file.exists():
        file.write_text(json.dumps(setup) + "\n")
        return []
    lines = [json.loads(text) for text in file.read_text().splitlines() if text.endswith("}")]
    if lines[0] != setup:
        raise UsageError(f"{file} holds answers of another run ({lines[0]}); remove it or use another --work file")
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return lines[1:]


def run(folder: Path, file: Path, seeds: list[int], rows: list[Method], setup: Line, workers: int) -> list[Line]:
    """Every clip under every method, from where an earlier run stopped."""
    lines = load(file, setup)
    done = {(line["seed"], line["method"]) for line in lines}
    missing = {seed: [row for row in rows if (seed, row.name) not in done] for seed in seeds}
    missing = {seed: todo for seed, todo in missing.items() if todo}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with (
        ProcessPoolExecutor(workers, get_context("spawn")) as pool,
        Progress(*columns, console=people, disable=not people.is_terminal) as bar,
        file.open("a") as out,
    ):
        task = bar.add_task("clips", total=len(seeds), completed=len(seeds) - len(missing))
        jobs = [pool.submit(measure, seed, setup, todo, folder) for seed, todo in missing.items()]
        try:
            for job in as_completed(jobs):
                for line in job.result():
                    out.write(json.dumps(line) + "\n")
                    lines.append(line)
                out.flush()
                bar.advance(task)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # else leaving waits for all that is queued
            raise
    wanted = {(seed, row.name) for seed in seeds for row in rows}
    return [line for line in lines if (line["seed"], line["method"]) in wanted]


def _kinds(names: list[str] | None) -> tuple[str, ...]:
    for name in names or ():
        if name not in questions.KINDS:
            raise UsageError(f"--kinds {name!r} is not known; choose from: {', '.join(questions.KINDS)}")
    return tuple(names or questions.KINDS)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="a checkpoint directory, or the name of one that is shipped")
    parser.add_argument("--questions", type=int, default=1000, help="at least so many; whole scenes are asked about")
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--noise", type=float, default=world.NOISE, help="of the pictures, in levels of 255")
    parser.add_argument("--seed", type=int, default=SEED, help="the first scene's")
    parser.add_argument("--methods", nargs="+", help="rows by name (default: all)")
    parser.add_argument("--kinds", nargs="+", help=f"of questions (default: all of {', '.join(questions.KINDS)})")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--work", type=Path, help="file of answers to go on from (default: one under build/accuracy)")
    parser.add_argument("--out", type=Path, help=f"folder (default: {BUILD / 'results'}, with --redraw {TRACKED})")
    parser.add_argument("--redraw", action="store_true", help="draw the plots of the results in --out; ask nothing")
    args = parser.parse_args(argv)
    args.out = args.out or (TRACKED if args.redraw else BUILD / "results")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if args.redraw:
        draw(json.loads((args.out / "accuracy.json").read_text())["results"], args.out)
        return 0
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # take the workers along
    try:
        rows, kinds = chosen(args.methods), _kinds(args.kinds)
        folder = prepare(named(args.model), {row.split for row in rows} | {SPLIT})
        setup = {"model": folder.name, "frames": args.frames, "seed": args.seed, "kinds": list(kinds)}
        setup |= {"noise": args.noise} if args.noise != world.NOISE else {}
        seeds = clips(args.questions, args.frames, kinds, args.seed)
        file = args.work or folder / f"answers-{_digest(json.dumps(setup).encode())}.jsonl"
        lines = run(folder, file, seeds, rows, setup, args.workers)
    except DycokeEdgeError as error:
        print(f"benchmarks.accuracy: {error}", file=sys.stderr)
        return error.exit_code
    print(json.dumps(report(lines, rows, setup | {"clips": len(seeds)}, stamp(), args.out, people)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
