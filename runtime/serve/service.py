"""What the routes share: the watcher, the model's names, the ceilings, and threads for what blocks."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from functools import partial
from typing import ParamSpec, TypeVar

from anyio import CapacityLimiter
from anyio.to_thread import run_sync

from dycoke_edge.config import Clip
from dycoke_edge.config_serve import ServeSpec
from dycoke_edge.runtime.camera.watcher import CameraWatcher
from dycoke_edge.runtime.pipeline import VideoLLM
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
        self.media = Media(spec, llm.bundle.model.image_size)
        self.clip = Clip()
        self.created = int(time.time())
        self.descriptions: dict[str, str] = {}  # of cameras, by id
        self.closing = asyncio.Event()  # long answers end when it is set
        self._threads = CapacityLimiter(2 * spec.max_chats + 16)
        self._parsers = CapacityLimiter(1)  # of bodies, each of which takes memory several times while it is read
        self._readers = CapacityLimiter(1)  # of videos and pictures, so that one at a time takes memory

    async def apart(self, function: Callable[P, T], *arguments: P.args, **options: P.kwargs) -> T:
        """Call something that blocks in a thread."""
        return await run_sync(partial(function, *arguments, **options), limiter=self._threads)

    async def parsing(self, function: Callable[P, T], *arguments: P.args, **options: P.kwargs) -> T:
        """Call something that reads a body, after those before it."""
        return await run_sync(partial(function, *arguments, **options), limiter=self._parsers)

    async def reading(self, function: Callable[P, T], *arguments: P.args, **options: P.kwargs) -> T:
        """Call something that decodes what a request brought, after those before it."""
        return await run_sync(partial(function, *arguments, **options), limiter=self._readers)
