"""What a benchmark found: the figures of each stage under each setting."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dycoke_edge.runtime.metric import summary, unsteady
from dycoke_edge.runtime.power import total
from dycoke_edge.runtime.stats import Stats

UNITS = {"frames_per_second": "frames/s", "prefill_throughput": "tokens/s", "output_token_throughput": "tokens/s"}
UNRELATED = ("video_latency", "vision_latency", "merge_latency", "kv_compaction_latency")
HEADLINE = {
    "vision": "vision_latency",
    "merge": "merge_latency",
    "prefill": "prefill_latency",
    "decode": "inter_token_latency",
    "e2e": "request_latency",
}


@dataclass
class Result:
    """What a stage took, under one setting. `compression` is None where it has no bearing on the stage."""

    mode: str
    compression: str | None
    facts: dict[str, Any] = field(default_factory=dict)
    samples: dict[str, list[float]] = field(default_factory=dict)
    bytes_moved: float = 0.0  # by what the headline metric times
    host_bytes: int = 0
    device_bytes: int | None = None
    watts: list[dict[str, float]] = field(default_factory=list)

    def add(self, **values: float | None) -> None:
        """A sample each: latencies in seconds, throughputs a second. None is what this engine cannot tell."""
        for name, value in values.items():
            if value is None:
                continue
            self.samples.setdefault(name, []).append(value)

    def as_dict(self, bandwidth: float | None) -> dict[str, Any]:
        """For JSON. `bandwidth` in bytes a second; fraction_of_limit is 1 where nothing but memory costs time."""
        metrics = {name: _metric(name, values) for name, values in self.samples.items()}
        limit = self.bytes_moved / bandwidth if bandwidth and self.bytes_moved else None
        return {
            "mode": self.mode,
            "compression": self.compression,
            **self.facts,
            "metrics": metrics,
            "peak_host_memory_bytes": self.host_bytes,
            "peak_device_memory_bytes": self.device_bytes,
            "bytes_moved": round(self.bytes_moved),
            "bandwidth_limit_ms": None if limit is None else limit * 1e3,
            "fraction_of_limit": None if limit is None else limit * 1e3 / metrics[HEADLINE[self.mode]]["p50"],
            "power": _power(self.watts),
        }


def _metric(name: str, values: list[float]) -> dict[str, Any]:
    if name.endswith("latency") or name.startswith("time"):
        return summary([value * 1e3 for value in values], "ms")
    return summary(values, "J" if name.startswith("joules") else UNITS[name])


def _power(runs: list[dict[str, float]]) -> dict[str, Any] | None:
    """Mean watts over runs, None without rails."""
    if not runs or not runs[0]:
        return None
    rails = {name: float(np.mean([run.get(name, 0.0) for run in runs])) for name in runs[0]}
    watts, names = total(rails)
    return {"watts": watts, "watts_are_of": names, "rails": rails}


def ratios(results: list[dict[str, Any]]) -> dict[str, float]:
    """Medians with compression over those without, by "mode.metric", where compression has a bearing."""
    by = {(result["mode"], result["compression"]): result["metrics"] for result in results}
    return {
        f"{mode}.{name}": metric["p50"] / by[mode, "off"][name]["p50"]
        for (mode, setting), metrics in by.items()
        for name, metric in metrics.items()
        if setting == "on" and name not in UNRELATED and by.get((mode, "off"), {}).get(name, {}).get("p50")
    }


def warnings(results: list[dict[str, Any]]) -> list[str]:
    """Where a headline figure varied so much that a clock may have moved."""
    found = []
    for result in results:
        share = unsteady(result["metrics"][HEADLINE[result["mode"]]])
        if share is not None:
            name = " ".join(filter(None, (result["mode"], result["compression"])))
            found.append(
                f"{name}: {HEADLINE[result['mode']]} varies by {share:.0%}; lock the clocks, or end other work"
            )
    return found


def facts(stats: Stats, rows: int) -> dict[str, Any]:
    """What went in: frames, tokens, rows of the prompt."""
    return {
        "frames": stats.frames,
        "visual_tokens_in": stats.visual_tokens_in,
        "visual_tokens_kept": stats.visual_tokens_kept,
        "input_sequence_length": rows,
    }


def active(stats: Stats) -> dict[str, Any]:
    """What came out, and what compression really did."""
    return {
        "visual_tokens_active": stats.mean_active_rows,
        "output_sequence_length": stats.new_tokens,
        "refreshes": stats.refreshes,
        "compression_applied": stats.compression_applied,
        "why_not": stats.why_not,
    }
