"""The GPU benchmark, dry on the CPU: sides give the same ids, limits are those of the model, a run leaves files."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from time import monotonic
from typing import Any

import pytest

from benchmarks import gpu, gpu_report
from benchmarks.gpu_limits import Floors
from benchmarks.rivals import kernels
from benchmarks.rivals.contestant import SIDES, Answer, Job, Side, engine_of, side_of
from dycoke_edge import Compression
from tests import lively

TOKENS = 24


def job(name: str, checkpoint: Path, bundle: Path, frames: int = 9) -> Job:
    return Job(name, str(checkpoint), str(bundle), frames, TOKENS, "cpu", False, lively.SPLIT_LAYER)


def answer(name: str, side: Side, checkpoint: Path, bundle: Path) -> Answer:
    """The answer of one side, the second that it gives: nothing of the first is left."""
    made = side.load()(job(name, checkpoint, bundle), side)
    first, second = made.answer(TOKENS), made.answer(TOKENS)
    assert first.ids == second.ids and len(second.times) == TOKENS
    assert second.times == sorted(second.times) and second.times[0] > 0
    return second


def test_without_compression_all_sides_give_the_same_ids(tiny_checkpoint: Path, tiny_bundle: Path) -> None:
    names = ("transformers", "compiled", "ours-off")
    found = [answer(name, SIDES[name], tiny_checkpoint, tiny_bundle) for name in names]
    assert found[0].ids == found[1].ids == found[2].ids and len(set(found[0].ids)) > 4
    assert {(one.rows, one.visual, one.active) for one in found} == {(found[0].rows, 9 * 16, 9 * 16.0)}


@pytest.mark.parametrize("threshold", [0.9, 0.5])
def test_the_released_code_is_our_mode_official(tiny_checkpoint: Path, tiny_bundle: Path, threshold: float) -> None:
    """Where the attention of a step does not turn, the whole cache is used."""
    options = Compression(mode="official", refresh_threshold=threshold)
    theirs = answer("official", Side("official", "", options), tiny_checkpoint, tiny_bundle)
    ours = answer("ours-both", Side("ours", "", options), tiny_checkpoint, tiny_bundle)
    assert theirs.ids == ours.ids and theirs.visual == ours.visual < 9 * 16
    assert theirs.active == pytest.approx(ours.active) and theirs.active < theirs.visual
    assert 0 < theirs.refreshes < TOKENS - 1
    plain = answer("ours-off", SIDES["ours-off"], tiny_checkpoint, tiny_bundle)
    assert plain.ids != ours.ids


def test_names_ask_for_engines() -> None:
    assert side_of("ours-both@cuda,vision=graph") is SIDES["ours-both"]
    options = {"provider": "cuda", "decoder": "launched", "vision_batch": 16}
    assert engine_of("ours-both@cuda,decoder=launched,vision_batch=16", "cpu") == options
    assert engine_of("ours-off@tensorrt", "cuda") == {"provider": "tensorrt"}
    assert engine_of("ours-off", "cpu") == {"provider": "cpu"}


def test_limits_count_the_weights_of_the_model(tiny_checkpoint: Path, model: Any) -> None:
    floors = Floors(json.loads((tiny_checkpoint / "config.json").read_text()), 4)
    language = model.model.language_model
    weights = sum(p.numel() for p in language.layers.parameters()) + model.lm_head.weight.numel()
    rows, hidden = 100, 40
    kept = 2 * 32 * 2 * (6 * rows - 3 * hidden)  # K and V, G = 2, D = 32, 6 layers cut at 3
    assert floors.step(rows, hidden, 3).nbytes == pytest.approx(4 * (weights + kept), rel=0.02)
    tower = sum(p.numel() for p in model.model.vision_tower.parameters())
    projector = sum(p.numel() for p in model.model.multi_modal_projector.parameters())
    frame = 49 * 2 * (tower + projector) + 3 * 4 * 49 * 49 * 64
    assert floors.vision(5).flop == pytest.approx(5 * frame, rel=0.07)
    prompt = 200 * 2 * sum(p.numel() for p in language.layers[:5].parameters())
    attention = 5 * 2 * 200 * 201 * 4 * 32
    assert floors.prefill(200).flop == pytest.approx(prompt + attention, rel=0.03)
    assert floors.step(10, 0, 3).seconds({"matmul_flop_per_s": 1e30, "copy_bytes_per_s": 1.0}) > 1e6


def test_a_dry_run_leaves_a_table_and_goes_on(
    tiny_checkpoint: Path, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    common = ["--shape", "tiny", "--device", "cpu", "--frames", "6", "--new-tokens", "5", "--rounds", "1"]
    common += ["--warmup", "0", "--checkpoint", str(tiny_checkpoint), "--bundle", str(tiny_bundle), "--out", str(out)]
    common += ["--contestant", "transformers", "ours-off"]
    monkeypatch.setenv("BENCHMARK_COMMIT", "abc")
    monkeypatch.setattr(sys, "argv", ["gpu.py", *common])
    gpu.main()
    run = only(out)
    assert set(run["sides"]) == {"transformers", "ours-off"} and not run["failed"]
    for found in run["sides"].values():
        assert found["first_token"]["median"] > found["vision"]["median"] > 0 and found["peak_bytes"] > 2**20
        assert set(found["profile"]) == {"vision", "prefill", "step"} and found["same_ids"] == 5
    assert run["sides"]["transformers"]["profile"]["prefill"]["kinds_ms"]["matrix"] > 0
    assert [verdict["what"] for verdict in gpu_report.verdicts(run)] == ["vision"]
    text = (out / "gpu.md").read_text()
    assert "| vision | ours-off / transformers |" in text and "commit abc" in text
    assert (out / "gpu.png").stat().st_size > 1000
    gpu.store(out, run)
    assert only(out) == run, "the same case and sides replace what was there"
    gpu.store(out, run | {"case": run["case"] | {"frames": 7}})
    assert len(json.loads((out / "gpu.json").read_text())["runs"]) == 2


def only(out: Path) -> dict[str, Any]:
    """The one run in gpu.json."""
    (run,) = json.loads((out / "gpu.json").read_text())["runs"]
    assert isinstance(run, dict)
    return run


def test_a_side_that_fails_leaves_the_others(tiny_checkpoint: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    jobs = [job("ours-off", tiny_checkpoint, tiny_bundle, 2), job("ours-both", tiny_checkpoint, tmp_path / "no", 2)]
    sides = gpu.Sides(jobs, "cpu", monotonic() + 60)
    try:
        sides.open()
        assert list(sides.all("round")) == ["ours-off"] and str(tmp_path / "no") in sides.failed["ours-both"]
        sides.deadline = 0
        assert not sides.all("round") and "in time" in sides.failed["ours-off"]
    finally:
        sides.close()


def test_verdicts_tell_yes_from_no() -> None:
    figures = {name: {"median": 1.0} for name in gpu.STAGES}
    base = figures | {"peak_bytes": 2**30}
    ours = base | {"inter_token": {"median": 0.75}, "whole": {"median": 0.11}}
    sides = {"transformers": base, "compiled": base, "ours-off": ours, "ours-both@cuda": ours}
    told = {v["what"]: v["met"] for v in gpu_report.verdicts({"case": {"shape": "0.5b"}, "sides": sides})}
    assert told == {
        "inter-token without compression": True,
        "vision": True,
        "whole answer with both": False,
        "peak memory with both": False,
    }
    assert "inter" not in str(gpu_report.verdicts({"case": {"shape": "7b"}, "sides": sides})[0])


def test_a_stage_is_what_a_longer_run_has_more() -> None:
    more, fewer = kernels.Counts({"gemm": 30, "softmax": 5, "x": 1}), kernels.Counts({"gemm": 10, "x": 2})
    assert kernels.less(more, fewer) == {"gemm": 20, "softmax": 5}
    found = kernels.stage(0.05, kernels.less(more, fewer), 5)
    assert found["wall_ms"] == 10 and found["device_ms"] == 0.005
    assert found["kinds_ms"] == {"matrix": 0.004, "attention": 0.001}
    names = {
        "fmha_cutlassF_f16_aligned_64x64_rf_sm80": "attention",
        "nvjet_hsh_128x256_64x4_2x1_v_bz_coopA_NNT": "matrix",
        "Memcpy DtoD (Device -> Device)": "copy",
        "void at::native::vectorized_elementwise_kernel<4, FillFunctor>": "norm and pointwise",
        "triton_red_fused__to_copy_add_mean_mul_pow_rsqrt_3": "norm and pointwise",
        "attend_f16_64": "attention",
        "norm_project_f16": "matrix",
        "choose": "keep",
        "mystery": "other",
    }
    assert {name: kernels.kind_of(name) for name in names} == names


def test_bars_have_plain_names_and_numbers_without_exponents() -> None:
    assert gpu_report.PLAIN.keys() == SIDES.keys()
    assert gpu_report.plain("ours-merge@cuda,vision_batch=16") == "dycoke-edge, merge; vision batch 16"
    assert gpu_report.plain("ours-off@tensorrt") == "dycoke-edge, no compression; tensorrt"
    shown = [gpu_report.number(value) for value in (0.5, 1.234, 17.34, 91.9, 2289.6, 12345.6)]
    assert shown == ["0.50", "1.23", "17.3", "91.9", "2,290", "12,346"]


def test_the_plot_is_drawn_again_from_results(tmp_path: Path) -> None:
    (tmp_path / "gpu.json").write_text(Path("benchmarks/results/gpu.json").read_text())
    gpu.main(["--redraw", "--out", str(tmp_path)])
    assert (tmp_path / "gpu.png").stat().st_size > 10_000
