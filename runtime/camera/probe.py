"""probe: what a camera or file really sends, found by watching it for a few seconds."""

from __future__ import annotations

import dataclasses
import threading
from dataclasses import dataclass
from itertools import pairwise
from os import PathLike

import numpy as np

from dycoke_edge.config_camera import ReaderSpec
from dycoke_edge.runtime.camera.clock import SYSTEM, Clock
from dycoke_edge.runtime.camera.failure import SourceError
from dycoke_edge.runtime.camera.frame import Frame
from dycoke_edge.runtime.camera.source import SPEC, Source, open_source
from dycoke_edge.runtime.camera.uri import parse_uri

SECONDS = 5.0
PICTURES = 150
NOTHING = np.empty((0, 0, 3), np.uint8)


@dataclass(frozen=True)
class ProbeReport:
    """What was seen. `uri` is redacted; seconds are since the start unless they are of the stream's clock (`pts`)."""

    uri: str
    live: bool
    codec: str | None
    width: int
    height: int
    fps_announced: float | None
    fps_measured: float | None  # by the stream's clock, or where that is broken by when pictures came
    seconds_to_open: float
    seconds_to_first_frame: float
    frames: int
    frames_dropped: dict[str, int]
    pts_missing: int
    pts_standing_still: int  # the same as the one before
    pts_breaks: int  # backwards, a leap ahead, or another resolution: frames before and after are kept apart
    pts_largest_step: float | None


def probe(uri: str | int | PathLike[str], spec: ReaderSpec = SPEC, clock: Clock = SYSTEM) -> ProbeReport:
    """Watches for up to SECONDS or PICTURES. Raises UsageError for a URI that no source understands and SourceError
    for one that cannot be opened, or sends no whole picture."""
    shown = parse_uri(uri).shown
    source = open_source(uri, dataclasses.replace(spec, size=None, fps=None), clock=clock)
    limit = threading.Timer(2 * spec.open_timeout + spec.stall_timeout, source.interrupt)
    limit.daemon = True
    limit.start()
    try:
        return _watch(source, shown, clock)
    finally:
        limit.cancel()
        source.close()


def _watch(source: Source, shown: str, clock: Clock) -> ProbeReport:
    begun = clock.monotonic()
    info = source.open()
    opened = clock.monotonic()
    frames: list[Frame] = []
    for frame in source:
        frames.append(dataclasses.replace(frame, image=NOTHING) if frames else frame)
        if len(frames) >= PICTURES or frame.monotonic_s - frames[0].monotonic_s >= SECONDS:
            break
    if not frames:
        raise SourceError(
            "timeout", f"{shown} sent no whole picture; check the camera, or give it a key frame each second"
        )
    first = frames[0]
    steps = [
        round(after.pts_s - before.pts_s, 6)
        for before, after in pairwise(frames)
        if after.segment == before.segment and after.pts_s is not None and before.pts_s is not None
    ]
    return ProbeReport(
        uri=info.uri,
        live=info.live,
        codec=info.codec,
        width=first.image.shape[1],
        height=first.image.shape[0],
        fps_announced=info.fps,
        fps_measured=_rate(frames, steps),
        seconds_to_open=round(opened - begun, 3),
        seconds_to_first_frame=round(first.monotonic_s - begun, 3),
        frames=len(frames),
        frames_dropped=dict(source.tally.dropped),
        pts_missing=sum(frame.pts_s is None for frame in frames),
        pts_standing_still=sum(step <= 0 for step in steps),
        pts_breaks=frames[-1].segment,
        pts_largest_step=max(steps, default=None),
    )


def _rate(frames: list[Frame], steps: list[float]) -> float | None:
    if sum(steps) > 0:
        return round(len(steps) / sum(steps), 3)
    seconds = frames[-1].monotonic_s - frames[0].monotonic_s
    return round((len(frames) - 1) / seconds, 3) if seconds > 0 else None
