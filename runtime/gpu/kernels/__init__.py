"""The CUDA sources, and the PTX text that is made from them and shipped: `kernels.ptx`.

Sources speak the dialect of `dialect.cuh`, which NVRTC, nvcc and g++ understand. Knows nothing of Python's side.
"""

from __future__ import annotations

import numpy as np

BLOCK = 256  # threads, where a kernel does not say otherwise
VECTOR = 16  # bytes that a thread loads at a time


def suffix(dtype: np.dtype[np.generic] | type[np.generic]) -> str:
    """How the kernels for an element type are called."""
    return "f16" if np.dtype(dtype) == np.float16 else "f32"


def warps(count: int) -> int:
    """Blocks for so many warps."""
    return -(-count // (BLOCK // 32))
