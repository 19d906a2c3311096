"""CudaDevice without a GPU: the real cuda-bindings on a libcuda that computes on the CPU, and what is said when
something is missing or breaks. What it does on a GPU: test_gpu_device.py."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from enum import IntEnum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dycoke_edge.errors import EngineError
from dycoke_edge.runtime.gpu.cuda import CudaDevice
from dycoke_edge.runtime.gpu.driver import LOST, Driver
from tests.cuda_on_cpu import compiled

ROOT = Path(__file__).resolve().parents[1]
HAS_BINDINGS = importlib.util.find_spec("cuda") and importlib.util.find_spec("cuda.bindings")


def bindings_major() -> int:
    if not HAS_BINDINGS:
        pytest.skip("cuda-bindings is not installed")
    from cuda.bindings import driver

    return int(driver.CUDA_VERSION) // 1000


# On a libcuda that computes on the CPU


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with libcuda.so.1 and libcublasLt.so.N."""
    compiled.require_compiler()
    folder, major = tmp_path_factory.mktemp("libraries"), bindings_major()
    compiled.compile_driver(folder, major)
    return folder


def run(folder: Path, *command: str, **env: str) -> str:
    """What a process prints that finds these libraries; it must end well."""
    environment = os.environ | {"LD_LIBRARY_PATH": str(folder), "PYTHONPATH": os.pathsep.join(sys.path)} | env
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, timeout=300, cwd=ROOT, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_it_does_what_every_device_does(libraries: Path) -> None:
    """In a process of its own: the libraries must not be there for any other test."""
    rest = (
        "--noconftest",
        "-m",
        "gpu",
        "-q",
        "-p",
        "no:cacheprovider",
        "--deselect",
        "tests/test_gpu_device.py::test_kernels_ptx",
    )
    printed = run(libraries, "-m", "pytest", "tests/test_gpu_device.py", *rest, TOYS=compiled.toy_kernels()._name)
    counts = dict(re.findall(r"(\d+) (\w+)", printed.splitlines()[-1]))
    assert "skipped" not in counts.values() and int(next(iter(counts))) > 30, printed


def test_whole_answers(libraries: Path, tmp_path: Path) -> None:
    """Vision, prefill, captured steps, refreshes, evictions over the real bindings, each done as late as can be."""
    kernels = tmp_path / "kernels"
    kernels.write_text(compiled.project_kernels()._name)
    files, some = (
        ("tests/test_kernel_layers.py", "tests/test_gpu_pipeline.py"),
        "graphs and merge-0.7-often or take_turns and True or another",
    )
    options = ("-m", "gpu", "-q", "-p", "tests.cuda_on_cpu.plugin", "-p", "no:cacheprovider", "-k", some)
    printed = run(libraries, "-m", "pytest", *files, *options, KERNELS=str(kernels))
    assert re.search(r"3 passed, \d+ deselected", printed.splitlines()[-1]), printed


def test_cublas_that_is_not_there(libraries: Path, tmp_path: Path) -> None:
    (tmp_path / "libcuda.so.1").symlink_to(libraries / "libcuda.so.1")
    code = """
from dycoke_edge.errors import EngineError
from dycoke_edge.runtime.gpu import cublaslt
from dycoke_edge.runtime.gpu.cuda import CudaDevice
cublaslt.in_packages = lambda name: []
try:
    CudaDevice()
except EngineError as error:
    print(error)
"""
    printed = run(tmp_path, "-c", code)
    assert printed.startswith(
        f"cuBLAS is not installed (no libcublasLt.so.{bindings_major()}): pip install nvidia-cublas"
    )


# Without


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "cuda"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "cuda", None)  # as Python marks what is not there
    with pytest.raises(EngineError, match=re.escape("cuda-bindings is not installed: pip install 'dycoke-edge[gpu]'")):
        CudaDevice()


def test_without_a_driver() -> None:
    """The real package on this machine."""
    bindings_major()
    try:
        CudaDevice().close()
    except EngineError as error:
        assert re.search("driver is not installed.*nvidia-smi.*JetPack|finds no GPU.*nvidia-smi", str(error))
        assert "\n" not in str(error)
    else:
        pytest.skip("this machine has a GPU")


# Every status in our words: a module of the same names


class Status(IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_STUB_LIBRARY = 34
    CUDA_ERROR_NO_DEVICE = 100
    CUDA_ERROR_NO_BINARY_FOR_GPU = 209
    CUDA_ERROR_ECC_UNCORRECTABLE = 214
    CUDA_ERROR_INVALID_PTX = 218
    CUDA_ERROR_JIT_COMPILER_NOT_FOUND = 221
    CUDA_ERROR_UNSUPPORTED_PTX_VERSION = 222
    CUDA_ERROR_INVALID_HANDLE = 400
    CUDA_ERROR_ILLEGAL_ADDRESS = 700
    CUDA_ERROR_LAUNCH_TIMEOUT = 702
    CUDA_ERROR_LAUNCH_FAILED = 719
    CUDA_ERROR_SYSTEM_DRIVER_MISMATCH = 803
    CUDA_ERROR_UNKNOWN = 999


OK = Status.CUDA_SUCCESS


def module(version: int = 13020, built_for: int = 13050, **functions: Any) -> Any:
    """A cuda.bindings.driver that starts, with these functions."""
    given = {
        "cuInit": lambda flags: (OK,),
        "cuDriverGetVersion": lambda: (OK, version),
        "CUDA_VERSION": built_for,
        "cuMemGetInfo": lambda: (OK, 3 << 20, 9 << 20),
    }
    return SimpleNamespace(**{**given, **functions})


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (Status.CUDA_ERROR_NO_DEVICE, "finds no GPU: look at nvidia-smi and CUDA_VISIBLE_DEVICES"),
        (Status.CUDA_ERROR_STUB_LIBRARY, "take the stubs folder out of LD_LIBRARY_PATH"),
        (Status.CUDA_ERROR_SYSTEM_DRIVER_MISMATCH, "(CUDA_ERROR_SYSTEM_DRIVER_MISMATCH): look at nvidia-smi"),
    ],
)
def test_a_driver_that_does_not_start(status: Status, said: str) -> None:
    with pytest.raises(EngineError, match=re.escape(said)):
        Driver(module(cuInit=lambda flags: (status,)))


def test_bindings_newer_than_the_driver() -> None:
    said = "cuda-bindings is for CUDA 13, the GPU driver for 12.2: pip install 'cuda-bindings<13'"
    with pytest.raises(EngineError, match=re.escape(said)):
        Driver(module(version=12020))
    Driver(module(version=12020, built_for=12090))  # within a major version any two work together


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (Status.CUDA_ERROR_UNSUPPORTED_PTX_VERSION, "the GPU driver is older than CUDA 12.2"),
        (Status.CUDA_ERROR_INVALID_PTX, "older than compute capability 8.0 (Ampere): use --provider cpu"),
        (Status.CUDA_ERROR_NO_BINARY_FOR_GPU, "older than compute capability 8.0 (Ampere): use --provider cpu"),
        (Status.CUDA_ERROR_JIT_COMPILER_NOT_FOUND, "lacks libnvidia-ptxjitcompiler"),
        (Status.CUDA_ERROR_OUT_OF_MEMORY, "memory is out in cuCall: 3 MiB of 9 MiB are free; use a smaller --kv-cap"),
        (Status.CUDA_ERROR_INVALID_HANDLE, "cuCall failed: CUDA_ERROR_INVALID_HANDLE"),
    ],
)
def test_a_call_that_fails(status: Status, said: str) -> None:
    driver = Driver(module(cuCall=lambda *arguments: (status,), cuOther=lambda: (OK, 5)))
    with pytest.raises(EngineError, match=re.escape(said)):
        driver.call("cuCall", 1)
    assert driver.call("cuOther") == 5  # nothing is lost


@pytest.mark.parametrize(
    "status", ["ILLEGAL_ADDRESS", "LAUNCH_FAILED", "LAUNCH_TIMEOUT", "ECC_UNCORRECTABLE", "UNKNOWN"]
)
def test_a_lost_context_stays_lost(status: str) -> None:
    calls = []

    def other() -> tuple[Status]:
        calls.append(1)
        return (OK,)

    driver = Driver(module(cuCall=lambda: (Status[f"CUDA_ERROR_{status}"],), cuOther=other))
    texts = set()
    for name in ("cuCall", "cuOther", "cuCall"):
        with pytest.raises(EngineError) as caught:
            driver.call(name)
        texts.add(str(caught.value))
    (text,) = texts
    assert f"the GPU context is lost (CUDA_ERROR_{status} in cuCall): start the process anew" in text
    assert not calls  # a GPU that hangs is not asked again


def test_what_is_lost_has_the_names_of_the_package() -> None:
    bindings_major()
    from cuda.bindings import driver

    names = {status.name.removeprefix("CUDA_ERROR_") for status in driver.CUresult}
    assert names >= LOST - {"CONTAINED", "TENSOR_MEMORY_LEAK"}  # newer than the oldest 12.x


def test_no_such_gpu() -> None:
    with pytest.raises(EngineError, match="there is no GPU 3: this machine has 1, counted from 0"):
        CudaDevice(3, Driver(module(cuDeviceGetCount=lambda: (OK, 1))))
