"""Where a figure was measured: printed beside every figure."""

from __future__ import annotations

import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
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
