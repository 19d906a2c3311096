"""How cuBLAS is found, and what is said when it fails. What it computes, and with which numbers it is called:
test_gpu_device.py, on a GPU and, through test_cuda.py, on tests/cuda_on_cpu/libcublaslt.cpp."""

from __future__ import annotations

import ctypes
import importlib.util
import os
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dycoke_edge.errors import EngineError
from dycoke_edge.runtime.gpu import cublaslt
from dycoke_edge.runtime.gpu.device import DeviceArray
from tests.emulator import EmulatedDevice

ONE = DeviceArray(EmulatedDevice(), 0, (1, 1), np.float32)


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[str, int]]:
    """Every library that is asked for; none can be loaded. pip has cuBLAS 13 and 12."""
    for name in ("nvidia/cu13/lib/libcublasLt.so.13", "nvidia/cublas/lib/libcublasLt.so.12"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path / "nvidia")])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    asked: list[tuple[str, int]] = []

    def load(path: str, mode: int = 0) -> Any:
        asked.append((path.removeprefix(f"{tmp_path}/nvidia/"), mode))
        raise OSError

    monkeypatch.setattr(ctypes, "CDLL", load)
    return asked


@pytest.mark.parametrize(
    ("driver", "order", "package"),
    [
        (13020, ["libcublasLt.so.13", "cu13/lib/libcublasLt.so.13", "libcublasLt.so.13"], "nvidia-cublas"),
        (12020, ["libcublasLt.so.12", "cublas/lib/libcublasLt.so.12", "libcublasLt.so.12"], "nvidia-cublas-cu12"),
        (11040, ["libcublasLt.so.11", "libcublasLt.so.11"], "nvidia-cublas-cu11"),
    ],
)
def test_where_it_is_looked_for(tried: list[tuple[str, int]], driver: int, order: list[str], package: str) -> None:
    """First what the process has loaded (torch or ONNX Runtime), then pip's, then the system's; never a newer one than
    the driver's CUDA."""
    with pytest.raises(EngineError, match=rf"cuBLAS is not installed .*: pip install {package}, on a Jetson"):
        cublaslt.find_library(driver)
    assert [name for name, _ in tried][: len(order)] == order
    assert tried[0][1] & os.RTLD_NOLOAD and not tried[1][1] & os.RTLD_NOLOAD
    newest = max(int(name.rsplit(".", 1)[1]) for name, _ in tried)
    assert newest == driver // 1000


class Library:
    """One whose every function succeeds and finds an algorithm, but for one; it remembers what was called."""

    def __init__(self, failing: str = "", status: int = 0, algorithms: int = 1, state: int = 0) -> None:
        self.failing, self.status, self.algorithms, self.state = failing, status, algorithms, state
        self.called: Counter[str] = Counter()

    def __getattr__(self, name: str) -> Any:
        def function(*arguments: Any) -> int:
            self.called[name] += 1
            if name == "cublasLtMatmulAlgoGetHeuristic":
                arguments[-1]._obj.value, arguments[-2]._obj.state = self.algorithms, self.state
            return self.status if name == self.failing else 0

        setattr(self, name, function)
        return function

    @property
    def alive(self) -> int:
        """Descriptors made and not destroyed."""
        kinds = ("MatmulDesc", "MatrixLayout", "MatmulPreference")
        return sum(self.called[f"cublasLt{kind}Create"] - self.called[f"cublasLt{kind}Destroy"] for kind in kinds)


@pytest.mark.parametrize(
    ("name", "status", "said"),
    [
        ("cublasLtCreate", 1, "cublasLtCreate failed: CUBLAS_STATUS_NOT_INITIALIZED"),
        ("cublasLtMatmulDescSetAttribute", 7, "cublasLtMatmulDescSetAttribute failed: CUBLAS_STATUS_INVALID_VALUE"),
        ("cublasLtMatmul", 13, "cublasLtMatmul failed: CUBLAS_STATUS_EXECUTION_FAILED"),
        ("cublasLtMatmul", 99, "cublasLtMatmul failed: CUBLAS_STATUS_99"),
    ],
)
def test_a_status_is_an_error(name: str, status: int, said: str) -> None:
    with pytest.raises(EngineError, match=said):
        cublaslt.CuBlasLt(Library(name, status), 1, 2).product(ONE, ONE, ONE, 0.0, None, False)


@pytest.mark.parametrize(("algorithms", "state"), [(0, 0), (1, 15)])
def test_no_algorithm_is_an_error(algorithms: int, state: int) -> None:
    library = Library(algorithms=algorithms, state=state)
    with pytest.raises(EngineError, match="no algorithm for a product of 1 x 1 and 1 x 1"):
        cublaslt.CuBlasLt(library, 1, 2).product(ONE, ONE, ONE, 0.0, None, False)
    assert library.alive == 0


def test_a_shape_is_planned_once_and_old_plans_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cublaslt, "PLANS", 2)
    blas = cublaslt.CuBlasLt(library := Library(), 1, 2)

    def multiply(rows: int, bias: int = 0) -> int:
        """How many searches it took."""
        before = library.called["cublasLtMatmulAlgoGetHeuristic"]
        many, one = (DeviceArray(EmulatedDevice(), 512, (n, 1), np.float32) for n in (rows, 1))
        added = DeviceArray(EmulatedDevice(), bias, (1,), np.float32) if bias else None
        blas.product(many, one, many, 0.0, added, False)
        return library.called["cublasLtMatmulAlgoGetHeuristic"] - before

    assert [multiply(1), multiply(1), multiply(2), multiply(1)] == [1, 0, 1, 0]
    assert multiply(3) == 1 and multiply(1) == 0 and multiply(2) == 1  # 2 was the one longest unused
    assert multiply(1, bias=256) == 1
    told = library.called["cublasLtMatmulDescSetAttribute"]
    assert multiply(1, bias=256) == 0 and library.called["cublasLtMatmulDescSetAttribute"] == told
    assert multiply(1, bias=512) == 0 and library.called["cublasLtMatmulDescSetAttribute"] == told + 1
    with pytest.raises(AssertionError):
        multiply(1, bias=128)  # the search was told of more alignment
    assert library.alive == 2 * 5
    blas.close()
    assert library.alive == 0 and library.called["cublasLtDestroy"] == 1
