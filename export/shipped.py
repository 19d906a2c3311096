"""Checkpoints that come with the package, by name."""

from __future__ import annotations

import re
from pathlib import Path

from dycoke_edge.errors import InputError

SHIPPED = {"tiny": Path(__file__).parent / "tiny"}


def named(model_dir: str | Path) -> Path:
    """The directory of a checkpoint: a shipped one by its name, unless a folder here has that name too."""
    path = Path(model_dir)
    return path if path.exists() else SHIPPED.get(str(model_dir), path)


def check_there(path: Path) -> None:
    """InputError unless there is a checkpoint's folder, with how to fetch it where its name may be one of the hub."""
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise InputError(f"{path} has no config.json; give a Hugging Face model directory")
        return
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", str(path)) and not path.parent.exists():
        raise InputError(
            f"no model folder at {path}; fetch it with: hf download {path} --local-dir {path.name}, "
            f"then: dycoke-edge export {path.name} BUNDLE"
        )
    raise InputError(f"no model folder at {path}; fetch one with: hf download MODEL --local-dir {path}")
