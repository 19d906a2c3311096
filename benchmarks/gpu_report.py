"""What the GPU benchmark found: figures with ratios, what was wanted, how far from the limits, where the time goes."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.rivals.contestant import side_of

Line = dict[str, Any]
BASE = "transformers"
COLUMNS = {
    "vision": ("vision, ms", 1e3),
    "first_token": ("first token, ms", 1e3),
    "inter_token": ("inter-token, ms", 1e3),
    "whole": ("whole answer, ms", 1e3),
    "peak_bytes": ("peak memory, GiB", 2**-30),
}


@dataclass(frozen=True)
class Wanted:
    """A ratio that is wanted: a figure of one side over that of another, at most `most`, for some shapes."""

    what: str
    figure: str
    ours: str
    theirs: str
    most: float
    shapes: tuple[str, ...] = ("tiny", "0.5b", "7b")


WANTED = (
    Wanted("inter-token without compression", "inter_token", "ours-off", "compiled", 0.75, ("tiny", "0.5b")),
    Wanted("vision", "vision", "ours-off", BASE, 1.0),
    Wanted("first token with merge", "first_token", "ours-merge", BASE, 0.6),
    Wanted("whole answer with both", "whole", "ours-both", BASE, 0.1),
    Wanted("peak memory with both", "peak_bytes", "ours-both", BASE, 1 / 1.4),
)


def key(run: Line) -> tuple[Any, ...]:
    """Runs of the same case and sides replace each other."""
    case, asked = run["case"], sorted({*run["sides"], *run["failed"]})
    return case["shape"], case["frames"], case["device"], run["environment"].get("gpu"), *asked


def write(runs: list[Line], out: Path) -> None:
    """gpu.json, gpu.md and gpu.png."""
    runs = sorted(runs, key=lambda run: (run["case"]["device"], run["case"]["shape"], run["case"]["frames"]))
    (out / "gpu.json").write_text(json.dumps({"benchmark": "gpu", "runs": runs}, indent=1) + "\n")
    (out / "gpu.md").write_text(markdown(runs))
    plot(runs, out / "gpu.png")


def ratio(run: Line, figure: str, ours: str, theirs: str) -> float | None:
    """ours / theirs, None unless both are in this run. `ours-off` may stand for `ours-off@tensorrt`."""
    sides = run["sides"]
    if ours not in sides or theirs not in sides:
        return None
    return middle(sides[ours], figure) / middle(sides[theirs], figure)


def middle(found: Line, figure: str) -> float:
    """The figure: a median, or a number."""
    value = found[figure]
    return float(value["median"] if isinstance(value, dict) else value)


def _failure(run: Line, name: str, reason: str) -> str:
    """A side with figures was lost afterwards: only its profile is missing."""
    return f"- {name} {'has no profile' if name in run['sides'] else 'failed'}: {reason}"


def verdicts(run: Line) -> list[Line]:
    """Every wanted ratio that this run can tell, for every engine that ran."""
    told = []
    for wanted in WANTED:
        for name in run["sides"] if run["case"]["shape"] in wanted.shapes else ():
            if name.partition("@")[0] == wanted.ours:
                found = ratio(run, wanted.figure, name, wanted.theirs)
                if found is not None:
                    told.append({"what": wanted.what, "sides": f"{name} / {wanted.theirs}", "found": found})
                    told[-1] |= {"wanted": wanted.most, "met": found <= wanted.most}
    return told


def markdown(runs: list[Line]) -> str:
    """Everything but the plot."""
    text = [
        "# Side by side on a GPU",
        "",
        "Random weights, greedy, no side stops early. Medians (least to most) over the rounds of one run in which the",
        "sides took turns; in brackets the ratio to transformers in that run. Vision is from frames in host memory to",
        "visual tokens on the device; peak memory is what the driver counts for the side's process, context included.",
        "`compiled` is timed by the device and never waits for the host, the others as the caller sees the tokens. A",
        "limit is the larger of operations over the measured matrix rate and bytes over the measured copy bandwidth.",
    ]
    for run in runs:
        text += ["", *chapter(run)]
    return "\n".join(text) + "\n"


def chapter(run: Line) -> list[str]:
    """One case."""
    case, where, limits = run["case"], run["environment"], run["ceilings"]
    names = list(run["sides"])
    text = [
        f"## {case['shape']}, {case['frames']} frames, {where.get('gpu', where['cpu'])}, {case['dtype']}",
        "",
        f"`{where['command']}`, commit {where['commit']}, torch {where['torch']}, transformers "
        f"{where['transformers']}, driver {where.get('driver', 'none')}. {case['new_tokens']} new tokens, "
        f"{case['rounds']} rounds at most. Measured ceilings: copy {limits['copy_bytes_per_s'] / 1e12:.2f} TB/s read "
        f"and written, matrix product {limits['matmul_flop_per_s'] / 1e12:.1f} TFLOP/s.",
        "",
        *grid(("side", "visual tokens / active", *(title for title, _ in COLUMNS.values()), "same ids"), rows(run)),
        "",
        *(f"- {name}: {side_of(name).title}" for name in names),
        *(_failure(run, name, reason) for name, reason in run["failed"].items()),
    ]
    told = verdicts(run)
    if told:
        lines = ([v["what"], v["sides"], f"{v['found']:.3f}", f"{v['wanted']:.3f}", yes(v["met"])] for v in told)
        text += ["", "### Wanted", "", *grid(("what", "ratio of", "found", "at most", "met"), lines)]
    text += ["", "### Against the limit", "", "Limit in ms, and the share of it that is reached.", "", *reached(run)]
    if any("profile" in found for found in run["sides"].values()):
        text += ["", "### What the time is made of", "", PROFILED, "", *profiles(run)]
    return text


PROFILED = (
    "Milliseconds, one run each: the wall's (not recorded), the device's by kind of kernel (recorded), and the wall's "
    "rest, in which the device ran nothing. The longest kernels are in gpu.json."
)


def rows(run: Line) -> Iterable[list[str]]:
    """A line a side."""
    for name, found in run["sides"].items():
        cells = [name, f"{found['visual']} / {found['active']:.0f}"]
        for figure, (_, scale) in COLUMNS.items():
            share = ratio(run, figure, name, BASE)
            shown = f"{middle(found, figure) * scale:.2f}"
            if isinstance(found[figure], dict):
                shown += f" ({found[figure]['least'] * scale:.2f} to {found[figure]['most'] * scale:.2f})"
            cells.append(shown if share is None else f"{shown} [{share:.3f}]")
        yield [*cells, "-" if found["same_ids"] is None else f"{found['same_ids']} of {run['case']['new_tokens']}"]


def reached(run: Line) -> list[str]:
    """Limits a stage."""
    stages = ("vision", "prefill", "inter_token")
    lines = (
        [name, *(f"{found['limits'][s]['limit'] * 1e3:.3f}, {found['limits'][s]['reached']:.1%}" for s in stages)]
        for name, found in run["sides"].items()
    )
    return grid(("side", "vision", "prefill and merge", "a token"), lines)


def profiles(run: Line) -> list[str]:
    """A line a side and stage."""
    lines = []
    for name, found in run["sides"].items():
        for stage, part in found.get("profile", {}).items():
            kinds = ", ".join(f"{kind} {ms:.3f}" for kind, ms in part["kinds_ms"].items())
            rest = part["wall_ms"] - part["device_ms"]
            lines.append([name, stage, f"{part['wall_ms']:.3f}", f"{part['device_ms']:.3f}", f"{rest:.3f}", kinds])
    return grid(("side", "stage", "wall", "device", "rest", "by kind"), lines)


def grid(head: Iterable[str], lines: Iterable[Iterable[str]]) -> list[str]:
    """A table in Markdown."""
    head = list(head)
    return ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *lines)]


def yes(met: bool) -> str:
    return "yes" if met else "**no**"


def plain(name: str) -> str:
    """What a bar is called: ours-off@cuda,vision_batch=16 -> dycoke-edge, off; vision batch 16."""
    _, _, engine = name.partition("@")
    more = [part.replace("_", " ").replace("=", " ") for part in engine.split(",")[1:]]
    provider = [engine.split(",")[0]] if engine and engine.split(",")[0] != "cuda" else []
    return "; ".join((PLAIN[name.partition("@")[0]], *provider, *more))


def number(value: float) -> str:
    """Three digits, thousands with a comma, never an exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


PLAIN = {
    "transformers": "transformers",
    "compiled": "transformers, compiled",
    "official": "DyCoke, its authors' code",
    "ours-off": "dycoke-edge, no compression",
    "ours-merge": "dycoke-edge, merge",
    "ours-both": "dycoke-edge, merge and prune",
    "ours-coverage": "dycoke-edge, coverage 25 %",
    "ours-coverage-14": "dycoke-edge, coverage 14 %",
}
PANELS = ("first_token", "inter_token", "whole", "peak_bytes")
OURS, THEIRS, VISION = "#1f77b4", "#9a9a9a", "#ffb14e"


def plot(runs: list[Line], file: Path) -> None:
    """A row of bars a case: first token by stage, inter-token, whole answer, memory."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    heights = [len(run["sides"]) + 2.2 for run in runs]
    figure, places = pyplot.subplots(
        len(runs),
        len(PANELS),
        figsize=(15, 0.42 * sum(heights)),
        squeeze=False,
        height_ratios=heights,
        layout=ConstrainedLayoutEngine(h_pad=0.12, w_pad=0.12),
    )
    for axes, run in zip(places, runs, strict=True):
        names = list(run["sides"])[::-1]
        for axis, panel in zip(axes, PANELS, strict=True):
            _bars(axis, run, names, panel)
        axes[0].set_yticks(range(len(names)), map(plain, names), fontsize=13)
        case = run["case"]
        axes[0].annotate(
            f"{case['shape'].upper()}, {case['frames']} frames",
            (0, 1),
            (-8, 8),
            xycoords="axes fraction",
            textcoords="offset points",
            ha="right",
            fontsize=15,
            weight="bold",
        )
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def _bars(axis: Any, run: Line, names: list[str], panel: str) -> None:
    """One figure of all sides, the number at the end of each bar."""
    title, scale = COLUMNS[panel]
    values = [middle(run["sides"][name], panel) * scale for name in names]
    axis.barh(range(len(names)), values, color=[OURS if name.startswith("ours") else THEIRS for name in names])
    if panel == "first_token":
        part = [middle(run["sides"][name], "vision") * scale for name in names]
        axis.barh(range(len(names)), part, color=VISION, height=0.4)
        title += " (yellow: vision)"
    for place, value in enumerate(values):
        axis.text(value, place, f" {number(value)}", va="center", fontsize=13)
    axis.set_xlim(0, max(values) * 1.28)
    axis.set_title(title, fontsize=13, loc="left")
    axis.set_xticks([])
    axis.set_yticks([])
    axis.spines[["top", "right", "bottom"]].set_visible(False)
