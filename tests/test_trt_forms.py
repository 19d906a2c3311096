"""The graphs that TensorRT's builders are tried on: all say the same, and the script that tries them works."""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import trt_forms, trt_graphs
from dycoke_edge.runtime.trt import versions
from tests import fake_tensorrt


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("forms")
    assert len(trt_graphs.make(path)) == len(list(path.glob("*.onnx"))) > 60
    return path


def outputs(file: Path) -> dict[str, Any]:
    arrays = np.load(file)
    return {key: arrays[key].astype(np.float64) for key in arrays.files if key.startswith("out.")}


@pytest.mark.parametrize("kind", ("core", "rope", "attention", "layer", "deep"))
@pytest.mark.parametrize("dtype", ("fp32", "fp16"))
def test_all_forms_say_the_same(folder: Path, kind: str, dtype: str) -> None:
    files = sorted(folder.glob(f"??_{kind}_*_{dtype}.npz"))
    assert len(files) == (7 if kind != "core" else 3 if dtype == "fp32" else 0)
    for file in files[1:]:
        want = outputs(files[0])
        for key, got in outputs(file).items():
            assert np.abs(got - want[key]).max() <= (1e-6 if dtype == "fp32" else 2e-3) * np.abs(want[key]).max()


class HostMemory:
    """What the script asks of a GPU."""

    stream = 1

    def __init__(self) -> None:
        self._kept = list[Any]()

    def alloc(self, nbytes: int) -> int:
        self._kept.append(np.zeros(nbytes + 512, np.uint8))
        return int(-(-self._kept[-1].ctypes.data // 512) * 512)

    def upload(self, address: int, array: Any) -> None:
        ctypes.memmove(address, array.ctypes.data, array.nbytes)

    def download(self, address: int, array: Any) -> None:
        ctypes.memmove(array.ctypes.data, address, array.nbytes)


@pytest.fixture
def tensorrt(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.syspath_prepend(fake_tensorrt.write(tmp_path / "site", "8.6.0"))
    monkeypatch.setattr(trt_forms, "Gpu", HostMemory)
    sys.modules.pop("tensorrt", None)
    versions.load.cache_clear()
    yield
    sys.modules.pop("tensorrt", None)
    versions.load.cache_clear()


@pytest.mark.usefixtures("tensorrt")
def test_one_graph_is_built_run_and_compared(folder: Path) -> None:
    for name in ("layer_pairs_matrix_fp16", "core_concat_slice_fp32"):
        (file,) = folder.glob(f"??_{name}.onnx")
        result = trt_forms.try_one(file)
        assert result["outcome"] == "built" and result["error"] < 1e-3
        assert (result["fp32_layers"] > 0) == name.endswith("fp16")


def test_a_run_says_what_hangs_and_what_crashes(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.onnx").touch()
    monkeypatch.setattr(sys, "executable", "/bin/false")
    trt_forms.run(tmp_path, "*", 5, 60, 2, [])
    told = json.loads((tmp_path / "results.json").read_text())
    assert {one["outcome"] for one in told.values()} == {"crashes"} and "in order" in capsys.readouterr().out
    script = tmp_path / "slow"
    script.write_text("#!/bin/sh\nexec sleep 20\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    trt_forms.run(tmp_path, "a", 0.5, 60, 2, [])
    assert json.loads((tmp_path / "results.json").read_text())["a"]["outcome"] == "hangs"
    trt_forms.run(tmp_path, "*", 0.5, 0, 2, [])
    assert json.loads((tmp_path / "results.json").read_text())["b"]["outcome"] == "not tried"
