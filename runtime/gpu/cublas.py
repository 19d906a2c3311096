"""cuBLAS through ctypes: one product, row-major and with fp32 sums."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from ctypes import POINTER, byref, c_float, c_int, c_size_t, c_void_p
from typing import Any

import numpy as np

from dycoke_edge.errors import EngineError
from dycoke_edge.runtime.gpu.device import DeviceArray
from dycoke_edge.runtime.gpu.libraries import in_packages

# cublas_api.h and library_types.h
AS_IT_LIES, TRANSPOSED = 0, 1
DATA_TYPE = {np.dtype(np.float32): 0, np.dtype(np.float16): 2}
COMPUTE_32F = 68  # sums in fp32; fp32 inputs as they are, for TF32 has another number
DEFAULT_ALGORITHM = -1
NO_REDUCED_PRECISION_REDUCTION = 16  # a math mode: parts of a sum are not added up in fp16 either
STATUS = {
    **{1: "NOT_INITIALIZED", 3: "ALLOC_FAILED", 7: "INVALID_VALUE", 8: "ARCH_MISMATCH", 11: "MAPPING_ERROR"},
    **{13: "EXECUTION_FAILED", 14: "INTERNAL_ERROR", 15: "NOT_SUPPORTED", 16: "LICENSE_ERROR"},
}
MAJORS = (13, 12, 11)
WORKSPACE = 32 << 20  # bytes; what NVIDIA advises for Hopper, and captured work needs a place that stays


class CuBlas:
    """A handle that works on one stream."""

    def __init__(self, library: Any, stream: int, workspace: int) -> None:
        """`workspace` is the address of WORKSPACE bytes on the GPU that nothing else uses."""
        self._library = _declared(library)
        self._handle = c_void_p()
        self._call("cublasCreate_v2", byref(self._handle))
        self._call("cublasSetStream_v2", self._handle, stream)  # before the workspace, which it takes away
        self._call("cublasSetWorkspace_v2", self._handle, workspace, WORKSPACE)
        self._call("cublasSetMathMode", self._handle, NO_REDUCED_PRECISION_REDUCTION)

    def product(self, x: DeviceArray, matrix: DeviceArray, out: DeviceArray, beta: float) -> None:
        """As Device.product. What is row-major here is its own transpose to cuBLAS, which is column-major, and
        transpose(x matrix^T) = matrix transpose(x): so the two change places, m and n too."""
        (m, k), n = x.shape, len(matrix)
        assert matrix.shape == (n, k) and out.shape == (m, n) and x.dtype == matrix.dtype
        left, right, target = (
            (array.address, DATA_TYPE[array.dtype], apart) for array, apart in ((matrix, k), (x, k), (out, n))
        )
        self._call(
            *("cublasGemmEx", self._handle, TRANSPOSED, AS_IT_LIES, n, m, k, byref(c_float(1.0)), *left, *right),
            *(byref(c_float(beta)), *target, COMPUTE_32F, DEFAULT_ALGORITHM),
        )

    def close(self) -> None:
        """Give the handle back."""
        self._library.cublasDestroy_v2(self._handle)

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self._library, name)(*arguments)
        if status:
            raise EngineError(f"{name} failed: CUBLAS_STATUS_{STATUS.get(status, status)}")


def find_library(driver_version: int) -> Any:
    """The cuBLAS of the driver's CUDA version or an older one: what the process has loaded, what pip has installed,
    what the system has. EngineError if there is none."""
    majors = [major for major in MAJORS if major <= driver_version // 1000]
    for major in majors:
        for path, mode in _places(major):
            try:
                return ctypes.CDLL(path, mode)
            except OSError:
                continue
    major = majors[0] if majors else MAJORS[-1]
    package = "nvidia-cublas" if major >= 13 else f"nvidia-cublas-cu{major}"
    raise EngineError(
        f"cuBLAS is not installed (no libcublas.so.{major}): pip install {package}, on a Jetson install JetPack's CUDA"
    )


def _places(major: int) -> Iterator[tuple[str, int]]:
    name = f"libcublas.so.{major}"
    yield name, os.RTLD_NOLOAD | os.RTLD_NOW
    for path in in_packages(name):
        yield path, ctypes.DEFAULT_MODE
    yield name, ctypes.DEFAULT_MODE


def _declared(library: Any) -> Any:
    operations, sizes = [c_int] * 2, [c_int] * 3
    matrix, scalar = [c_void_p, c_int, c_int], [POINTER(c_float)]
    signatures = {
        "cublasCreate_v2": [POINTER(c_void_p)],
        "cublasDestroy_v2": [c_void_p],
        "cublasSetStream_v2": [c_void_p, c_void_p],
        "cublasSetWorkspace_v2": [c_void_p, c_void_p, c_size_t],
        "cublasSetMathMode": [c_void_p, c_int],
        "cublasGemmEx": [c_void_p, *operations, *sizes, *scalar, *matrix * 2, *scalar, *matrix, c_int, c_int],
    }
    for name, arguments in signatures.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, c_int
    return library
