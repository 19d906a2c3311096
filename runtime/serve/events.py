"""GET /v1/events: what happens, as it happens, resumable."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator
from typing import Annotated

import anyio
from fastapi import APIRouter, Header, Query
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from dycoke_edge.runtime.camera.events import Event
from dycoke_edge.runtime.serve.chat import SSE
from dycoke_edge.runtime.serve.errors import ApiError
from dycoke_edge.runtime.serve.service import Service

ULID = re.compile(r"[0-9A-HJKMNP-TV-Z]{26}")
LOOK_S = 0.2  # between two looks at the ring: cheaper than a thread for each reader
SILENCE_S = 15.0  # after which a comment shows proxies and clients that the stream lives


def router(service: Service) -> APIRouter:
    """The route."""
    routes = APIRouter(prefix="/v1")
    readers = 0

    class Following(StreamingResponse):
        """A reader of events, counted from its first byte to its last, whatever ends it."""

        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            nonlocal readers
            if readers >= service.spec.max_event_streams:
                raise ApiError(429, f"{readers} readers of events; try again later", code="busy", retry_after=5.0)
            readers += 1  # nothing is awaited between looking and counting
            try:
                await super().__call__(scope, receive, send)
            finally:
                readers -= 1

    @routes.get("/events", response_class=StreamingResponse)
    async def events(
        last_event_id: Annotated[str | None, Header(max_length=64)] = None,
        after: Annotated[str | None, Query(max_length=64, description="as Last-Event-ID")] = None,
        stream_id: Annotated[str | None, Query(max_length=64)] = None,
    ) -> Response:
        """What happens, as server-sent events; `Last-Event-ID` resumes, and `event: gap` says that the past is no
        longer kept."""
        last = last_event_id or after
        if last is not None and not ULID.fullmatch(last):
            raise ApiError(400, "Last-Event-ID: not the id of an event", "Last-Event-ID")
        return Following(_follow(service, last, stream_id), media_type=SSE)

    return routes


async def _follow(service: Service, last: str | None, stream_id: str | None) -> AsyncIterator[str]:
    ring = service.watcher.events
    yield "retry: 2000\n\n"
    if last is None:
        newest = ring.latest(1)
        last = newest[0].id if newest else ""
    elif (kept := ring.since()) and kept[0].id > last:
        yield f"event: gap\ndata: {json.dumps({'after': last, 'oldest': kept[0].id})}\n\n"
    silent = 0.0
    while not service.closing.is_set():
        found = ring.since(last)
        for event in found:
            last = event.id
            if stream_id in (None, event.camera):
                silent = 0.0
                yield _message(event)
        if silent >= SILENCE_S:
            silent = 0.0
            yield ":\n\n"
        with anyio.move_on_after(LOOK_S):
            await service.closing.wait()
        silent += LOOK_S


def _message(event: Event) -> str:
    return f"id: {event.id}\nevent: {event.type}\ndata: {json.dumps(event.to_dict())}\n\n"
