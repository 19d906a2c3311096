"""Which GPU engines this machine can run, and why not the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dycoke_edge.errors import EngineError
from dycoke_edge.runtime import ort_cuda
from dycoke_edge.runtime.trt import versions


def gpu_facts() -> dict[str, Any]:
    """The GPU, and for each provider whether it can run here and all that it lacks. Nothing stays open."""
    name, no_gpu = _gpu()
    no_graphs = [*no_gpu, *_lacks(ort_cuda.check_onnxruntime)]
    no_tensorrt = [*no_gpu, *_lacks(versions.load)]
    return {
        "gpu": name,
        "can_run_cuda": not no_gpu,
        "why_not_cuda": "; ".join(no_gpu) or None,
        "can_run_cuda_graphs": not no_graphs,  # --vision graph, --decoder graphs
        "why_not_cuda_graphs": "; ".join(no_graphs) or None,
        "can_run_tensorrt": not no_tensorrt,
        "why_not_tensorrt": "; ".join(no_tensorrt) or None,
    }


def _gpu() -> tuple[str | None, list[str]]:
    """The GPU's name, or why there is none."""
    try:
        device = ort_cuda.open_device()
    except EngineError as error:
        return None, [str(error)]
    name = device.name
    device.close()
    return name, []


def _lacks(check: Callable[[], object]) -> list[str]:
    try:
        check()
    except EngineError as error:
        return [str(error)]
    return []
