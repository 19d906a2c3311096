"""What `bench` measures and how it says so. Nothing here is timed: counts, orders and bytes are compared."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dycoke_edge import UsageError
from dycoke_edge.bundle import open_bundle
from dycoke_edge.cli import main, parse_args
from dycoke_edge.cli_options import take
from dycoke_edge.config import BENCH_MODES, BenchSpec, Compression, EngineSpec
from dycoke_edge.runtime import bench as module
from dycoke_edge.runtime.bench import Bench, question
from dycoke_edge.runtime.bench_result import HEADLINE, Result, ratios, warnings
from dycoke_edge.runtime.engine import Array, OnDevice, OrtCpuEngine
from dycoke_edge.runtime.metric import FLOORS, summary
from dycoke_edge.runtime.pipeline import VideoLLM
from dycoke_edge.runtime.power import PowerMeter
from dycoke_edge.runtime.synthetic import moving_patch
from dycoke_edge.runtime.traffic import CountedEngine, read_bandwidth
from tests import clips
from tests.commands import Argument, Outcome, here

Capture = pytest.CaptureFixture[str]
QUICK = ("--num-frames", 4, "--new-tokens", 3, "--rounds", 2, "--warmup", 1)
SPEC = BenchSpec(num_frames=4, new_tokens=3, rounds=2, warmup=1)


def run(capsys: Capture, bundle: Path, *options: Argument) -> Outcome:
    outcome = here(capsys, "bench", bundle, *QUICK, *options)
    assert outcome.code == 0, outcome.err
    return outcome


def load(bundle: Path, spec: BenchSpec = SPEC, meter: PowerMeter | None = None, **engine: Any) -> Bench:
    return Bench(bundle, spec, Compression(), EngineSpec(kv_capacity=512, **engine), meter=meter)


@pytest.fixture(scope="module")
def report(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One whole run."""
    folder = tmp_path_factory.mktemp("report")
    words = ("bench", tiny_bundle, *QUICK, "--export-json", folder / "r.json", "--export-csv", folder / "r.csv")
    assert main([str(word) for word in words]) == 0
    found: dict[str, Any] = json.loads((folder / "r.json").read_text())
    with (folder / "r.csv").open(newline="") as file:
        found["csv"] = list(csv.DictReader(file))
    assert sorted(path.name for path in folder.iterdir()) == ["r.csv", "r.json"]
    return found


def result(report: dict[str, Any], mode: str, compression: str | None) -> dict[str, Any]:
    [found] = [r for r in report["results"] if (r["mode"], r["compression"]) == (mode, compression)]
    assert isinstance(found, dict)
    return found


# What is measured


def test_every_stage_under_every_setting_that_bears_on_it(report: dict[str, Any]) -> None:
    both = [(mode, setting) for mode in ("prefill", "decode", "e2e") for setting in ("off", "on")]
    assert [(r["mode"], r["compression"]) for r in report["results"]] == [("vision", None), ("merge", "on"), *both]


@pytest.mark.parametrize(
    ("mode", "setting", "samples"),
    [
        ("vision", None, {"vision_latency": 2, "frames_per_second": 2}),
        ("merge", "on", {"merge_latency": 2}),
        ("prefill", "on", {"prefill_latency": 2, "prefill_throughput": 2}),
        ("decode", "on", {"inter_token_latency": 4, "output_token_throughput": 2, "kv_compaction_latency": 2}),
        ("e2e", "off", {"request_latency": 2, "time_to_first_token": 2, "inter_token_latency": 4, "video_latency": 2}),
    ],
)
def test_warm_up_does_not_count(
    report: dict[str, Any], mode: str, setting: str | None, samples: dict[str, int]
) -> None:
    metrics = result(report, mode, setting)["metrics"]
    assert {name: metrics[name]["samples"] for name in samples} == samples
    assert "joules_per_request" not in metrics
    assert all(metric["min"] >= 0 and metric["min"] <= metric["p50"] <= metric["max"] for metric in metrics.values())


def test_counts_are_what_arithmetic_says(report: dict[str, Any]) -> None:
    for mode in ("prefill", "decode", "e2e"):
        off, on = result(report, mode, "off"), result(report, mode, "on")
        assert off["visual_tokens_in"] == off["visual_tokens_kept"] == on["visual_tokens_in"] == 4 * 16
        assert on["visual_tokens_kept"] == 16 + 3 * 4
        assert off["input_sequence_length"] - on["input_sequence_length"] == 64 - 28
    for mode in ("decode", "e2e"):
        off, on = result(report, mode, "off"), result(report, mode, "on")
        assert off["visual_tokens_active"] == 64 and on["visual_tokens_active"] == 8  # int(28 * 0.3)
        assert off["output_sequence_length"] == on["output_sequence_length"] == 3
        assert not off["compression_applied"] and on["compression_applied"] and on["why_not"] == []
    assert result(report, "merge", "on")["visual_tokens_kept"] == 28


def test_the_report_says_where_it_was_made(report: dict[str, Any]) -> None:
    environment = report["environment"]
    assert environment["packages"]["onnxruntime"] and environment["python"] and environment["memory_bytes"]
    assert {"nvpmodel", "jetson_clocks", "gpu_clock", "l4t", "module", "throttled"} <= environment.keys()
    assert report["random_weights"] and report["video"] == "made up" and report["version"]
    assert report["settings"]["merge_ratio"] == 0.7 and report["settings"]["rounds"] == 2
    assert report["settings"]["stages"] == list(BENCH_MODES)
    assert report["bandwidth_gb_per_s"] > 0 and report["bandwidth_source"] == "read by the CPU"
    assert all(r["peak_device_memory_bytes"] is None and r["power"] is None for r in report["results"])
    assert all(r["peak_host_memory_bytes"] > 2**20 for r in report["results"])


def test_the_limit_is_bytes_over_bandwidth(report: dict[str, Any]) -> None:
    for r in report["results"]:
        limit = r["bytes_moved"] / (report["bandwidth_gb_per_s"] * 1e9) * 1e3
        assert r["bandwidth_limit_ms"] == pytest.approx(limit)
        p50 = r["metrics"][HEADLINE[r["mode"]]]["p50"]
        assert r["fraction_of_limit"] == pytest.approx(limit / p50)


def test_the_table_of_a_file_holds_the_same(report: dict[str, Any]) -> None:
    rows = report["csv"]
    assert len(rows) == sum(len(r["metrics"]) for r in report["results"])
    for row in rows:
        r = result(report, row["mode"], row["compression"] or None)
        metric = r["metrics"][row["metric"]]
        assert float(row["p50"]) == metric["p50"] and row["p99"] == "" and row["unit"] == metric["unit"]
        assert int(row["bytes_moved"]) == r["bytes_moved"] and row["peak_device_memory_bytes"] == ""


def test_some_stages_only(capsys: Capture, tiny_bundle: Path) -> None:
    outcome = run(capsys, tiny_bundle, "--stages", "decode", "vision", "--bandwidth", 204.8)
    assert outcome.out.count("\n") == 1
    found = json.loads(outcome.out)
    assert [(r["mode"], r["compression"]) for r in found["results"]] == [
        ("vision", None),
        ("decode", "off"),
        ("decode", "on"),
    ]
    assert (found["bandwidth_gb_per_s"], found["bandwidth_source"]) == (204.8, "--bandwidth")
    assert set(found["ratios_on_to_off"]) == {"decode.inter_token_latency", "decode.output_token_throughput"}
    assert "random weights (seed 4)" in outcome.err and "64 visual tokens in, 28 kept, 8 active" in outcome.err
    assert "\x1b" not in outcome.err


def test_a_clip(capsys: Capture, tiny_bundle: Path, tmp_path: Path) -> None:
    clip = clips.write_clip(tmp_path / "clip.mp4", size=(96, 64))
    found = json.loads(run(capsys, tiny_bundle, "--stages", "e2e", "prefill", "--video", clip).out)
    assert found["video"] == str(clip)
    assert {r["frames"] for r in found["results"]} == {4}
    assert result(found, "e2e", "on")["metrics"]["video_latency"]["min"] > 0


def test_nothing_to_compare_without_compression(capsys: Capture, tiny_bundle: Path) -> None:
    found = json.loads(run(capsys, tiny_bundle, "--merge-ratio", 0, "--prune-ratio", 0).out)
    assert {(r["mode"], r["compression"]) for r in found["results"]} == {
        ("vision", None),
        ("prefill", "off"),
        ("decode", "off"),
        ("e2e", "off"),
    }
    assert found["ratios_on_to_off"] == {}


def test_settings_alternate_and_take_turns_to_begin(tiny_bundle: Path) -> None:
    heard = list[tuple[str, float]]()
    load(tiny_bundle, BenchSpec(("prefill", "merge"), 4, new_tokens=2, rounds=3, warmup=1)).run(
        lambda what, share: heard.append((what, share))
    )
    names = [what for what, _ in heard]
    assert names[:4] == ["merge on (warm-up)", "merge on", "merge on", "merge on"]
    assert names[4:] == ["prefill off (warm-up)", "prefill on (warm-up)"] + [
        f"prefill {setting}" for setting in ("on", "off", "off", "on", "on", "off")
    ]
    assert [share for _, share in heard] == [number / len(heard) for number in range(len(heard))]


def test_decode_measures_prefill_in_the_same_run(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = list[str]()
    whole = OrtCpuEngine.run

    def count(self: OrtCpuEngine, graph: str, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> None:
        ran.append(graph)
        whole(self, graph, inputs, outputs)

    monkeypatch.setattr(OrtCpuEngine, "run", count)
    load(tiny_bundle, BenchSpec(("prefill", "decode"), 4, new_tokens=3, rounds=1, warmup=0)).run()
    assert ran.count("vision") == 4  # once a frame, for both settings
    assert ran.count("decoder_deep") == 2 * (3 + 2)  # prefix, visual, suffix, and two tokens


def test_the_same_answer_as_run_gives(tiny_bundle: Path) -> None:
    job = load(tiny_bundle)
    job.run()
    video = moving_patch(4, job.llm.bundle.model.image_size)
    plain = VideoLLM.load(tiny_bundle, kv_capacity=512)
    ours, theirs = (llm.generate(job.question, video, sampling=job._sampling) for llm in (job.llm, plain))
    assert ours.token_ids == theirs.token_ids


@pytest.mark.parametrize("tokens", [1, 2, 7, 40])
def test_the_question_has_as_many_tokens_as_asked_for(llm: VideoLLM, tokens: int) -> None:
    text, count = question(llm, tokens)
    around = sum(map(len, llm.text.encode("a", "video"))) - 1
    assert sum(map(len, llm.text.encode(text, "video"))) - around == count
    assert count == tokens


# Bytes


def test_bytes_are_weights_and_what_is_bound(tiny_bundle: Path) -> None:
    bundle = open_bundle(tiny_bundle)
    engine, model = CountedEngine(OrtCpuEngine(bundle, EngineSpec()), bundle), bundle.model
    weights = sum((tiny_bundle / "onnx" / name).stat().st_size for name in ("vision.onnx", "vision.onnx.data"))
    pixels = np.zeros((1, 3, model.image_size, model.image_size), np.float32)
    tokens = np.zeros((1, model.tokens_per_frame, model.hidden_size), np.float32)
    assert engine.take() == 0
    for _ in range(2):
        engine.run("vision", {"pixels": pixels}, {"tokens": tokens})
    assert engine.take() == 2 * (weights + pixels.nbytes + tokens.nbytes)
    assert engine.take() == 0
    assert engine.provider == "cpu" and engine._options is engine.engine._options  # type: ignore[attr-defined]


def test_a_token_moves_the_weights_and_the_rows_it_attends_to(report: dict[str, Any], tiny_bundle: Path) -> None:
    sizes = {path.name: path.stat().st_size for path in (tiny_bundle / "onnx").iterdir()}
    weights = sum(size for name, size in sizes.items() if name.startswith("decoder_"))
    off, on = (result(report, "decode", setting)["bytes_moved"] for setting in ("off", "on"))
    model = open_bundle(tiny_bundle).model
    row = model.kv_bytes_per_token // model.num_layers
    shallow, deep = model.split_layer, model.num_layers - model.split_layer
    assert weights < on < off
    scores = 4 * (2 * (64 - 28) + (64 - 8))  # mask and attention of the shallow layers, mask of the deep ones, fp32
    assert off - on == row * (shallow * (64 - 28) + deep * (64 - 8)) + scores


def test_the_bandwidth_is_a_plausible_one() -> None:
    assert 1e8 < read_bandwidth() < 1e14


# Statistics


def test_floors_leave_two_samples_beyond_with_99_percent() -> None:
    for share, floor in FLOORS.items():
        if share == 50:
            continue

        def at_most_one(n: int, tail: float = 1 - share / 100) -> float:
            return (1 - tail) ** n + n * tail * (1 - tail) ** (n - 1)

        assert at_most_one(floor) <= 0.01 < at_most_one(floor - 1)


@pytest.mark.parametrize("size", [1, 63, 64, 129, 130, 661, 662])
def test_percentiles_below_their_floor_are_null(size: int) -> None:
    found = summary([float(n) for n in range(size)], "ms")
    for share, floor in FLOORS.items():
        value = found[f"p{share}"]
        assert (value is None) == (size < floor)
        assert value is None or value == pytest.approx((size - 1) * share / 100)
    assert (found["samples"], found["min"], found["max"]) == (size, 0, size - 1)
    assert found["avg"] == (size - 1) / 2 and found["std"] == pytest.approx(math.sqrt((size**2 - 1) / 12))


def test_warnings_are_of_unsteady_figures() -> None:
    steady, jumpy = Result("vision", None), Result("merge", "on")
    for value in (1.0, 1.01):
        steady.add(vision_latency=value)
        jumpy.add(merge_latency=value**30)
    [line] = warnings([one.as_dict(None) for one in (steady, jumpy)])
    assert line.startswith("merge on: merge_latency varies by 15%")


def test_ratios_are_of_medians() -> None:
    off, on = Result("e2e", "off"), Result("e2e", "on")
    off.add(request_latency=2.0, vision_latency=1.0)
    on.add(request_latency=0.5, vision_latency=1.0)
    assert ratios([one.as_dict(None) for one in (off, on)]) == {"e2e.request_latency": 0.25}


# Power and devices


def test_power_is_the_mean_and_an_answer_costs_joules(tiny_bundle: Path) -> None:
    meter = PowerMeter(lambda: {"VDD_IN": 10.0, "VDD_SOC": 4.0})
    found = {r.mode + str(r.compression): r.as_dict(None) for r in load(tiny_bundle, meter=meter).run()}
    meter.close()
    for one in found.values():
        assert one["power"] == {
            "watts": 10.0,
            "watts_are_of": ["VDD_IN"],
            "rails": {"VDD_IN": 10.0, "VDD_SOC": 4.0},
        }
        assert one["fraction_of_limit"] is None and one["bandwidth_limit_ms"] is None and one["bytes_moved"] > 0
    metrics = found["e2eon"]["metrics"]
    assert metrics["joules_per_request"]["avg"] == pytest.approx(metrics["request_latency"]["avg"] / 1e3 * 10)
    assert metrics["joules_per_request"]["unit"] == "J"


class DeviceEngine(OrtCpuEngine):
    """The CPU, playing an accelerator."""

    waits = 0
    peak = 0

    def synchronize(self) -> None:
        self.waits += 1
        self.peak = 1000 + self.waits

    def take_peak_bytes(self) -> int:
        taken, self.peak = self.peak, 0
        return taken


def test_an_engine_with_memory_of_its_own(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "open_engine", DeviceEngine)
    job = load(tiny_bundle)
    assert not job.on_host
    results = job.run()
    assert isinstance(job._device, DeviceEngine) and isinstance(job._device, OnDevice)
    # three rounds: vision, merge, prefill and decode, e2e; each waits before it is measured, and at its end
    assert job._device.waits == 2 * (3 + 3 + 3 * 2 * 2 + 3 * 2)
    assert [r.device_bytes for r in results if r.mode == "vision"] == [1006]


def test_a_device_has_no_bandwidth_that_the_cpu_could_measure(
    capsys: Capture, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "open_engine", DeviceEngine)
    printed = run(capsys, tiny_bundle, "--stages", "vision")
    assert "host MiB" in printed.err and "GPU MiB" in printed.err
    found = json.loads(printed.out)
    assert found["bandwidth_gb_per_s"] is found["bandwidth_source"] is None
    assert found["results"][0]["peak_device_memory_bytes"] and found["results"][0]["fraction_of_limit"] is None


# Mistakes


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--stages", "speed"), "--stages: invalid choice: 'speed'"),
        (("--rounds", "0"), "--rounds"),
        (("--new-tokens", "1"), "--new-tokens"),
        (("--num-frames", "600"), "--kv-capacity"),
        (("--num-frames", "600", "--kv-capacity", "10"), "use "),
        (("--num-frames", "60000"), "--num-frames"),
        (("--merge-ratio", "0.42"), "--merge-ratio"),
        (("--bandwidth", "0"), "--bandwidth"),
        (("--video", "no.mp4"), "no.mp4 (--video) does not exist"),
        (("--video", "a.mp4", "--video", "b.mp4"), "--video was given 2 times"),
        (("--export-json", "no/such/folder/r.json"), "no/such/folder/r.json (--export-json) cannot be written"),
        (("--export-csv", "."), ". (--export-csv) is a folder"),
        (("--export-csv", "a", "--export-json", "a"), "a is both --export-json and --export-csv"),
    ],
)
def test_a_mistake_is_one_line_before_any_work(
    capsys: Capture,
    tiny_bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: tuple[str, ...],
    words: str,
) -> None:
    def fail(*arguments: object) -> None:
        raise AssertionError("work")

    monkeypatch.setattr(OrtCpuEngine, "load", fail)
    outcome = here(capsys, "bench", tiny_bundle, *options)
    assert words in outcome.complaint
    assert outcome.code == (3 if "no.mp4" in options else 2)


def test_frames_that_do_not_fit_name_what_does(tiny_bundle: Path) -> None:
    with pytest.raises(UsageError, match=r"--kv-capacity (\d+) or --num-frames (\d+)") as error:
        load(tiny_bundle, BenchSpec(num_frames=40, new_tokens=3))
    words = str(error.value).split()
    frames = int(words[-1])
    load(tiny_bundle, BenchSpec(num_frames=frames, new_tokens=3))
    with pytest.raises(UsageError):
        load(tiny_bundle, BenchSpec(num_frames=frames + 1, new_tokens=3))
    load(tiny_bundle, BenchSpec(("vision", "merge"), 40))  # which need no KV buffer


def test_a_clip_that_does_not_fit_is_refused_before_it_is_decoded(
    capsys: Capture, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip = clips.write_clip(tmp_path / "clip.mp4", size=(96, 64))
    monkeypatch.setattr("dycoke_edge.runtime.video.decode", lambda *arguments: pytest.fail("decoded"))
    outcome = here(capsys, "bench", tiny_bundle, "--video", clip, "--kv-capacity", 50)
    assert "--kv-capacity" in outcome.complaint and outcome.code == 2


def test_defaults_are_those_of_config() -> None:
    assert take(parse_args(["bench", "B"]), BenchSpec) == BenchSpec()


def test_an_empty_choice_of_modes() -> None:
    with pytest.raises(UsageError, match="--stages"):
        BenchSpec(stages=())


def test_a_failure_leaves_the_files_as_they_were(
    capsys: Capture, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = tmp_path / "r.json"
    before.write_text("before")
    monkeypatch.setattr("dycoke_edge.cli_bench._write_json", _fail_half_way)
    outcome = here(
        capsys,
        "bench",
        tiny_bundle,
        *QUICK,
        "--stages",
        "merge",
        "--export-json",
        before,
        "--export-csv",
        tmp_path / "c",
    )
    assert outcome.code == 4 and "No space left" in outcome.complaint
    assert before.read_text() == "before"
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]


def _fail_half_way(file: Any, report: dict[str, Any]) -> None:
    file.write("{")
    raise OSError(28, "No space left on device")
