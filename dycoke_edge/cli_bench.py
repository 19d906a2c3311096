"""The command that measures: bench."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from rich.table import Table

from dycoke_edge import __version__
from dycoke_edge import cli_output as output
from dycoke_edge.cli_options import add, add_bundle, command, installed, single, take
from dycoke_edge.config import BenchSpec, Compression, EngineSpec
from dycoke_edge.doctor import examine
from dycoke_edge.errors import EngineError, UsageError

if TYPE_CHECKING:
    from dycoke_edge.runtime.bench import Bench
    from dycoke_edge.runtime.board import Board

COMPRESSION = (
    *("mode", "budget", "merge_ratio", "prune_ratio", "keep", "refresh_threshold"),
    *("positions", "free_parked", "weigh"),
)
EXPORTS = {"export_json": "--export-json", "export_csv": "--export-csv"}
DEFINITIONS = {
    "time_to_first_token": "from the request to the first token: video read and resized, vision, merge, prefill",
    "inter_token_latency": "between two tokens, every one a sample",
    "output_token_throughput": "decode: tokens over the time after the first; e2e: tokens over the whole request",
    "kv_compaction_latency": "all refreshes of an answer together",
    "frames_per_second": "vision: frames over encoding; e2e: frames over the whole request",
    "bytes_moved": "weights and every tensor bound, once a run of a graph; decode: a token; else: all of the stage",
    "fraction_of_limit": "bytes_moved over the bandwidth, over the median latency: 1 is as fast as memory allows",
    "joules_per_request": "mean power over the request, idle power included",
    "p90": "null below 64 samples, p95 below 130, p99 below 662",
}
WIDTH, OF_A_PEAK = 97, 9  # columns of the table, and more for each of PEAKS
PEAKS = {"host MiB": "peak_host_memory_bytes", "GPU MiB": "peak_device_memory_bytes"}  # most held while it ran
STATISTICS = ("unit", "samples", "avg", "min", "max", "std", "p50", "p90", "p95", "p99")
FACTS = (
    "frames",
    "visual_tokens_in",
    "visual_tokens_kept",
    "visual_tokens_active",
    "input_sequence_length",
    "output_sequence_length",
    "peak_host_memory_bytes",
    "peak_device_memory_bytes",
    "bytes_moved",
    "bandwidth_limit_ms",
    "fraction_of_limit",
)


def add_commands(commands: Any) -> None:
    """Add the command of this file to the command line."""
    p = command(
        commands,
        "bench",
        bench,
        "measure every stage on this machine, without and with compression",
        (
            "bench BUNDLE",
            "bench BUNDLE --video clip.mp4 --num-frames 32 --stages e2e",
            "bench BUNDLE --stages prefill decode --export-json bench.json --export-csv bench.csv",
        ),
    )
    add_bundle(p)
    p.add_argument("--video", action="append", metavar="CLIP", help="frames to use; without it they are made up")
    p.add_argument("--export-json", metavar="FILE", help="also write the line of stdout to a file, readable")
    p.add_argument("--export-csv", metavar="FILE", help="write a table, a line a stage, setting and metric")
    add(p, BenchSpec)
    add(p, Compression, only=COMPRESSION)
    add(p, EngineSpec)


def bench(args: argparse.Namespace) -> None:
    """dycoke-edge bench BUNDLE"""
    with installed("bench", "dycoke-edge", EngineError):
        from dycoke_edge.runtime.bench import Bench
        from dycoke_edge.runtime.board import read_board
        from dycoke_edge.runtime.power import power_meter
    spec, engine = take(args, BenchSpec), take(args, EngineSpec)
    compression = take(args, Compression, COMPRESSION)
    video = single(args.video, "--video")
    exports = [_export_path(getattr(args, name), flag) for name, flag in EXPORTS.items()]
    if exports[0] and exports[0] == exports[1]:
        raise UsageError(f"{exports[0]} is both --export-json and --export-csv; give each a file of its own")
    with power_meter() as meter:
        job = Bench(args.bundle, spec, compression, engine, Path(video) if video else None, meter)
        settings = {**_asdict(spec), **_asdict(compression, COMPRESSION), **_asdict(engine)}
        report = _run(job, settings, read_board())
    for path, write in zip(exports, (_write_json, _write_csv), strict=True):
        if path:
            _whole(path, write, report)
    _show(report, job.llm.bundle.path.name)
    output.random_weights(job.llm.bundle.manifest)
    output.half_precision(job.llm.bundle.manifest, engine.provider)
    output.json_line(report)


def _run(job: Bench, settings: dict[str, Any], board: Board) -> dict[str, Any]:
    """Everything that the command prints, as JSON."""
    from dycoke_edge.runtime.bench_result import ratios, warnings
    from dycoke_edge.runtime.board import read_board

    with output.progress() as show:
        show("memory bandwidth", 0.0)
        bandwidth, source = _bandwidth(job)
        results = [result.as_dict(bandwidth) for result in job.run(show)]
    after = read_board()
    facts, manifest = examine(), job.llm.bundle.manifest
    throttled = None
    if board.throttle_events is not None and after.throttle_events is not None:
        throttled = after.throttle_events > board.throttle_events
    return {
        "benchmark": "bench",
        "version": __version__,
        "bundle": str(job.llm.bundle.path),
        "random_weights": manifest.random_seed is not None,
        "settings": settings | {"prompt_tokens": job.prompt_tokens},
        "video": "made up" if job.video is None else str(job.video),
        "environment": {
            "python": facts["python"],
            "machine": facts["machine"],
            "cpus": facts["cpus"],
            "packages": facts["packages"],
            **dataclasses.asdict(board),
            "throttled": throttled,
            "hottest_c_after": after.hottest_c,
        },
        "bandwidth_gb_per_s": None if bandwidth is None else bandwidth / 1e9,
        "bandwidth_source": source,
        "host_memory_metric": job.host_metric,
        "definitions": DEFINITIONS,
        "results": results,
        "ratios_on_to_off": ratios(results),
        "warnings": warnings(results) + (["the board throttled meanwhile"] if throttled else []),
    }


def _bandwidth(job: Bench) -> tuple[float | None, str | None]:
    """Bytes a second, and where the figure is from; None for a device whose memory the CPU cannot measure."""
    from dycoke_edge.runtime.traffic import read_bandwidth

    if job.spec.bandwidth is not None:
        return job.spec.bandwidth * 1e9, "--bandwidth"
    if job.on_host:
        return read_bandwidth(), "read by the CPU"
    return (job.bandwidth, "by the GPU's memory clock and bus width") if job.bandwidth else (None, None)


def _asdict(group: Any, only: tuple[str, ...] = ()) -> dict[str, Any]:
    return {name: value for name, value in dataclasses.asdict(group).items() if not only or name in only}


def _export_path(name: str | None, flag: str) -> Path | None:
    """Where an export can be written; UsageError before any work if it cannot."""
    if name is None:
        return None
    path = Path(name)
    if path.is_dir():
        raise UsageError(f"{name} ({flag}) is a folder; give a file in it, e.g. {flag} {path / 'bench'}")
    try:
        _partial(path).touch()
        _partial(path).unlink()
    except OSError as error:
        raise UsageError(f"{name} ({flag}) cannot be written: {error.strerror}; use e.g. {flag} {path.name}") from None
    return path


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


def _whole(path: Path, write: Any, report: dict[str, Any]) -> None:
    """Write a file whole or not at all."""
    partial = _partial(path)
    try:
        with partial.open("w", newline="", encoding="utf-8") as file:
            write(file, report)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    output.people.print(f"wrote {path}")


def _write_json(file: TextIO, report: dict[str, Any]) -> None:
    json.dump(report, file, indent=2)
    file.write("\n")


def _write_csv(file: TextIO, report: dict[str, Any]) -> None:
    table = csv.writer(file, lineterminator="\n")
    table.writerow(("mode", "compression", "metric", *STATISTICS, *FACTS))
    for result in report["results"]:
        for name, metric in result["metrics"].items():
            figures = [metric[key] for key in STATISTICS] + [result.get(key) for key in FACTS]
            table.writerow([result["mode"], result["compression"], name, *figures])


def _show(report: dict[str, Any], name: str) -> None:
    """The table for people, with ratios to the run without compression."""
    title = f"{name}, {report['settings']['rounds']} rounds"
    peaks = {column: key for column, key in PEAKS.items() if report["results"][0][key] is not None}
    width = WIDTH + OF_A_PEAK * len(peaks)
    table = Table(title=title, title_justify="left", box=None, width=None if output.people.width > width else width)
    for column in ("stage", "metric", "unit", "p50", "p90", "p95", "p99", "to off", "of limit", *peaks):
        table.add_column(column, justify="left" if column in ("stage", "metric", "unit") else "right", no_wrap=True)
    for result in report["results"]:
        mode, setting = result["mode"], result["compression"]
        stage = " ".join(filter(None, (mode, setting)))
        limit = "-" if result["fraction_of_limit"] is None else f"{result['fraction_of_limit']:.0%}"
        ends = [limit, *(f"{result[key] / 2**20:,.0f}" for key in peaks.values())]
        for metric, figures in result["metrics"].items():
            ratio = report["ratios_on_to_off"].get(f"{mode}.{metric}") if setting == "on" else None
            values = [_figure(figures[key]) for key in ("p50", "p90", "p95", "p99")]
            table.add_row(stage, metric, figures["unit"], *values, "-" if ratio is None else f"{ratio:.2f}", *ends)
            stage, ends = "", [""] * len(ends)
    output.people.print(table)
    for line in _notes(report):
        output.people.print(line)


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:,.2f}" if value < 1000 else f"{value:,.0f}"


def _notes(report: dict[str, Any]) -> list[str]:
    tokens = {}
    for result in report["results"]:
        if "visual_tokens_active" in result:
            counts = (result["visual_tokens_in"], result["visual_tokens_kept"], result["visual_tokens_active"])
            tokens[result["compression"]] = "{} visual tokens in, {} kept, {:.0f} active".format(*counts)
    lines = [f"compression {setting}: {text}" for setting, text in tokens.items()]
    if report["bandwidth_gb_per_s"] is not None:
        lines.append(f"limit: {report['bandwidth_gb_per_s']:.1f} GB/s of memory, {report['bandwidth_source']}")
    return lines + [f"note: {warning}" for warning in report["warnings"]]
