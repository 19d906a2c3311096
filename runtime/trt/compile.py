"""One graph into a plan. Runs in a process of its own (`worker`): it takes gigabytes, may be killed, and may crash."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from dycoke_edge.errors import EngineError
from dycoke_edge.runtime.trt.profiles import Profile
from dycoke_edge.runtime.trt.versions import Versions

Progress = Callable[[str, float], None]  # what is done now, share of this graph
PARSED = 0.05  # of the time; the rest is the builder's


class Job(BaseModel):
    """What one build takes. `plan` and `timing_cache` are files to write; the cache is read too if it is there."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    graph: str
    onnx: Path
    plan: Path
    timing_cache: Path
    half: bool
    profiles: list[Profile]
    workspace: int | None  # MiB
    level: int


class Made(BaseModel):
    """What a build says of its plan."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    fp32_layers: int
    seconds: float
    warnings: list[str]


def compile_graph(trt: Versions, job: Job, progress: Progress) -> Made:
    """Build and write a plan, synced to disk; EngineError if TensorRT refuses."""
    began = time.monotonic()
    trt.journal.clear()
    progress("starting TensorRT", 0.0)
    builder = trt.builder()
    network = trt.network(builder)
    progress("parsing", 0.01)
    _parse(trt, network, job)
    config = builder.create_builder_config()
    kept = trt.set_precision(network, config, job.half)
    _configure(trt, builder, config, job)
    cache = _attach_cache(trt, config, job.timing_cache)
    trt.watch(config, lambda share: progress("building", PARSED + (1 - PARSED) * share))
    progress("building", PARSED)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise _failed(trt, f"cannot build {job.graph}")
    _write(job.plan, plan)
    if cache is not None:
        _write(job.timing_cache, config.get_timing_cache().serialize())
    progress("built", 1.0)
    return Made(fp32_layers=kept, seconds=time.monotonic() - began, warnings=trt.journal.warnings[-20:])


def _parse(trt: Versions, network: Any, job: Job) -> None:
    parser = trt.module.OnnxParser(network, trt.logger)
    if parser.parse_from_file(str(job.onnx)):  # by path: the weights lie beside it
        return
    said = trt.parser_errors(parser) or trt.journal.errors or ["it gives no reason"]
    raise EngineError(f"TensorRT {trt.version} cannot read {job.onnx}: {' '.join(said[0].split())[:300]}; export again")


def _configure(trt: Versions, builder: Any, config: Any, job: Job) -> None:
    trt.leave_out_cudnn(config)
    config.builder_optimization_level = job.level
    if job.workspace is not None:
        config.set_memory_pool_limit(trt.module.MemoryPoolType.WORKSPACE, job.workspace << 20)
    for shapes in job.profiles:
        profile = builder.create_optimization_profile()
        for name, (low, usual, high) in shapes.items():
            profile.set_shape(name, low, usual, high)
        if config.add_optimization_profile(profile) < 0:
            raise _failed(trt, f"does not take the shapes of {job.graph}")


def _attach_cache(trt: Versions, config: Any, file: Path) -> Any:
    """Timings of an earlier build on this GPU with this TensorRT; what does not fit is left, and new ones taken."""
    cache = config.create_timing_cache(file.read_bytes() if file.is_file() else b"")
    if cache is None or not config.set_timing_cache(cache, False):
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, False)
        trt.journal.clear()  # it calls the old one an error
    return cache


def _failed(trt: Versions, what: str) -> EngineError:
    return EngineError(trt.journal.explain(f"TensorRT {trt.version} {what}", "--provider cuda runs without it"))


def _write(file: Path, content: Any) -> None:
    with file.open("wb") as out:
        out.write(memoryview(content))
        out.flush()
        os.fsync(out.fileno())
