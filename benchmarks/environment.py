"""Where a figure was measured: printed beside every figure.

python -m benchmarks.environment      the stamp, and the memory bandwidth that decoding is limited by

BENCHMARK_COMMIT says which commit is measured where it is a copy of the tree that does not know.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from dycoke_edge.runtime.board import field, status_bytes
from dycoke_edge.runtime.traffic import read_bandwidth

__all__ = ["stamp", "status_bytes"]

PACKAGES = ("dycoke-edge", "numpy", "onnxruntime", "onnxruntime-gpu", "cuda-bindings", "torch", "transformers")


def stamp() -> dict[str, Any]:
    """Command, commit, processor, versions, load."""
    return {
        "command": " ".join(map(_name, sys.argv)),
        "commit": _commit(),
        "cpu": field(Path("/proc/cpuinfo"), "model name"),
        "python": platform.python_version(),
        "load_average": Path("/proc/loadavg").read_text().split()[:3],
        **{name: _version(name) for name in PACKAGES},
    }


def _name(word: str) -> str:
    """Of an absolute path its last part: where things lie on a machine is nobody else's business."""
    return Path(word).name if word.startswith("/") else word


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _commit() -> str:
    if told := os.environ.get("BENCHMARK_COMMIT"):
        return told
    try:
        result = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    except FileNotFoundError:  # a copy of the tree on a machine without git
        return "unknown"
    return result.stdout.strip() or "unknown"


if __name__ == "__main__":
    print(json.dumps(stamp() | {"read_gb_per_s": round(read_bandwidth() / 1e9, 1)}))
