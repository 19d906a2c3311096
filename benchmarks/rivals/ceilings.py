"""What the machine can do at most: bytes a second of a large copy, operations a second of a large matrix product.

    python -m benchmarks.rivals.ceilings cuda      one JSON line

Random values: zeros are multiplied faster. On a GPU the clock is CUDA events.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from time import perf_counter
from typing import Any

import torch

TIMES = 12
SIZES = {"cuda": (2**31, 8192), "cpu": (2**28, 512)}  # bytes copied; side of the matrices


def measure(device: str, half: bool = True) -> dict[str, float]:
    """`copy` in bytes read and written a second, `matmul` in operations a second."""
    nbytes, side = SIZES[device]
    dtype = torch.float16 if half and device == "cuda" else torch.float32
    source, target = torch.randn(nbytes // 4, device=device), torch.empty(nbytes // 4, device=device)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty(side, side, device=device, dtype=dtype)
    copied = median_seconds(lambda: target.copy_(source), device)
    multiplied = median_seconds(lambda: torch.matmul(a, b, out=out), device)
    return {"copy_bytes_per_s": 2 * nbytes / copied, "matmul_flop_per_s": 2 * side**3 / multiplied}


def median_seconds(work: Callable[[], object], device: str) -> float:
    """Median of TIMES runs after two that warm up."""
    seconds = []
    for number in range(TIMES + 2):
        found = on_gpu(work) if device == "cuda" else on_cpu(work)
        if number >= 2:
            seconds.append(found)
    return statistics.median(seconds)


def on_gpu(work: Callable[[], object]) -> float:
    """Seconds between two CUDA events around it."""
    event: Any = torch.cuda.Event
    begin, end = (event(enable_timing=True) for _ in range(2))
    begin.record()
    work()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def on_cpu(work: Callable[[], object]) -> float:
    """Seconds by the host's clock."""
    began = perf_counter()
    work()
    return perf_counter() - began


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1])))
