"""What the accuracy bench found: a table with confidence intervals, what each kind of question kept, two plots."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from benchmarks.methods import BOTH, Method
from benchmarks.scenes.questions import KINDS

Line = dict[str, Any]
Clips = dict[int, list[tuple[str, float]]]  # of a clip, by seed: kind and score of each answer
Scores = dict[str, Clips]  # of a method
DRAWS = 1000  # of the bootstrap
PAPER = f"both {BOTH.merge_ratio:g}"
NONE = "no compression"
SHORT = tuple(kind for kind in KINDS if kind != "describe")


def report(
    lines: list[Line], rows: list[Method], setup: Line, environment: Line, out: Path, people: Console
) -> dict[str, Any]:
    """Write accuracy.json, accuracy.md and the plots to `out`; returns what the JSON holds."""
    scores = _scores(lines)
    table = [_row(method, scores[method.name], [x for x in lines if x["method"] == method.name]) for method in rows]
    names = {row.name for row in rows}
    kept = _retained(scores) if {PAPER, NONE} <= names else {}
    found = {"benchmark": "accuracy", "environment": environment, "setup": setup, "results": table, "retained": kept}
    out.mkdir(parents=True, exist_ok=True)
    (out / "accuracy.json").write_text(json.dumps(found, indent=1) + "\n")
    (out / "accuracy.md").write_text(_markdown(found))
    people.print(_rich(table))
    if find_spec("matplotlib"):
        draw(table, out)
    else:
        people.print(f"no plots in {out}: pip install matplotlib, then the same command, which asks nothing anew")
    return found


def draw(table: list[Line], out: Path) -> None:
    """Both plots, from the results that accuracy.json holds."""
    import matplotlib

    matplotlib.use("Agg")
    _plot_curves(table, out / "accuracy.png")
    _plot_kinds(table, out / "accuracy_kinds.png")


def _scores(lines: list[Line]) -> Scores:
    scores: Scores = defaultdict(dict)
    for line in lines:
        scores[line["method"]][line["seed"]] = [(answer["kind"], answer["right"]) for answer in line["answers"]]
    return scores


def _row(method: Method, clips: Clips, lines: list[Line]) -> Line:
    return {
        "method": method.name,
        "line": method.line,
        "entered": round(float(np.mean([line["entered"] for line in lines])), 4),
        "active": round(float(np.mean([line["active"] for line in lines])), 4),
        "questions": sum(len(answers) for answers in clips.values()),
        "short": interval(clips, SHORT),
        "describe": interval(clips, ("describe",)),
        "kinds": {kind: _round(_mean(clips.values(), (kind,))) for kind in KINDS},
    }


def _retained(scores: Scores) -> Line:
    """Accuracy at the paper's setting over that without compression, a kind, both on the same drawn clips."""
    groups = {"short": SHORT, **{kind: (kind,) for kind in KINDS}}
    return {name: interval(scores[PAPER], kinds, scores[NONE]) for name, kinds in groups.items()}


def interval(clips: Clips, kinds: tuple[str, ...], over: Clips | None = None) -> list[float | None]:
    """Accuracy, or its ratio to that of `over`, and its 95 % interval over clips drawn again: answers about one clip
    hang together."""
    seeds = sorted(clips if over is None else clips.keys() & over.keys())
    drawn = np.random.default_rng(0).integers(len(seeds), size=(DRAWS + 1, len(seeds)))
    drawn[0] = np.arange(len(seeds))
    with np.errstate(divide="ignore", invalid="ignore"):
        values = _drawn(clips, seeds, kinds, drawn)
        if over is not None:
            values = values / _drawn(over, seeds, kinds, drawn)
    again = values[1:][np.isfinite(values[1:])]
    low, high = np.percentile(again, [2.5, 97.5]) if again.size else (np.nan, np.nan)
    return [_round(values[0]), _round(low), _round(high)]


def _drawn(clips: Clips, seeds: list[int], kinds: tuple[str, ...], drawn: NDArray[np.int64]) -> NDArray[np.float64]:
    """Mean score of each draw of clips [draws, n]."""
    right = [[score for kind, score in clips[seed] if kind in kinds] for seed in seeds]
    sums, counts = np.array([sum(scores) for scores in right]), np.array([len(scores) for scores in right])
    mean: NDArray[np.float64] = sums[drawn].sum(1) / counts[drawn].sum(1)
    return mean


def _mean(clips: Iterable[list[tuple[str, float]]], kinds: tuple[str, ...]) -> float:
    scores = [right for answers in clips for kind, right in answers if kind in kinds]
    return float(np.mean(scores)) if scores else float("nan")


def _round(value: float | np.floating[Any]) -> float | None:
    return None if not np.isfinite(value) else round(float(value), 4)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def _ranged(value: list[float | None]) -> str:
    return f"{_percent(value[0])} ({_percent(value[1])} to {_percent(value[2])})"


def _cells(row: Line) -> list[str]:
    shares = [_percent(row["entered"]), _percent(row["active"])]
    return [row["method"], *shares, _ranged(row["short"]), _ranged(row["describe"])]


HEAD = ("method", "tokens entering %", "seen by deep layers %", "short answers %", "descriptions %")


def _rich(table: list[Line]) -> Table:
    shown = Table(title="accuracy (95 % interval)", title_justify="left")
    for name in HEAD:
        shown.add_column(name, justify="left" if name == "method" else "right")
    for row in table:
        shown.add_row(*_cells(row))
    return shown


def _markdown(found: Line) -> str:
    def grid(head: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
        head = list(head)
        return ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)]

    table, setup = found["results"], found["setup"]
    command = found["environment"]["command"].replace("accuracy.py", "python -m benchmarks.accuracy")
    text = [
        "# Accuracy under compression",
        "",
        f"Output of `{command}`. {setup['clips']} held-out clips of {setup['frames']} frames, {table[0]['questions']} "
        f"questions a method, seed {setup['seed']}, model {setup['model']}, commit {found['environment']['commit']}. "
        "In brackets the 95 % interval over clips.",
        "",
        *grid(HEAD, map(_cells, table)),
    ]
    if _has_kinds(table):
        kinds = ([row["method"], *map(_percent, row["kinds"].values())] for row in table)
        text += ["", "## By kind of question, %", "", *grid(("method", *KINDS), kinds)]
    if found["retained"]:
        kept = [[name, _ranged(value)] for name, value in found["retained"].items()]
        text += ["", f"## Kept by {PAPER} of the accuracy without compression, %", "", *grid(("kind", "kept"), kept)]
    return "\n".join(text) + "\n"


def _plot_curves(table: list[Line], file: Path) -> None:
    """Accuracy against the share of visual tokens that the deep layers see, one line a method, named at its end."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(15, 6.6), layout="constrained")
    for axis, what in zip(axes, ("short", "describe"), strict=True):
        ends = list[tuple[str, float, float, str]]()
        for line in dict.fromkeys(row["line"] for row in table):
            rows = [row for row in table if row["line"] == line and row[what][0] is not None]
            rows.sort(key=lambda row: float(row["active"]))
            if rows and line != "variants":
                colour = COLOURS.get(line, "black")
                ends.append((line, *_draw(axis, rows, what, colour), colour))
        _name(axis, ends)
        axis.set_xlabel("visual tokens seen by the deep layers, %", fontsize=13)
        axis.set_title({"short": "short answers: right, %", "describe": "descriptions: right, %"}[what], fontsize=15)
        axis.tick_params(labelsize=12)
        axis.yaxis.tick_right()
        axis.spines[["top", "left"]].set_visible(False)
        axis.grid(alpha=0.25)
    _save(figure, file)


# DyCoke's own in strong colours, what is compared with it in pale ones.
COLOURS = {
    "no compression": "black",
    "coverage": "#0a7d2c",
    "coverage and keep": "#00b34a",
    "merge": "#1f4fd8",
    "prune": "#8a2be2",
    "merge and prune": "#0891a5",
    "merge, weighed": "#d81f2a",
    "merge and prune, weighed": "#f07b00",
    "random tokens": "#8c564b",
    "random tokens, counted": "#c49c94",
    "changed tokens (EVS)": "#d17bb8",
    "frames spread": "#7f7f7f",
    "last frames": "#a8a832",
    "FastV": "#17becf",
}
NAMES_TO, TICKS = -58, (20, 40, 60, 80, 100)  # left end of the room for names; below the first tick is nothing else


def _draw(axis: Any, rows: list[Line], what: str, colour: str) -> tuple[float, float]:
    """One line with its intervals; returns its left end."""
    middle: NDArray[np.float64] = np.array([row[what] for row in rows], float) * 100
    shares = [100 * row["active"] for row in rows]
    axis.plot(shares, middle[:, 0], "o-", color=colour, ms=5, lw=2)
    axis.vlines(shares, middle[:, 1], middle[:, 2], color=colour, alpha=0.3, lw=2)
    return shares[0], float(middle[0, 0])


def _name(axis: Any, ends: list[tuple[str, float, float, str]]) -> None:
    """Write each line's name left of its end (name, x, y, colour), none over another, with a thin line between."""
    axis.set_xlim(NAMES_TO, 104)
    axis.set_xticks(TICKS)
    low, high = axis.get_ylim()
    heights = apart([y for _, _, y, _ in ends], (high - low) / 20)
    for (name, x, y, colour), height in zip(ends, heights, strict=True):
        if name == NONE:
            axis.annotate(name, (x, y), (0, 12), textcoords="offset points", ha="right", fontsize=13, color=colour)
            continue
        axis.plot([3, x - 1], [height, y], color=colour, lw=0.8, ls=":")
        axis.text(2, height, name, ha="right", va="center", fontsize=13, color=colour)


def apart(wanted: list[float], gap: float) -> list[float]:
    """Places near the wanted ones, in their order, each at least `gap` from the next."""
    order = np.argsort(wanted, kind="stable")
    steps = gap * np.arange(len(wanted))
    spread = np.array(wanted, float)[order] - steps
    for _ in range(len(spread)):  # neighbours that are out of order meet in the middle
        groups = np.split(spread, np.flatnonzero(np.diff(spread) > 1e-9) + 1)
        spread = np.concatenate([np.full(len(group), group.mean()) for group in groups])
        if (np.diff(spread) >= -1e-9).all():
            break
    places: NDArray[np.float64] = np.empty(len(spread))
    places[order] = spread + steps
    return [float(place) for place in places]


def _has_kinds(table: list[Line]) -> bool:
    return any(value is not None for value in table[0]["kinds"].values())


def _plot_kinds(table: list[Line], file: Path) -> None:
    """Accuracy of each kind of question for the methods that matter most; nothing where the results do not say."""
    from matplotlib import pyplot

    if not _has_kinds(table):
        return
    wanted = (
        NONE,
        "merge 0.7",
        PAPER,
        "both 0.9",
        "coverage 25 %",
        "coverage 46 %, keep 0.7",
        *(f"{line} 25 %" for line in ("FastV", "random tokens", "changed tokens (EVS)", "frames spread")),
    )
    rows = [row for row in table if row["method"] in wanted] or table
    kinds = [kind for kind in KINDS if rows[0]["kinds"][kind] is not None]
    figure, axis = pyplot.subplots(figsize=(15, 5.6), layout="constrained")
    width = 0.85 / len(rows)
    for number, row in enumerate(rows):
        heights: NDArray[np.float64] = np.array([row["kinds"][kind] for kind in kinds], float) * 100
        axis.bar(np.arange(len(kinds)) + number * width, heights, width, label=row["method"])
    axis.set_xticks(np.arange(len(kinds)) + 0.4, kinds, fontsize=13)
    axis.set_title("right, %, by kind of question", fontsize=15)
    axis.tick_params(labelsize=13)
    axis.spines[["top", "right"]].set_visible(False)
    axis.margins(x=0.01)
    axis.legend(fontsize=12, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.06), frameon=False)
    _save(figure, file)


def _save(figure: Any, file: Path) -> None:
    from matplotlib import pyplot

    figure.savefig(file, dpi=110)
    pyplot.close(figure)
