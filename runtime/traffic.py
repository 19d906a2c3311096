"""Bytes that a computation has to move, and how many a second the memory can: the floor under every latency."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from dycoke_edge.bundle import Bundle
from dycoke_edge.runtime.engine import AnyArray, Engine

READ_BYTES = 2**28  # more than any cache of the devices this is for
PASSES = 8


class CountedEngine:
    """An engine that counts the least that its graphs have to move: their weights, and every tensor bound, once a run.

    Weights count as they are in the file. Whatever else the engine offers is passed through.
    """

    def __init__(self, engine: Engine, bundle: Bundle) -> None:
        self.engine, self.provider = engine, engine.provider
        self._weights: Counter[str] = Counter()
        for name, entry in bundle.manifest.files.items():
            if name.endswith((".onnx", ".onnx.data")):
                self._weights[Path(name).name.split(".")[0]] += entry.size
        self._moved = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def load(self, graph: str) -> None:
        """As the engine."""
        self.engine.load(graph)

    def unload(self, graph: str) -> None:
        """As the engine."""
        self.engine.unload(graph)

    def empty(self, shape: tuple[int, ...], dtype: DTypeLike) -> AnyArray:
        """As the engine."""
        return self.engine.empty(shape, dtype)

    def synchronize(self) -> None:
        """As the engine."""
        self.engine.synchronize()

    def run(self, graph: str, inputs: Mapping[str, AnyArray], outputs: Mapping[str, AnyArray]) -> None:
        """As the engine."""
        self.engine.run(graph, inputs, outputs)
        self._moved += self._weights[graph] + _nbytes(inputs) + _nbytes(outputs)

    def take(self) -> int:
        """Bytes since the last call."""
        moved, self._moved = self._moved, 0
        return moved


def _nbytes(arrays: Mapping[str, AnyArray]) -> int:
    return sum(array.nbytes for array in arrays.values())


def read_bandwidth() -> float:
    """Bytes a second at which all of this process' cores together read memory: the best of a few short passes."""
    cores = len(os.sched_getaffinity(0))
    parts = np.array_split(np.ones(READ_BYTES // 4, np.float32), cores)  # written, so that every page is there
    best = float("inf")
    with ThreadPoolExecutor(cores) as pool:
        for _ in range(PASSES):
            began = perf_counter()
            list(pool.map(np.dot, parts, parts))
            best = min(best, perf_counter() - began)
    return READ_BYTES / best
