"""Whether this machine has a GPU, and if not, why."""

from __future__ import annotations

from functools import cache

from dycoke_edge import EngineError


@cache
def no_gpu() -> str:
    """What is missing, in the words a user would read; "" where there is one."""
    try:
        from dycoke_edge.runtime.gpu.cuda import CudaDevice

        CudaDevice().close()
    except (EngineError, ImportError) as error:
        return str(error)
    return ""
