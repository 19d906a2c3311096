"""What this machine has and lacks for export and for answering."""

from __future__ import annotations

import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

DEVICE = ("numpy", "onnxruntime", "tokenizers", "av", "pillow", "pydantic", "rich", "jinja2")
EXPORT = ("torch", "transformers", "onnx", "onnxscript", "optimum", "safetensors")
GPU = ("onnxruntime-gpu", "cuda-bindings", "tensorrt")


def examine() -> dict[str, Any]:
    """Versions (null where absent), processors, memory, and what can be done with them."""
    packages = {name: _version(name) for name in (*DEVICE, *EXPORT, *GPU)}
    providers, telemetry = _onnxruntime()
    missing = [name for name in DEVICE if (not providers if name == "onnxruntime" else packages[name] is None)]
    return {
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "board": _read("/proc/device-tree/model"),
        "cpus": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "disk_free_bytes": shutil.disk_usage(".").free,
        "packages": packages,
        "onnxruntime_providers": providers,  # of onnxruntime or onnxruntime-gpu, which own the same files
        "onnxruntime_telemetry": telemetry,
        "can_run": not missing,
        "can_export": not missing and all(packages[name] for name in EXPORT),
        "missing": missing,
        "to_run": f"pip install --force-reinstall {' '.join(missing)}" if missing else None,
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _onnxruntime() -> tuple[list[str], str | None]:
    """Its providers, and whether it is quiet; none and None where it is absent."""
    try:
        from dycoke_edge.ort import SWITCH, TELEMETRY_OFF, onnxruntime
    except ImportError:
        return [], None
    sooner = f"not off: imported before dycoke_edge, so set {SWITCH}=1 in the environment"
    return list(onnxruntime.get_available_providers()), "off" if TELEMETRY_OFF else sooner


def _read(file: str) -> str | None:
    """A one-line file, e.g. the board name that a Jetson's device tree has."""
    try:
        return Path(file).read_text().strip("\x00\n ")
    except OSError:
        return None
