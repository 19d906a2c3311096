"""Whether this machine has a GPU, and if not, why; and one that all tests share."""

from __future__ import annotations

from functools import cache

from dycoke_edge import EngineError
from dycoke_edge.runtime.gpu.device import Device


@cache
def no_gpu() -> str:
    """What is missing, in the words a user would read; "" where there is one."""
    try:
        from dycoke_edge.runtime.gpu.cuda import CudaDevice

        CudaDevice().close()
    except (EngineError, ImportError) as error:
        return str(error)
    return ""


@cache
def no_cuda_graphs() -> str:
    """The same of graphs with `--provider cuda`, which need onnxruntime-gpu too."""
    from dycoke_edge.runtime.ort_cuda import check_onnxruntime

    if not no_gpu():
        try:
            check_onnxruntime()
        except EngineError as error:
            return str(error)
    return no_gpu()


@cache
def real_device() -> Device:
    """The first GPU, opened once: a context that everybody closes compiles the kernels for everybody anew."""
    from dycoke_edge.runtime.gpu.cuda import CudaDevice

    return CudaDevice()
