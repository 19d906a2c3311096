"""make_app: a watcher and a model as an ASGI application."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from fastapi import FastAPI

from dycoke_edge import __version__
from dycoke_edge.config_serve import ServeSpec
from dycoke_edge.runtime.camera.watcher import CameraWatcher
from dycoke_edge.runtime.pipeline import VideoLLM
from dycoke_edge.runtime.serve import alerts, chat, docs, errors, events, health, page, streams
from dycoke_edge.runtime.serve.guard import Guard
from dycoke_edge.runtime.serve.service import Service
from dycoke_edge.runtime.serve.thumbnails import Thumbnails


def make_app(watcher: CameraWatcher, llm: VideoLLM, spec: ServeSpec, utc: Callable[[], float] = time.time) -> FastAPI:
    """The application over a watcher that was started, and is stopped after it. `app.state.stop()` may be called from
    any thread and ends answers that would go on. Run it with `listener.make_server`, which holds the time limits that
    an application cannot."""
    service = Service(watcher, llm, spec)
    thumbnails = Thumbnails(service)
    watcher.when_replaced(errors.log)
    loops = list[asyncio.AbstractEventLoop]()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        loops.append(asyncio.get_running_loop())
        service.readers.start()
        following = asyncio.create_task(thumbnails.follow())
        yield
        close()
        await service.readers.close()
        await following

    def close() -> None:
        service.closing.set()
        watcher.dismiss()  # whatever its model is doing, nobody waits for it

    def stop() -> None:
        for loop in loops:
            if not loop.is_closed():
                loop.call_soon_threadsafe(close)

    app = FastAPI(title="dycoke-edge", version=__version__, docs_url=None, redoc_url=None, lifespan=lifespan)
    app.state.stop = stop
    errors.install(app)
    for router in (
        chat.router(service),
        streams.router(service),
        alerts.router(service, thumbnails, utc),
        events.router(service),
        health.router(service),
        page.router(),
        docs.router(app.openapi),
    ):
        app.include_router(router)
    app.add_middleware(Guard, spec=spec)
    return app
