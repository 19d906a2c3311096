"""Checkpoints that come with the package, by name."""

from __future__ import annotations

from pathlib import Path

SHIPPED = {"tiny": Path(__file__).parent / "tiny"}


def named(model_dir: str | Path) -> Path:
    """The directory of a checkpoint: a shipped one by its name, unless a folder here has that name too."""
    path = Path(model_dir)
    return path if path.exists() else SHIPPED.get(str(model_dir), path)
