"""What the routes share: the watcher, the model's names, the ceilings, and threads for what blocks."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from functools import partial
from typing import Any, ParamSpec, TypeVar

from anyio import CancelScope, CapacityLimiter
from anyio.to_thread import run_sync

from dycoke_edge.config import Clip, Compression
from dycoke_edge.config_serve import ServeSpec
from dycoke_edge.errors import UsageError
from dycoke_edge.runtime.camera.watcher import CameraWatcher
from dycoke_edge.runtime.pipeline import VideoLLM
from dycoke_edge.runtime.serve.errors import ApiError
from dycoke_edge.runtime.serve.leaving import gone
from dycoke_edge.runtime.serve.media import Frames, Media
from dycoke_edge.runtime.serve.readers import Readers

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
        self.media = Media(spec, llm.bundle.model.image_size)  # to name what `reading` is to do
        self.clip = Clip()
        self.created = int(time.time())
        self.descriptions: dict[str, str] = {}  # of cameras, by id
        self.closing = asyncio.Event()  # long answers end when it is set
        self._threads = CapacityLimiter(2 * spec.max_chats + 16)
        self._parsers = CapacityLimiter(1)  # of bodies, each of which takes memory several times while it is read
        self.readers = Readers(spec, llm.bundle.model.image_size)

    def compression(self, given: dict[str, Any]) -> Compression:
        """The server's, with what a request gives instead; ApiError 400 for what cannot be or is not in the bundle."""
        try:
            if "merge_ratio" in given:
                self._bundle.merge_graph(given["merge_ratio"])
            return self.watcher.compression.but(**given)
        except UsageError as error:
            raise ApiError(400, f"dycoke: {error}", "dycoke") from None

    def check_shows_frames(self) -> None:
        """ApiError 403 unless frames of cameras may be handed out."""
        if not self.spec.shows_frames:
            raise ApiError(403, "snapshots are off; set server.snapshots: true", code="snapshots_off")

    async def apart(self, function: Callable[P, T], *arguments: P.args, **options: P.kwargs) -> T:
        """Call something that blocks in a thread."""
        return await run_sync(partial(function, *arguments, **options), limiter=self._threads)

    async def parsing(self, function: Callable[P, T], *arguments: P.args, **options: P.kwargs) -> T:
        """Call something that reads a body, after those before it."""
        return await run_sync(partial(function, *arguments, **options), limiter=self._parsers)

    async def reading(self, method: Callable[P, Frames], *arguments: P.args, **options: P.kwargs) -> Frames:
        """Have a method of `media` decode what a request brought, in another process, after those before it. Ends that
        process when this is cancelled, as `while_there` does, or the server is told to stop."""
        assert not options, "arguments go by their places"
        work = asyncio.ensure_future(self.readers.read(method.__name__, *arguments))
        closing = asyncio.ensure_future(self.closing.wait())
        try:
            await asyncio.wait((work, closing), return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                raise gone()
            return work.result()
        finally:
            for task in (work, closing):
                task.cancel()
            with CancelScope(shield=True):
                await asyncio.gather(work, closing, return_exceptions=True)
