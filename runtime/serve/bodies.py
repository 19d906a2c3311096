"""Bodies of requests: how much of them there may be, and reading them apart from the event loop, which others need."""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar, get_type_hints

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError
from starlette.responses import Response

from dycoke_edge.runtime import allocator
from dycoke_edge.runtime.serve.errors import ApiError, deepest
from dycoke_edge.runtime.serve.service import Service

VALUES = 30_000  # of a body, commas in its texts and rows of pictures aside: 64 messages of 128 parts have no more
Model = TypeVar("Model", bound=BaseModel)
Handler = Callable[[Request], Coroutine[Any, Any, Response]]


class Room:
    """The bytes of all bodies that are in memory, under a ceiling."""

    def __init__(self, most: int) -> None:
        self.most, self.taken = most, 0

    def share(self) -> Share:
        """A request's share, empty at first."""
        return Share(self)


class Share:
    """What one request has of a Room."""

    def __init__(self, room: Room) -> None:
        self._room, self._taken = room, 0

    def take(self, count: int) -> None:
        """Have so many bytes more, or raise ApiError 429."""
        if self._room.taken + count > self._room.most:
            raise ApiError(429, "other requests are being received; try again", code="busy", retry_after=2.0)
        self._room.taken += count
        self._taken += count

    def release(self) -> None:
        """The bytes are no longer in memory. Legal twice."""
        self._room.taken -= self._taken
        self._taken = 0


def parse(kind: type[Model], body: bytearray, most: int) -> Model | Exception:
    """A body that is JSON of at most `most` values, which is emptied to make room; or the first thing that is wrong
    with it. That is not raised: an error that is raised keeps what was at hand, for as long as somebody keeps it."""
    large = len(body) > allocator.LARGE
    found = _parse(kind, body, most)
    if large:
        allocator.trim()  # reading it took its size several times
    return found


def _parse(kind: type[Model], body: bytearray, most: int) -> Model | Exception:
    if body.count(b",") + body.count(b"[") + body.count(b"{") > most:  # a value has one of these before it
        return ApiError(400, f"the body holds too many values; at most {most}", code="too_large")
    try:
        text = body.decode()
        body.clear()
        return kind.model_validate(json.loads(text))
    except ValidationError as error:
        first = deepest(error.errors(include_url=False, include_input=False))
        return RequestValidationError([{**first, "loc": ("body", *first["loc"])}])
    except (ValueError, RecursionError):  # also of numbers with too many digits
        return RequestValidationError([{"type": "json_invalid", "loc": ("body",), "msg": ""}])


def route_class(service: Service) -> type[APIRoute]:
    """Routes whose endpoints get a body that was read in a thread, if they have a model for it."""
    most = VALUES + service.spec.max_prompt_chars + service.spec.max_frames

    class Apart(APIRoute):
        def get_route_handler(self) -> Handler:
            answer = super().get_route_handler()
            kind = _model(self.endpoint)
            if kind is None:
                return answer

            async def handler(request: Request) -> Response:
                pieces = [piece async for piece in request.stream() if piece]
                whole = pieces[0] if len(pieces) == 1 else b"".join(pieces)
                body = whole if isinstance(whole, bytearray) else bytearray(whole)  # the guard's is emptied in place
                read = await service.parsing(parse, kind, body, most)
                if isinstance(read, Exception):
                    raise read
                return await answer(_Read(request, read))

            return handler

    return Apart


class _Read(Request):
    """A request whose body is a model already, which FastAPI takes as it is."""

    def __init__(self, request: Request, read: BaseModel) -> None:
        super().__init__(request.scope, request.receive)
        self._read = read

    async def body(self) -> bytes:
        """Not empty."""
        return b"{}"

    async def json(self) -> BaseModel:
        """What was read."""
        return self._read


def _model(endpoint: Callable[..., Any]) -> type[BaseModel] | None:
    hints = get_type_hints(endpoint).values()
    return next((kind for kind in hints if isinstance(kind, type) and issubclass(kind, BaseModel)), None)
