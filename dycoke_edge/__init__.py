"""dycoke-edge: video language models on the device, with DyCoke token compression."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from dycoke_edge.config import Clip, Compression, EngineSpec, LiveSpec, Sampling
from dycoke_edge.errors import (
    BundleError,
    DycokeEdgeError,
    EngineError,
    InputError,
    KVOverflow,
    UsageError,
)

if TYPE_CHECKING:
    from dycoke_edge.runtime.pipeline import LiveVideo, Reply, VideoLLM

try:
    __version__ = version("dycoke-edge")
except PackageNotFoundError:  # a checkout that was not installed
    __version__ = "0+checkout"

__all__ = [
    "BundleError",
    "Clip",
    "Compression",
    "DycokeEdgeError",
    "EngineError",
    "EngineSpec",
    "InputError",
    "KVOverflow",
    "LiveSpec",
    "LiveVideo",
    "Reply",
    "Sampling",
    "UsageError",
    "VideoLLM",
    "__version__",
]


def __getattr__(name: str) -> Any:
    """Load the runtime when it is first asked for: `import dycoke_edge` alone stays quick."""
    if name in ("LiveVideo", "Reply", "VideoLLM"):
        from dycoke_edge.runtime import pipeline

        return getattr(pipeline, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
