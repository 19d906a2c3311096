"""The CUDA driver through cuda-bindings, 12.x or 13.x, with its errors in our words."""

from __future__ import annotations

import importlib
from typing import Any

from dycoke_edge.errors import EngineError
from dycoke_edge.runtime.gpu.device import megabytes

INSTALL = "pip install 'dycoke-edge[gpu]'"
# After these a context does no more work, and nothing in the process can make another one that does.
LOST = {
    *("ASSERT", "CONTAINED", "CONTEXT_IS_DESTROYED", "DEINITIALIZED", "DEVICE_UNAVAILABLE", "ECC_UNCORRECTABLE"),
    *("EXTERNAL_DEVICE", "HARDWARE_STACK_ERROR", "ILLEGAL_ADDRESS", "ILLEGAL_INSTRUCTION", "INVALID_ADDRESS_SPACE"),
    *("INVALID_PC", "LAUNCH_FAILED", "LAUNCH_TIMEOUT", "MISALIGNED_ADDRESS", "MPS_CLIENT_TERMINATED"),
    *("NVLINK_UNCORRECTABLE", "TENSOR_MEMORY_LEAK", "UNKNOWN"),
}
NO_PTX = {
    "UNSUPPORTED_PTX_VERSION": "the GPU driver is older than CUDA 12.2: install a newer driver, on a Jetson JetPack 6",
    "NO_BINARY_FOR_GPU": "the GPU is older than compute capability 8.0 (Ampere): use --provider cpu",
    "INVALID_PTX": "the GPU is older than compute capability 8.0 (Ampere): use --provider cpu",
    "JIT_COMPILER_NOT_FOUND": "the GPU driver lacks libnvidia-ptxjitcompiler: install the driver again",
    "JIT_COMPILATION_DISABLED": "kernels cannot be compiled: unset CUDA_DISABLE_PTX_JIT",
}


class Driver:
    """Calls `cuda.bindings.driver` and turns a status that is not success into EngineError.

    When a call finds the context lost, that call and every later one raise the same error.
    """

    def __init__(self, module: Any = None) -> None:
        """Start the driver; EngineError if the package, the driver or the GPU is missing. Tests give a module."""
        self.module = module or _bindings()
        self.lost = ""  # why the context is lost, when it is
        self.version = _start(self.module)  # of CUDA, as the driver knows it: 12020 is 12.2

    def call(self, name: str, *arguments: object) -> Any:
        """What the function of the driver returns after its status: None, a value or a tuple."""
        if self.lost:
            raise EngineError(self.lost)
        status, *values = getattr(self.module, name)(*arguments)
        if status != 0:
            self.fail(name, status)
        return (values[0] if len(values) == 1 else tuple(values)) if values else None

    def fail(self, name: str, status: Any) -> None:
        """Raise the error of a status."""
        word = status.name.removeprefix("CUDA_ERROR_")
        if word in LOST:
            self.lost = (
                f"the GPU context is lost ({status.name} in {name}): start the process anew; "
                "if it happens again, nvidia-smi or dmesg may say why"
            )
            raise EngineError(self.lost)
        if word in NO_PTX:
            raise EngineError(f"{NO_PTX[word]} ({status.name})")
        if word == "OUT_OF_MEMORY":
            raise EngineError(
                f"GPU memory is out in {name}{self._memory()}; use a smaller --kv-capacity or --vision-batch, "
                "or end other programs on the GPU"
            )
        raise EngineError(f"{name} failed: {status.name}")

    def _memory(self) -> str:
        status, *values = self.module.cuMemGetInfo()
        return f": {megabytes(values[0])} of {megabytes(values[1])} are free" if status == 0 else ""


def _bindings() -> Any:
    try:
        return importlib.import_module("cuda.bindings.driver")
    except ImportError:
        raise EngineError(f"cuda-bindings is not installed: {INSTALL}") from None


def _start(module: Any) -> int:
    try:
        status = module.cuInit(0)[0]
    except RuntimeError:  # libcuda.so.1 is not there
        raise EngineError(
            "the NVIDIA driver is not installed (no libcuda.so.1): install it (nvidia-smi must work; in a container, "
            "docker run --gpus all), on a Jetson install JetPack"
        ) from None
    if status != 0:
        raise EngineError(_why_not(status.name))
    version = int(module.cuDriverGetVersion()[1])
    package, driver = int(module.CUDA_VERSION) // 1000, version // 1000
    if driver < package:
        raise EngineError(
            f"cuda-bindings is for CUDA {package}, the GPU driver for {driver}.{version % 1000 // 10}: "
            f"pip install 'cuda-bindings<{driver + 1}', or install a newer driver"
        )
    return version


def _why_not(status: str) -> str:
    if status == "CUDA_ERROR_NO_DEVICE":
        return "the NVIDIA driver finds no GPU: look at nvidia-smi and CUDA_VISIBLE_DEVICES"
    if status == "CUDA_ERROR_STUB_LIBRARY":
        return (
            "libcuda.so.1 is the stub of the CUDA toolkit, not a driver: take the stubs folder out of LD_LIBRARY_PATH"
        )
    return f"the NVIDIA driver does not start ({status}): look at nvidia-smi; after an update of the driver, boot again"
