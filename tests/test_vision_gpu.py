"""The vision benchmark, dry: that it runs, and what its profile counts."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import vision_gpu
from benchmarks.ort_profile import summary
from dycoke_edge.bundle import open_bundle
from tests.emulator import EmulatedDevice


def test_a_dry_run(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tiny_checkpoint: Path,
    tiny_bundle: Path,
    tmp_path: Path,
) -> None:
    model = ("--tiny", "--checkpoint", str(tiny_checkpoint), "--bundle", str(tiny_bundle), "--dtype", "fp32")
    sizes = ("--frames", "3", "--batches", "1", "2", "8", "--rounds", "1", "--no-torch")
    file = tmp_path / "v.json"
    monkeypatch.setattr(sys, "argv", ["x", "--provider", "cpu", *model, *sizes, "--export-json", str(file)])
    vision_gpu.main()
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads(file.read_text())
    assert set(found["seconds"]) == {"portable", "vision_trt", "vision_cuda", "encode"}
    assert all(set(by) == {"1", "2"} for by in found["seconds"].values())  # no batch beyond the frames
    assert found["distance"]["portable"] == 0 < found["distance"]["vision_cuda"] < 3e-6
    operators = found["by_operator"]["milliseconds"]
    assert found["by_operator"]["clock"] == "host" and "MultiHeadAttention" in operators and "Softmax" not in operators


def test_own_kernels_alone(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tiny_checkpoint: Path,
    tiny_bundle: Path,
) -> None:
    """Where there is no onnxruntime-gpu, here nor a GPU."""
    model = ("--tiny", "--checkpoint", str(tiny_checkpoint), "--bundle", str(tiny_bundle), "--dtype", "fp32")
    sizes = ("--frames", "2", "--batches", "1", "2", "--rounds", "1", "--no-torch", "--no-graphs")
    monkeypatch.setattr(vision_gpu, "open_device", EmulatedDevice)
    monkeypatch.setattr(sys, "argv", ["x", *model, *sizes])
    vision_gpu.main()
    found = json.loads(capsys.readouterr().out)
    assert set(found["seconds"]) == set(found["distance"]) == {"own kernels", "encode"}
    assert found["distance"]["own kernels"] == 0 and found["distance"]["encode"] < 1e-5
    assert "by_operator" not in found


def test_the_arithmetic_of_the_tower(tiny_checkpoint: Path, tiny_bundle: Path) -> None:
    """By hand: 49 patches of 3 * 14 * 14, 3 layers of 64 and 128, a projector to 128."""
    layer = 49 * (4 * 64 * 64 + 2 * 64 * 128) + 2 * 49 * 49 * 64
    ends = 49 * (588 * 64 + 64 * 128 + 128 * 128)
    assert vision_gpu.flops(open_bundle(tiny_bundle), tiny_checkpoint, 2) == 2 * 2 * (3 * layer + ends)


def test_a_profile_counts_the_second_run() -> None:
    nodes = [
        {"cat": "Node", "name": "a_kernel_time", "ts": ts, "dur": dur, "args": {"op_name": op}}
        for ts, dur, op in [(1, 900, "Add"), (2, 900, "Mul"), (3, 1000, "Add"), (4, 2000, "Mul")]
    ]
    rest = [{"cat": "Session", "name": "run", "ts": 0, "dur": 9}, {"cat": "Node", "name": "a_fence", "ts": 0, "dur": 9}]
    assert summary([*nodes, *rest]) == ("host", {"Mul": 2.0, "Add": 1.0})
    kernel = {"cat": "Kernel", "name": "gemm", "ts": 9, "dur": 500, "args": {"op_name": "MatMul"}}
    assert summary([*nodes, kernel]) == ("GPU", {"MatMul": 0.5})
