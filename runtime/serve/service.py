"""What the routes share: the watcher, the model's names, the ceilings, and threads for what blocks."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, ParamSpec, TypeVar

from anyio import CapacityLimiter
from anyio.to_thread import run_sync

from dycoke_edge.config import Clip, Compression
from dycoke_edge.config_serve import ServeSpec
from dycoke_edge.errors import UsageError
from dycoke_edge.runtime.camera.watcher import CameraWatcher
from dycoke_edge.runtime.pipeline import VideoLLM
from dycoke_edge.runtime.serve.errors import ApiError
from dycoke_edge.runtime.serve.media import Media

P = ParamSpec("P")
T = TypeVar("T")


class Service:
    """One for each application."""

    def __init__(self, watcher: CameraWatcher, llm: VideoLLM, spec: ServeSpec) -> None:
        self.watcher, self.spec = watcher, spec
        self.model_id = llm.bundle.path.resolve().name or "model"
        self.stop_token_ids = frozenset(llm.bundle.manifest.stop_token_ids)
        self.decode = llm.text.decode
        self._bundle = llm.bundle
        self.media = Media(spec, llm.bundle.model.image_size)
        self.clip = Clip()
        self.created = int(time.time())
        self.descriptions: dict[str, str] = {}  # of cameras, by id
        self.closing = asyncio.Event()  # long answers end when it is set
        self._threads = CapacityLimiter(2 * spec.max_chats + 16)
        self._readers = CapacityLimiter(1)  # of videos and pictures, so that one at a time takes memory

    def compression(self, given: dict[str, Any]) -> Compression:
        """The server's, with what a request gives instead; ApiError 400 for what cannot be or is not in the bundle."""
        try:
            if "merge_ratio" in given:
                self._bundle.merge_graph(given["merge_ratio"])
            return replace(self.watcher.compression, **given)
        except UsageError as error:
            raise ApiError(400, f"dycoke: {error}", "dycoke") from None

    def check_shows_frames(self) -> None:
        """ApiError 403 unless frames of cameras may be handed out."""
        if not self.spec.shows_frames:
            raise ApiError(403, "snapshots are off; set server.snapshots: true", code="snapshots_off")

    async def apart(self, function: Callable[P, T], *arguments: P.args, **options: P.kwargs) -> T:
        """Call something that blocks in a thread."""
        return await run_sync(partial(function, *arguments, **options), limiter=self._threads)

    async def reading(self, function: Callable[P, T], *arguments: P.args, **options: P.kwargs) -> T:
        """Call something that decodes what a request brought, after those before it."""
        return await run_sync(partial(function, *arguments, **options), limiter=self._readers)
