"""What a bundle holds and the memory that it needs for a clip, computed from the manifest alone."""

from __future__ import annotations

from typing import Any

import numpy as np

from dycoke_edge import contract
from dycoke_edge.bundle import VISION_WEIGHTS, Bundle
from dycoke_edge.config import SCRATCH_ROWS, Compression, EngineSpec
from dycoke_edge.dycoke import count_kept

TEXT_ROWS = 256  # rows counted for a prompt and its answer
PROCESS = 110 * 2**20  # Python 3.11, numpy and onnxruntime 1.32 before a model is opened


def describe(bundle: Bundle, num_frames: int, compression: Compression, kv_capacity: int) -> dict[str, Any]:
    """Facts of a bundle: dimensions, sizes in bytes, rows and bytes for `num_frames` frames."""
    manifest, model = bundle.manifest, bundle.model
    visual_rows = count_kept(num_frames, model.tokens_per_frame, compression)
    rows = visual_rows + TEXT_ROWS
    return {
        "bundle": str(bundle.path),
        "made_by": manifest.made_by,
        "family": manifest.family,
        "task": manifest.task,
        "random_weights": manifest.random_seed is not None,
        **model.model_dump(),
        "merge_ratios": list(manifest.merge_ratios),
        "vision_graphs": _vision_graphs(bundle),
        "bytes_on_disk": sum(entry.size for entry in manifest.files.values()),
        "kv_bytes_per_token": model.kv_bytes_per_token,
        "kv_bytes_at_capacity": kv_capacity * model.kv_bytes_per_token,
        "mode": compression.mode,
        "budget": compression.budget,
        "merge_ratio": compression.merge_ratio,
        "frames": num_frames,
        "visual_tokens_in": num_frames * model.tokens_per_frame,
        "visual_tokens_kept": visual_rows,
        "kv_rows_needed": rows,
        "kv_rows_fit": rows <= kv_capacity,
        "memory_needed": _needed(bundle, num_frames, rows),
    }


def _vision_graphs(bundle: Bundle) -> dict[str, str | None]:
    """The file that each provider runs, and the one that own kernels read; None where it has to be exported again."""
    files = {"cpu": "onnx/vision.onnx"} | {p: f"onnx/{form}.onnx" for (_, p), form in contract.FORMS.items()}
    files["kernels"] = VISION_WEIGHTS
    return {provider: file if file in bundle.manifest.files else None for provider, file in files.items()}


def _needed(bundle: Bundle, num_frames: int, rows: int) -> dict[str, int]:
    """Bytes by part. Vision and decoder are not held at the same time unless `resident` is set."""
    model, chunk = bundle.model, EngineSpec().tokens_at_a_time
    element = np.dtype(model.numpy_dtype).itemsize
    parts = {
        "vision_weights": _weights(bundle, "vision"),
        "decoder_weights": _weights(bundle, "decoder_shallow") + _weights(bundle, "decoder_deep"),
        "visual_tokens": num_frames * model.tokens_per_frame * model.hidden_size * element,
        "kv": rows * model.kv_bytes_per_token,
        # scores, their sum with the mask, probabilities and one slice of them, fp32 [H, chunk, rows] each, and as
        # much again, for onnxruntime's arena grows by doubling (within 2 % of what benchmarks/growth.py measured)
        "prefill_scratch": 2 * 4 * model.num_heads * min(chunk, rows) * min(rows + chunk, SCRATCH_ROWS) * 4,
        "process": PROCESS,
    }
    answering = parts["decoder_weights"] + parts["kv"] + parts["prefill_scratch"]
    return parts | {"peak": PROCESS + parts["visual_tokens"] + max(parts["vision_weights"], answering)}


def _weights(bundle: Bundle, graph: str) -> int:
    entry = bundle.manifest.files.get(f"onnx/{graph}.onnx.data")
    return entry.size if entry else 0
