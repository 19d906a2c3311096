"""Where a figure was measured: printed beside every figure.

python -m benchmarks.environment      the stamp, and the memory bandwidth that decoding is limited by
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from time import perf_counter
from typing import Any

PACKAGES = ("dycoke-edge", "numpy", "onnxruntime", "torch", "transformers")


def stamp() -> dict[str, Any]:
    """Command, commit, processor, versions, load."""
    return {
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "commit": _commit(),
        "cpu": _field("/proc/cpuinfo", "model name"),
        "python": platform.python_version(),
        "load_average": Path("/proc/loadavg").read_text().split()[:3],
        **{name: _version(name) for name in PACKAGES},
    }


def read_bandwidth(threads: int = 2, gigabytes: float = 1.0) -> float:
    """GB/s at which a large matrix is read by a product with a vector, which is what limits decoding. Best of 8."""
    import torch

    torch.set_num_threads(threads)
    matrix = torch.ones(int(gigabytes * 1e9 / 4 / 1024), 1024)
    vector, best = torch.ones(1024), float("inf")
    for _ in range(8):
        began = perf_counter()
        torch.mv(matrix, vector)
        best = min(best, perf_counter() - began)
    return matrix.numel() * 4 / best / 1e9


def status_bytes(key: str) -> int:
    """A memory figure of this process, e.g. VmHWM (peak resident) or RssAnon, in bytes."""
    return int((_field("/proc/self/status", key) or "0 kB").split()[0]) * 1024


def _field(file: str, key: str) -> str | None:
    for line in Path(file).read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return None


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _commit() -> str:
    result = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return result.stdout.strip() or "unknown"


if __name__ == "__main__":
    print(json.dumps(stamp() | {"read_gb_per_s": round(read_bandwidth(), 1)}))
