"""The models that benchmarks run on: made once under build/, re-used after."""

from __future__ import annotations

from pathlib import Path

from benchmarks import random_model
from dycoke_edge.config import ExportSpec
from dycoke_edge.export.build import export

BUILD = Path("build")


def prepare(shape: str, checkpoint: Path | None = None, bundle: Path | None = None) -> tuple[Path, Path]:
    """A checkpoint directory and its fp32 bundle; whatever is not given is made."""
    checkpoint = checkpoint or BUILD / f"random-{shape}"
    if not checkpoint.exists():
        partial = checkpoint.with_name(checkpoint.name + ".partial")
        random_model.make(shape, partial)
        partial.rename(checkpoint)
    bundle = bundle or BUILD / f"bundle-{shape}"
    if not bundle.exists():
        export(checkpoint, bundle, ExportSpec())
    return checkpoint, bundle
