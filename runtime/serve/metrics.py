"""A watcher's numbers for Prometheus. Labels are ids, reasons and stages, capped: never a URL or a prompt."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric, SummaryMetricFamily
from prometheus_client.registry import Collector

MOST = 128  # values of a label
MEMORY = Path("/proc/meminfo")
Status = dict[str, Any]
Row = tuple[tuple[str, ...], float]


class WatcherMetrics(Collector):
    """Asks for the status at every scrape and keeps nothing."""

    def __init__(self, status: Callable[[], Status], memory: Path = MEMORY) -> None:
        self._status, self._memory = status, memory

    def collect(self) -> Iterator[Metric]:
        """Every metric of this moment."""
        status = self._status()
        cameras: dict[str, Status] = dict(islice(status["cameras"].items(), MOST))
        yield from _of_cameras(cameras)
        yield from _of_model(status, cameras)
        yield from _of_sinks(status["sinks"][:MOST])
        available = _available(self._memory)
        if available is not None:
            yield _gauge("dycoke_memory_available_bytes", "Memory that programs can have", (), [((), available)])


def _of_cameras(cameras: dict[str, Status]) -> Iterator[Metric]:
    by_camera = ("camera",)
    up = [((name,), float(one["state"] == "online")) for name, one in cameras.items()]
    yield _gauge("dycoke_camera_up", "1 while frames come", by_camera, up)
    last = "dycoke_camera_last_frame_timestamp_seconds"
    yield _gauge(last, "UTC of the newest frame given to the model", by_camera, _numbers(cameras, "last_frame_time"))
    age = "Seconds from a window's newest frame to its answer"
    yield _gauge("dycoke_answer_age_seconds", age, by_camera, _numbers(cameras, "answer_age_s"))
    yield _counter("dycoke_camera_frames", "Frames decoded", by_camera, _numbers(cameras, "decoded_frames"))
    yield _counter("dycoke_windows", "Windows looked at", by_camera, _numbers(cameras, "windows"))
    for name, key, help in (
        ("dycoke_camera_frames_dropped", "dropped_frames", "Frames lost"),
        ("dycoke_camera_reconnects", "reconnects", "Times a stream was opened anew"),
        ("dycoke_windows_dropped", "dropped_windows", "Windows passed over"),
    ):
        yield _counter(name, help, ("camera", "reason"), _by_reason(cameras, key))
    alerts = [
        ((name, rule), float(state["on"]))
        for name, one in cameras.items()
        for rule, state in one.get("alerts", {}).items()
    ]
    yield _gauge("dycoke_alert_state", "1 while an alert is open", ("camera", "rule"), alerts[: MOST * 8])
    unknown = [
        ((name, rule, why), float(count))
        for name, one in cameras.items()
        for rule, state in one.get("alerts", {}).items()
        for why, count in state.get("unknown", {}).items()
    ]
    help = "Windows that said nothing about a rule: the model would say neither yes nor no (mass), between, failed"
    yield _counter("dycoke_rule_unknown", help, ("camera", "rule", "reason"), unknown[: MOST * 8])


def _of_model(status: Status, cameras: dict[str, Status]) -> Iterator[Metric]:
    stages = SummaryMetricFamily("dycoke_stage_duration_seconds", "Time that stages took", labels=("stage",))
    for stage, took in islice(status["seconds"].items(), MOST):
        stages.add_metric((stage,), took["count"], took["sum"])
    yield stages
    tokens = [
        ((name, kind), float(one.get(f"vision_tokens_{kind}") or 0))
        for name, one in cameras.items()
        for kind in ("in", "kept")
    ]
    yield _counter("dycoke_vision_tokens", "Visual tokens before and after compression", ("camera", "kind"), tokens)
    events = [(tuple(key.split("/", 1)), float(count)) for key, count in islice(status["events"].items(), MOST)]
    yield _counter("dycoke_events", "Events", ("type", "verdict"), events)
    asked = status["questions"]
    yield _gauge("dycoke_questions_waiting", "Questions in line for the model", (), [((), float(asked["waiting"]))])
    outcomes: list[Row] = [((key,), float(asked[key])) for key in ("answered", "refused", "failed")]
    yield _counter("dycoke_questions", "Questions", ("outcome",), outcomes)
    yield _counter("dycoke_failures", "Times the model failed", (), [((), float(status["failures"]))])
    yield _gauge("dycoke_ready", "1 while answers can be expected", (), [((), float(status["ready"]))])


def _of_sinks(sinks: Iterable[Status]) -> Iterator[Metric]:
    """A sink goes by its kind, e.g. webhook, webhook_2: its name may say where it leads."""
    names, seen = list[tuple[str, Status]](), Counter[str]()
    for sink in sinks:
        kind = str(sink["name"]).split()[0] if str(sink["name"]).strip() else "sink"
        seen[kind] += 1
        names.append((kind if seen[kind] == 1 else f"{kind}_{seen[kind]}", sink))
    queued = [((name,), float(sink.get("queued", 0))) for name, sink in names]
    yield _gauge("dycoke_sink_queue_length", "Events that wait", ("sink",), queued)
    for key, help in (("failures", "Failed tries"), ("dropped", "Events lost"), ("delivered", "Events handed on")):
        rows = [((name,), float(sink.get(key, 0))) for name, sink in names]
        yield _counter(f"dycoke_sink_{key}", help, ("sink",), rows)


def _numbers(cameras: dict[str, Status], key: str) -> list[Row]:
    return [((name,), float(one[key])) for name, one in cameras.items() if one.get(key) is not None]


def _by_reason(cameras: dict[str, Status], key: str) -> list[Row]:
    return [
        ((name, reason), float(count))
        for name, one in cameras.items()
        for reason, count in islice(one.get(key, {}).items(), 32)
    ]


def _gauge(name: str, help: str, labels: tuple[str, ...], rows: Iterable[Row]) -> Metric:
    metric = GaugeMetricFamily(name, help, labels=labels)
    for values, number in rows:
        metric.add_metric(values, number)
    return metric


def _counter(name: str, help: str, labels: tuple[str, ...], rows: Iterable[Row]) -> Metric:
    """`_total` is put behind the name."""
    metric = CounterMetricFamily(name, help, labels=labels)
    for values, number in rows:
        metric.add_metric(values, number)
    return metric


def _available(path: Path) -> float | None:
    try:
        lines = path.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return float(found[0]) * 1024 if found else None
