"""How the kernels of kernels/flash.cuh are launched: attention of many tokens at a time."""

from __future__ import annotations

from typing import Any

import numpy as np

FLASH_BLOCK = 128
FRAMES_DIMS = (32, 48, 64, 72, 128)  # that attend_frames is compiled for in fp16; smaller ones run in the next larger


def queries(dtype: np.dtype[Any], dim: int) -> int:
    """Tokens that a block of FLASH_BLOCK threads takes."""
    if dtype == np.float32:
        return 4
    return 128 if dim <= 80 else 64


def frames_dim(dtype: np.dtype[Any], dim: int) -> int:
    """The head size of the kernel that serves `dim`."""
    sizes = FRAMES_DIMS[-1:] if dtype == np.float32 else FRAMES_DIMS
    return next(size for size in sizes if size >= dim)
