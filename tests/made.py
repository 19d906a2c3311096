"""Checkpoints and bundles that many tests read and none changes: made once, kept under a hash of their sources."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import time

ROOT = Path(__file__).parents[1]
SOURCES = ("export/**/*", "dycoke_edge/*.py", "benchmarks/random_*.py", "tests/lively.py")
KEPT_S = 24 * 3600.0  # another run may be reading them
LIBRARIES = ("numpy", "onnx", "optimum", "torch", "transformers")


def fingerprint() -> str:
    """A hash of all that a checkpoint or bundle is made from."""
    digest = hashlib.sha256()
    for pattern in SOURCES:
        for file in sorted(ROOT.glob(pattern)):
            if file.is_file() and file.suffix != ".pyc":
                digest.update(f"{file.relative_to(ROOT)} {hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    for name in LIBRARIES:
        digest.update(f"{name} {importlib.metadata.version(name)}\n".encode())
    return digest.hexdigest()[:16]


class Made:
    """A folder of things made from today's sources. What was made from others is removed a day later."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / fingerprint()
        with _locked(folder):
            for old in folder.iterdir():
                if old.is_dir() and old != self._folder and time() - old.stat().st_mtime > KEPT_S:
                    shutil.rmtree(old, ignore_errors=True)
            self._folder.mkdir(exist_ok=True)

    def once(self, name: str, make: Callable[[Path], object]) -> Path:
        """The path of what `make` writes there, called unless it is there already. Other processes wait meanwhile."""
        path = self._folder / name
        with _locked(self._folder):
            if not path.exists():
                half = path.with_name(f".{path.name}")
                shutil.rmtree(half, ignore_errors=True)
                half.parent.mkdir(parents=True, exist_ok=True)
                make(half)
                half.rename(path)
        return path


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    with (folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
