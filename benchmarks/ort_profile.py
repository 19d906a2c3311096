"""Where a graph's time goes under ONNX Runtime: by operator as it profiles itself, by kernel as torch sees them."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.rivals import kernels
from dycoke_edge.ort import onnxruntime
from dycoke_edge.runtime.engine import OrtCpuEngine
from dycoke_edge.runtime.ort_cuda import OrtCudaEngine


def by_operator(engine: OrtCpuEngine, graph: str, once: Callable[[], None]) -> tuple[str, dict[str, float]]:
    """Milliseconds of a run by operator, longest first, and whose clock that is: the GPU's where this build traces
    kernels, else that of the host, which launches them. `once` runs the graph on the engine and waits."""
    opened, providers = engine._open, ["CPUExecutionProvider"]

    def profiled(graph: str, path: Path) -> Any:
        options = opened(graph, path).get_session_options()
        options.enable_profiling, options.profile_file_prefix = True, f"{folder}/{graph}"
        chosen: Any = engine._providers() if isinstance(engine, OrtCudaEngine) else providers
        return onnxruntime.InferenceSession(str(path), options, providers=chosen)

    with tempfile.TemporaryDirectory() as folder:
        engine.unload(graph)
        engine._open = profiled  # type: ignore[method-assign]
        try:
            once()
            once()
            return summary(json.loads(Path(engine._sessions[graph].end_profiling()).read_text()))
        finally:
            engine._open = opened  # type: ignore[method-assign]
            engine.unload(graph)


def summary(events: list[dict[str, Any]]) -> tuple[str, dict[str, float]]:
    """Of a profile's events of two equal runs: milliseconds by operator of the second half, and whose clock it is."""
    on_gpu = [event for event in events if event.get("cat") == "Kernel"]
    nodes = [e for e in events if e.get("cat") == "Node" and str(e.get("name")).endswith("_kernel_time")]
    spent = Counter[str]()
    wanted = sorted(on_gpu or nodes, key=lambda event: float(event["ts"]))
    for event in wanted[len(wanted) // 2 :]:
        spent[str(event.get("args", {}).get("op_name", "other"))] += event["dur"]
    return "GPU" if on_gpu else "host", {name: us / 1e3 for name, us in spent.most_common()}


def by_kernel(once: Callable[[], None]) -> dict[str, Any]:
    """Milliseconds by kernel: torch's profiler sees those of the whole process."""
    return kernels.stage(*kernels.recorded(once), 1)
