"""What memory and disk a build and a run need, and whether this machine has it.

A plan's own sizes are known once it is built; before that these are estimates, on the low side: what is refused would
not have worked. On a Jetson CPU and GPU share one memory, so both needs count against it.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dycoke_edge.bundle import Bundle
from dycoke_edge.config import BuildSpec
from dycoke_edge.contract import ModelSpec
from dycoke_edge.errors import EngineError
from dycoke_edge.runtime.board import read_board
from dycoke_edge.runtime.gpu.device import Device
from dycoke_edge.runtime.trt.plan import DECODER

MIB = 2**20
# Read in a log of TensorRT 8.6.1 (NVIDIA/TensorRT issue 3357): the builder's kernels take 1,444 MiB of the host and
# 268 MiB of the GPU, CUDA 271 MiB of the GPU
BUILDER_HOST, BUILDER_GPU, CUDA_GPU = 1444 * MIB, 268 * MIB, 271 * MIB
COPIES = 2  # of the weights: those read and those arranged for kernels; the plan on its way to disk comes after
VISION_HEADS = 16  # SigLIP so400m's, where config.json does not say


@dataclass(frozen=True)
class Need:
    """Bytes."""

    host: int
    gpu: int
    disk: int


@dataclass(frozen=True)
class Have:
    """Bytes that are free; None where there is no telling. `shared`: CPU and GPU have one memory."""

    host: int | None
    gpu: int | None
    disk: int
    shared: bool


def to_build(bundle: Bundle, spec: BuildSpec, graphs: list[str]) -> Need:
    """One graph after the other is built, so the largest counts; on disk all of them."""
    weights = {graph: _weights(bundle, graph) for graph in graphs}
    most = max(weights.values(), default=0)
    scratch = max((_scratch(bundle, spec, graph) for graph in graphs), default=0)
    return Need(
        host=BUILDER_HOST + COPIES * most,
        gpu=CUDA_GPU + BUILDER_GPU + COPIES * most + scratch,
        disk=sum(weights.values()) + MIB * len(graphs),
    )


def to_run(bundle: Bundle, spec: BuildSpec, graphs: list[str]) -> Need:
    """Vision, merge and the decoder in the GPU's memory at once, and a full KV buffer."""
    weights = sum(_weights(bundle, graph) for graph in {*graphs, "vision", *DECODER})
    scratch = max((_scratch(bundle, spec, graph) for graph in graphs), default=0)
    kv = spec.kv_capacity * bundle.model.kv_bytes_per_token
    return Need(host=0, gpu=CUDA_GPU + weights + scratch + kv, disk=0)


def available(path: Path, device: Device | None) -> Have:
    """What is free here, for a bundle at `path`."""
    board = read_board()
    return Have(
        host=board.memory_available_bytes,
        gpu=device.free_bytes if device else None,
        disk=shutil.disk_usage(path).free,
        shared=board.soc is not None,
    )


def lacking(need: Need, have: Have) -> str | None:
    """What does not fit, in words."""
    if need.disk > have.disk:
        return f"{_mib(need.disk)} of disk are needed, {_mib(have.disk)} are free; free some space"
    if have.shared and have.host is not None and need.host + need.gpu > have.host:
        return (
            f"{_mib(need.host + need.gpu)} of memory are needed, CPU and GPU together, {_mib(have.host)} are free; end "
            "other programs, add swap or use a smaller --vision-batch or --kv-capacity"
        )
    if have.host is not None and need.host > have.host:
        return f"{_mib(need.host)} of memory are needed, {_mib(have.host)} are free; end other programs or add swap"
    if have.gpu is not None and need.gpu > have.gpu:
        return (
            f"{_mib(need.gpu)} of GPU memory are needed, {_mib(have.gpu)} are free; end other programs on the GPU or "
            "use a smaller --vision-batch or --kv-capacity"
        )
    return None


def check(need: Need, have: Have) -> None:
    """EngineError for a build that does not fit."""
    reason = lacking(need, have)
    if reason:
        raise EngineError(f"the build does not fit: {reason}")


def as_dict(build: Need, run: Need, have: Have) -> dict[str, Any]:
    """For `--dry-run`; whether it fits is None where there is no GPU to ask."""

    def named(bytes_of: dict[str, Any]) -> dict[str, Any]:
        return {f"{key}_bytes": value for key, value in bytes_of.items() if key != "shared"}

    build_lacks, run_lacks = lacking(build, have), lacking(run, have)
    return {
        "build_needs": named(asdict(build)),
        "run_needs": {"gpu_bytes": run.gpu},
        "free": named(asdict(have)) | {"shared": have.shared},
        "build_fits": None if have.gpu is None and build_lacks is None else build_lacks is None,
        "run_fits": None if have.gpu is None else run_lacks is None,
        "why_not": build_lacks or run_lacks,
    }


def _weights(bundle: Bundle, graph: str) -> int:
    """Bytes of a graph's weights; merge has none."""
    entry = bundle.manifest.files.get(f"onnx/{graph}.onnx.data")
    return entry.size if entry else 0


def _scratch(bundle: Bundle, spec: BuildSpec, graph: str) -> int:
    """The largest of what a graph holds between layers: attention scores and probabilities, both fp32."""
    model = bundle.model
    if graph in DECODER:
        return 2 * 4 * model.num_heads * spec.prefill_chunk * min(spec.kv_capacity, spec.usual_rows)
    if graph == "vision":
        heads, patches = _vision(bundle.path, model)
        return 2 * 4 * spec.vision_batch * heads * patches * patches
    return 0


def _vision(path: Path, model: ModelSpec) -> tuple[int, int]:
    """Heads and patches a frame of the tower."""
    try:
        config = json.loads((path / "config.json").read_text())["vision_config"]
        return int(config["num_attention_heads"]), (int(config["image_size"]) // int(config["patch_size"])) ** 2
    except (OSError, ValueError, KeyError, TypeError):
        return VISION_HEADS, 4 * model.tokens_per_frame


def _mib(nbytes: int) -> str:
    return f"{nbytes / MIB:,.0f} MiB"
