"""The gate that every graph passes before it is kept: how far an output may be from its reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dycoke_edge.config import DType

TOLERANCE: dict[DType, float] = {"fp32": 1e-4, "fp16": 2e-2}  # relative; measured 2e-6 (0.5B shape) and 1e-3 (tiny)
CACHED, NEW = 24, 5  # rows of the decoder check: S and T
Array = NDArray[Any]


@dataclass(frozen=True)
class Parity:
    """How far one output is off: max |a-b|, that over max |b|, and how often the last axis' argmax agrees."""

    graph: str
    output: str
    max_abs: float
    relative: float
    argmax: float
    tolerance: float

    @property
    def ok(self) -> bool:
        """Within tolerance; NaN is not."""
        return self.relative <= self.tolerance

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "ok": self.ok}


def compare(graph: str, output: str, got: Array, want: Array, tolerance: float) -> Parity:
    """Measure one output against its reference."""
    a, b = got.astype(np.float64), want.astype(np.float64)
    assert a.shape == b.shape, (graph, output, a.shape, b.shape)
    error = float(np.abs(a - b).max(initial=0.0))
    scale = float(np.abs(b).max(initial=0.0)) or 1.0
    agree = float((a.argmax(-1) == b.argmax(-1)).mean()) if a.size else 1.0
    return Parity(graph, output, error, error / scale, agree, tolerance)


def worst_of(results: Sequence[Parity]) -> Parity | None:
    """The output that is furthest off of those out of tolerance, None if all are within."""
    bad = [result for result in results if not result.ok]
    return max(bad, key=lambda result: np.nan_to_num(result.relative, nan=np.inf)) if bad else None


def run_on_cpu(path: Path, feeds: dict[str, Array], dtype: DType) -> list[Array]:
    """Run a graph with ONNX Runtime on the CPU in little memory; its outputs in the contract's order."""
    from dycoke_edge.ort import onnxruntime  # late: the command line loads no engine before it is used

    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.disable_prepacking", "1")  # keeps weights mapped: 7B fits
    options.enable_cpu_mem_arena = False
    if dtype == "fp16":  # computed in fp32: cast each weight when it is used, not all at once
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    outputs: list[Array] = session.run(None, feeds)
    return outputs
