"""cuBLASLt through ctypes: row-major products with fp32 sums, and what follows them in the same pass over memory."""

from __future__ import annotations

import ctypes
import os
from collections import OrderedDict
from collections.abc import Iterator
from ctypes import POINTER, byref, c_float, c_int, c_int32, c_int64, c_size_t, c_uint32, c_uint64, c_void_p
from typing import Any

import numpy as np

from dycoke_edge.errors import EngineError
from dycoke_edge.runtime.gpu.device import DeviceArray
from dycoke_edge.runtime.gpu.libraries import in_packages

# cublasLt.h, cublas_api.h and library_types.h
DATA_TYPE = {np.dtype(np.float32): 0, np.dtype(np.float16): 2}
COMPUTE_32F = 68  # sums in fp32; fp32 inputs as they are, for TF32 has another number
TRANSPOSE = 1
DESC_TRANSPOSE_A, DESC_EPILOGUE, DESC_BIAS_POINTER = 3, 7, 8
# The header does not say which GELU it is: by the machine code of 13.8 the one with tanh, by the GPU's own instruction.
EPILOGUE_DEFAULT, EPILOGUE_BIAS, EPILOGUE_GELU = 1, 4, 32
PREFERENCE_WORKSPACE, PREFERENCE_REDUCTION, PREFERENCE_ALIGNMENTS = 1, 3, (5, 6, 7, 8)
REDUCTION_COMPUTE_TYPE = 2  # parts of a sum are added up in fp32; in place they would be in out's type
STATUS = {
    **{1: "NOT_INITIALIZED", 3: "ALLOC_FAILED", 7: "INVALID_VALUE", 8: "ARCH_MISMATCH", 11: "MAPPING_ERROR"},
    **{13: "EXECUTION_FAILED", 14: "INTERNAL_ERROR", 15: "NOT_SUPPORTED", 16: "LICENSE_ERROR"},
}
MAJORS = (13, 12, 11)
WORKSPACE = 32 << 20  # bytes; what NVIDIA advises for Hopper, and captured work needs a place that stays
PLANS = 512  # that are kept: every number of tokens or frames has seven of its own
ALIGNED = 256  # bytes; more alignment makes no difference


class Heuristic(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t; the algorithm comes first and is opaque."""

    _fields_ = (
        ("algorithm", c_uint64 * 8),
        ("workspace", c_size_t),
        ("state", c_int),
        ("waves", c_float),
        ("reserved", c_int * 4),
    )


class CuBlasLt:
    """A handle whose work goes to one stream."""

    def __init__(self, library: Any, stream: int, workspace: int) -> None:
        """`workspace` is the address of WORKSPACE bytes on the GPU that nothing else uses."""
        self._library = _declared(library)
        self._end = workspace, WORKSPACE, stream
        self._handle = c_void_p()
        self._plans: OrderedDict[tuple[Any, ...], _Plan] = OrderedDict()
        self.call("cublasLtCreate", byref(self._handle))

    def product(
        self, x: DeviceArray, matrix: DeviceArray, out: DeviceArray, beta: float, bias: DeviceArray | None, gelu: bool
    ) -> None:
        """As Device.product."""
        (m, k), n = x.shape, len(matrix)
        assert matrix.shape == (n, k) and out.shape == (m, n) and x.dtype == matrix.dtype
        assert bias is None or (bias.shape == (n,) and bias.dtype == out.dtype and bias.address % ALIGNED == 0)
        assert bias is not None or not gelu
        epilogue = EPILOGUE_DEFAULT if bias is None else EPILOGUE_BIAS | EPILOGUE_GELU * gelu
        aligned = tuple(_aligned(array.address) for array in (matrix, x, out, out))
        key = m, n, k, DATA_TYPE[x.dtype], DATA_TYPE[out.dtype], epilogue, aligned
        plan = self._plans.get(key)
        if plan is None:
            plan = self._plans[key] = self._plan(key)
        self._plans.move_to_end(key)
        if bias is not None:
            plan.read_bias(bias.address)
        self.call(
            *("cublasLtMatmul", self._handle, plan.work, plan.one, matrix.address, plan.matrix, x.address, plan.x),
            *(byref(c_float(beta)), out.address, plan.out, out.address, plan.out, plan.algorithm, *self._end),
        )

    def close(self) -> None:
        """Give the handle and the plans back."""
        while self._plans:
            self._plans.popitem()[1].close()
        self._library.cublasLtDestroy(self._handle)

    def call(self, name: str, *arguments: Any) -> None:
        """EngineError if it fails."""
        status = getattr(self._library, name)(*arguments)
        if status:
            raise EngineError(f"{name} failed: CUBLAS_STATUS_{STATUS.get(status, status)}")

    def _plan(self, key: tuple[Any, ...]) -> _Plan:
        if len(self._plans) >= PLANS:
            self._plans.popitem(last=False)[1].close()
        return _Plan(self, self._handle, *key)


class _Plan:
    """A shape's descriptors and the algorithm for it.

    What is row-major here is its own transpose to cuBLAS, which is column-major, and transpose(x matrix^T) = matrix
    transpose(x): so the two change places, m and n too, and a bias for each of our columns is one for each of its rows.
    """

    def __init__(
        self,
        library: CuBlasLt,
        handle: c_void_p,
        m: int,
        n: int,
        k: int,
        taken: int,
        given: int,
        epilogue: int,
        aligned: tuple[int, ...],
    ) -> None:
        self._library, self._made = library, list[tuple[str, c_void_p]]()
        self.one = byref(c_float(1.0))
        self._bias = 0
        self.work = self._make("MatmulDesc", COMPUTE_32F, DATA_TYPE[np.dtype(np.float32)])
        self._tell(DESC_TRANSPOSE_A, c_int32(TRANSPOSE))
        self._tell(DESC_EPILOGUE, c_uint32(epilogue))
        if epilogue != EPILOGUE_DEFAULT:
            self._tell(DESC_BIAS_POINTER, c_void_p(ALIGNED))  # for the search: somewhere, aligned
        self.matrix = self._make("MatrixLayout", taken, k, n, k)
        self.x = self._make("MatrixLayout", taken, k, m, k)
        self.out = self._make("MatrixLayout", given, n, m, n)
        preference = self._make("MatmulPreference")
        wanted = [(PREFERENCE_WORKSPACE, c_uint64(WORKSPACE)), (PREFERENCE_REDUCTION, c_uint32(REDUCTION_COMPUTE_TYPE))]
        wanted += [(which, c_uint32(size)) for which, size in zip(PREFERENCE_ALIGNMENTS, aligned, strict=True)]
        for which, value in wanted:
            library.call("cublasLtMatmulPreferenceSetAttribute", preference, which, byref(value), ctypes.sizeof(value))
        self._found, count = Heuristic(), c_int()
        search = handle, self.work, self.matrix, self.x, self.out, self.out, preference, 1
        library.call("cublasLtMatmulAlgoGetHeuristic", *search, byref(self._found), byref(count))
        if not count.value or self._found.state:
            self.close()
            raise EngineError(f"cuBLASLt has no algorithm for a product of {m} x {k} and {k} x {n}")
        self.algorithm = byref(self._found)

    def read_bias(self, address: int) -> None:
        """Where the bias lies."""
        if address != self._bias:
            self._tell(DESC_BIAS_POINTER, c_void_p(address))
            self._bias = address

    def close(self) -> None:
        """Give the descriptors back."""
        for kind, made in reversed(self._made):
            self._library.call(f"cublasLt{kind}Destroy", made)
        self._made.clear()

    def _make(self, kind: str, *arguments: int) -> c_void_p:
        made = c_void_p()
        self._library.call(f"cublasLt{kind}Create", byref(made), *arguments)
        self._made.append((kind, made))
        return made

    def _tell(self, attribute: int, value: Any) -> None:
        self._library.call("cublasLtMatmulDescSetAttribute", self.work, attribute, byref(value), ctypes.sizeof(value))


def _aligned(address: int) -> int:
    return min(address & -address, ALIGNED)


def find_library(driver_version: int) -> Any:
    """The cuBLASLt of the driver's CUDA version or an older one: what the process has loaded, what pip has installed,
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
        f"cuBLAS is not installed (no libcublasLt.so.{major}): pip install {package}, "
        "on a Jetson install JetPack's CUDA"
    )


def _places(major: int) -> Iterator[tuple[str, int]]:
    name = f"libcublasLt.so.{major}"
    yield name, os.RTLD_NOLOAD | os.RTLD_NOW
    for path in in_packages(name):
        yield path, ctypes.DEFAULT_MODE
    yield name, ctypes.DEFAULT_MODE


def _declared(library: Any) -> Any:
    made, any_of, scalar, number = [POINTER(c_void_p)], [c_void_p], [POINTER(c_float)], [c_int]
    told = [c_void_p, c_int, c_void_p, c_size_t]
    signatures = {
        "cublasLtCreate": made,
        "cublasLtDestroy": any_of,
        "cublasLtMatmulDescCreate": [*made, c_int, c_int],
        "cublasLtMatmulDescDestroy": any_of,
        "cublasLtMatmulDescSetAttribute": told,
        "cublasLtMatrixLayoutCreate": [*made, c_int, c_uint64, c_uint64, c_int64],
        "cublasLtMatrixLayoutDestroy": any_of,
        "cublasLtMatmulPreferenceCreate": made,
        "cublasLtMatmulPreferenceDestroy": any_of,
        "cublasLtMatmulPreferenceSetAttribute": told,
        "cublasLtMatmulAlgoGetHeuristic": [*any_of * 7, *number, POINTER(Heuristic), POINTER(c_int)],
        "cublasLtMatmul": [
            *(*any_of * 2, *scalar, *any_of * 4, *scalar, *any_of * 4),
            *(POINTER(Heuristic), c_void_p, c_size_t, c_void_p),
        ],
    }
    for name, arguments in signatures.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, c_int
    return library
