"""The models that benchmarks run on: made once under build/, re-used after."""

from __future__ import annotations

from pathlib import Path

from benchmarks import random_model
from dycoke_edge.config import ExportSpec
from dycoke_edge.export.build import export

BUILD = Path("build")


def prepare(
    shape: str, checkpoint: Path | None = None, bundle: Path | None = None, layers: int | None = None
) -> tuple[Path, Path]:
    """A checkpoint directory and its fp32 bundle; whatever is not given is made. `layers` of the decoder, None: all."""
    name = shape if layers is None else f"{shape}-{layers}-layers"
    checkpoint = checkpoint or BUILD / f"random-{name}"
    if not checkpoint.exists():
        partial = checkpoint.with_name(checkpoint.name + ".partial")
        random_model.make(shape, partial, layers=layers)
        partial.rename(checkpoint)
    bundle = bundle or BUILD / f"bundle-{name}"
    if not bundle.exists():
        export(checkpoint, bundle, ExportSpec())
    return checkpoint, bundle
