"""Source: anything that frames come from, and the way from a URI to one."""

from __future__ import annotations

from collections.abc import Iterator
from os import PathLike
from typing import Protocol

from dycoke_edge.config_camera import ReaderSpec
from dycoke_edge.runtime.camera.av_source import AvSource
from dycoke_edge.runtime.camera.clock import SYSTEM, Clock
from dycoke_edge.runtime.camera.failure import SourceError
from dycoke_edge.runtime.camera.file_source import FileSource
from dycoke_edge.runtime.camera.frame import Frame, SourceInfo, Tally
from dycoke_edge.runtime.camera.gst_source import GstSource
from dycoke_edge.runtime.camera.pattern import PatternSource
from dycoke_edge.runtime.camera.relayed import RelayedSource
from dycoke_edge.runtime.camera.uri import parse_uri

__all__ = ["SPEC", "Source", "SourceError", "open_source"]
SPEC = ReaderSpec()


class Source(Protocol):
    """Opened once, read once, closed. `open` and iteration raise SourceError. `interrupt` may be called from any
    thread at any time, `close` after the reading one is done, both more than once."""

    tally: Tally

    def open(self) -> SourceInfo: ...

    def __iter__(self) -> Iterator[Frame]: ...

    def interrupt(self) -> None: ...

    def close(self) -> None: ...


def open_source(
    uri: str | int | PathLike[str], spec: ReaderSpec = SPEC, source_id: str = "", clock: Clock = SYSTEM
) -> Source:
    """The source for a URI, not yet opened: rtsp rtsps file v4l2 csi test gst, a path, /dev/videoN or N. Frames come
    scaled to `spec.size` and thinned to `spec.fps`. Raises UsageError for a URI that no source understands, for
    gst:// without `spec.allow_gst`, and where GStreamer is needed and not there."""
    address = parse_uri(uri)
    if address.kind == "test":
        return PatternSource(address, spec, source_id, clock)
    if address.kind in ("gst", "csi"):
        return GstSource(address, spec, source_id, clock)
    if address.kind == "file":
        return FileSource(address, spec, source_id, clock)
    if address.kind == "rtsp" and spec.hosts:
        return RelayedSource(address, spec, source_id, clock)
    return AvSource(address, spec, source_id, clock)
