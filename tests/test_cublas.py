"""How cuBLAS is found, and what is said when it fails. What it computes, and with which numbers it is called:
test_gpu_device.py, on a GPU and, through test_cuda.py, on tests/cuda_on_cpu/libcublas.cpp."""

from __future__ import annotations

import ctypes
import importlib.util
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dycoke_edge.errors import EngineError
from dycoke_edge.runtime.gpu import cublas
from dycoke_edge.runtime.gpu.device import DeviceArray
from tests.emulator import EmulatedDevice

ONE = DeviceArray(EmulatedDevice(), 0, (1, 1), np.float32)


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[str, int]]:
    """Every library that is asked for; none can be loaded. pip has cuBLAS 13 and 12."""
    for name in ("nvidia/cu13/lib/libcublas.so.13", "nvidia/cublas/lib/libcublas.so.12"):
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
        (13020, ["libcublas.so.13", "cu13/lib/libcublas.so.13", "libcublas.so.13"], "nvidia-cublas"),
        (12020, ["libcublas.so.12", "cublas/lib/libcublas.so.12", "libcublas.so.12"], "nvidia-cublas-cu12"),
        (11040, ["libcublas.so.11", "libcublas.so.11"], "nvidia-cublas-cu11"),
    ],
)
def test_where_it_is_looked_for(tried: list[tuple[str, int]], driver: int, order: list[str], package: str) -> None:
    """First what the process has loaded (torch or ONNX Runtime), then pip's, then the system's; never a newer one than
    the driver's CUDA."""
    with pytest.raises(EngineError, match=rf"cuBLAS is not installed .*: pip install {package}, on a Jetson"):
        cublas.find_library(driver)
    assert [name for name, _ in tried][: len(order)] == order
    assert tried[0][1] & os.RTLD_NOLOAD and not tried[1][1] & os.RTLD_NOLOAD
    newest = max(int(name.rsplit(".", 1)[1]) for name, _ in tried)
    assert newest == driver // 1000


class Broken:
    """A library whose every function succeeds but one."""

    def __init__(self, name: str, status: int) -> None:
        self.failing, self.status = name, status

    def __getattr__(self, name: str) -> Any:
        def function(*arguments: object) -> int:
            return self.status if name == self.failing else 0

        setattr(self, name, function)
        return function


@pytest.mark.parametrize(
    ("name", "status", "said"),
    [
        ("cublasCreate_v2", 1, "cublasCreate_v2 failed: CUBLAS_STATUS_NOT_INITIALIZED"),
        ("cublasSetWorkspace_v2", 7, "cublasSetWorkspace_v2 failed: CUBLAS_STATUS_INVALID_VALUE"),
        ("cublasGemmEx", 13, "cublasGemmEx failed: CUBLAS_STATUS_EXECUTION_FAILED"),
        ("cublasGemmEx", 99, "cublasGemmEx failed: CUBLAS_STATUS_99"),
    ],
)
def test_a_status_is_an_error(name: str, status: int, said: str) -> None:
    with pytest.raises(EngineError, match=said):
        cublas.CuBlas(Broken(name, status), 1, 2).product(ONE, ONE, ONE, 0.0)
