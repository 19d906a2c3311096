"""dycoke-edge: video language models on the device, with DyCoke token compression."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from dycoke_edge.config import Clip, Compression, EngineSpec, LiveSpec, Sampling
from dycoke_edge.config_camera import Camera, Rule
from dycoke_edge.errors import (
    BundleError,
    BusyError,
    DycokeEdgeError,
    EngineError,
    InputError,
    KVOverflow,
    ReplacedError,
    StaleError,
    UsageError,
)

if TYPE_CHECKING:
    from dycoke_edge.runtime.camera.answers import Answer, WatchResult
    from dycoke_edge.runtime.camera.events import Event
    from dycoke_edge.runtime.camera.watcher import CameraWatcher
    from dycoke_edge.runtime.conversation import Message
    from dycoke_edge.runtime.pipeline import LiveVideo, Reply, VideoLLM

try:
    __version__ = version("dycoke-edge")
except PackageNotFoundError:  # a checkout that was not installed
    __version__ = "0+checkout"

__all__ = [
    "Answer",
    "BundleError",
    "BusyError",
    "Camera",
    "CameraWatcher",
    "Clip",
    "Compression",
    "DycokeEdgeError",
    "EngineError",
    "EngineSpec",
    "Event",
    "InputError",
    "KVOverflow",
    "LiveSpec",
    "LiveVideo",
    "Message",
    "ReplacedError",
    "Reply",
    "Rule",
    "Sampling",
    "StaleError",
    "UsageError",
    "VideoLLM",
    "WatchResult",
    "__version__",
]


LAZY = {
    "Answer": "camera.answers",
    "CameraWatcher": "camera.watcher",
    "Event": "camera.events",
    "LiveVideo": "pipeline",
    "Message": "conversation",
    "Reply": "pipeline",
    "VideoLLM": "pipeline",
    "WatchResult": "camera.answers",
}


def __getattr__(name: str) -> Any:
    """Load the runtime when it is first asked for: `import dycoke_edge` alone stays quick."""
    if name in LAZY:
        return getattr(import_module(f"dycoke_edge.runtime.{LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
