"""The models that benchmarks run on: made once under build/, re-used after."""

from __future__ import annotations

import os
from pathlib import Path

from benchmarks import random_model
from dycoke_edge.config import DType, ExportSpec
from dycoke_edge.export.build import export

BUILD = Path("build")


def prepare(
    shape: str,
    checkpoint: Path | None = None,
    bundle: Path | None = None,
    layers: int | None = None,
    dtype: DType = "fp32",
    build: Path = BUILD,
) -> tuple[Path, Path]:
    """A checkpoint directory and its bundle; whatever is not given is made. `layers` of the decoder, None: all."""
    name = shape if layers is None else f"{shape}-{layers}-layers"
    name = name if dtype == "fp32" else f"{name}-{dtype}"
    checkpoint = checkpoint or build / f"random-{name}"
    if not checkpoint.exists():
        partial = checkpoint.with_name(checkpoint.name + ".partial")
        random_model.make(shape, partial, layers=layers, dtype=dtype, processes=os.cpu_count() or 1)
        partial.rename(checkpoint)
    bundle = bundle or build / f"bundle-{name}"
    if not bundle.exists():
        export(checkpoint, bundle, ExportSpec(dtype=dtype))
    return checkpoint, bundle
