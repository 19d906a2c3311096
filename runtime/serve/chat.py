"""POST /v1/chat/completions and GET /v1/models, as OpenAI's clients know them."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response, StreamingResponse

from dycoke_edge import __version__
from dycoke_edge.runtime.camera.answers import Window
from dycoke_edge.runtime.camera.events import rfc3339
from dycoke_edge.runtime.reply import Piece
from dycoke_edge.runtime.serve.bodies import route_class
from dycoke_edge.runtime.serve.errors import ApiError, Json, as_api_error, body
from dycoke_edge.runtime.serve.leaving import gone, while_there
from dycoke_edge.runtime.serve.messages import ChatRequest, ImagePart, Question, StreamPart, VideoPart, question
from dycoke_edge.runtime.serve.service import Service
from dycoke_edge.runtime.serve.until import Until
from dycoke_edge.runtime.stats import Stats
from dycoke_edge.runtime.step import FinishReason

SSE = "text/event-stream"


@dataclass
class Answering:
    """An answer on its way: its pieces, and what is known of it so far."""

    pieces: Iterator[Piece]
    until: Until
    window: Window | None = None
    id: str = field(default_factory=lambda: f"chatcmpl-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    stats: Stats = field(default_factory=Stats)
    finish: FinishReason | None = None

    def take(self, piece: Piece) -> str:
        """Count a piece in; returns the text that is certain by now not to be of a stop string."""
        self.text, self.stats = self.text + piece.text, piece.stats
        self.tokens.append(piece.token)
        self.finish = piece.finish_reason
        return self.until.push(piece.text)


def router(service: Service) -> APIRouter:
    """The routes."""
    routes = APIRouter(prefix="/v1", route_class=route_class(service))

    @routes.get("/version")
    async def version() -> Response:
        """This package's version, and the model's name."""
        return Json({"version": __version__, "model": service.model_id})

    @routes.get("/models")
    async def models() -> Response:
        """The one model that is here."""
        return Json({"object": "list", "data": [_model(service)]})

    @routes.get("/models/{model_id}")
    async def model(model_id: str) -> Response:
        """The model, 404 for another name."""
        _check_model(service, model_id)
        return Json(_model(service))

    @routes.post("/chat/completions")
    async def chat(request: Request, asked: ChatRequest) -> Response:
        """Answer a conversation about a video, pictures, a live camera or nothing but text, as OpenAI's API does;
        with `stream` as server-sent events."""
        _check_model(service, asked.model)
        answer = await while_there(request, _begin(service, question(asked, service.spec)))
        del asked.messages  # with all that they showed
        request.state.share.release()
        pieces = _Pieces(service, request, answer)
        # what is wrong with a question shows here, before a 200 is on its way
        first = await while_there(request, pieces.next(), pieces.close)
        if asked.stream:
            usage = asked.stream_options is not None and asked.stream_options.include_usage
            return StreamingResponse(_events(service, pieces, first, usage), media_type=SSE)
        await while_there(request, pieces.rest(), pieces.close)
        return Json(_whole(service, answer))

    return routes


def _model(service: Service) -> dict[str, Any]:
    return {"id": service.model_id, "object": "model", "created": service.created, "owned_by": "dycoke-edge"}


def _check_model(service: Service, name: str) -> None:
    if name != service.model_id:
        raise ApiError(404, f"model: there is one here, {service.model_id}", "model", "model_not_found")


async def _begin(service: Service, asked: Question) -> Answering:
    """Read what a question shows, and get it in line."""
    compression = service.compression(asked.compression)
    watcher, said, sampling, until = service.watcher, asked.messages, asked.sampling, Until(asked.stops)
    match asked.shown:
        case StreamPart(stream=stream):
            if stream.stream_id not in watcher.cameras:
                raise ApiError(404, "stream_id: no such camera; GET /v1/live-stream lists them", "stream_id")
            if asked.compression:
                raise ApiError(400, "dycoke: a live camera's frames are compressed already; leave it out", "dycoke")
            pieces = await service.apart(watcher.ask_stream, stream.stream_id, said, stream.last_s, sampling)
            return Answering(pieces, until, watcher.window(stream.stream_id))
        case VideoPart(video_url=link):
            shown = {"video": await service.reading(service.media.video, link.url, asked.wanted)}
        case (ImagePart(image_url=link),):
            shown = {"image": await service.reading(service.media.image, link.url)}
        case (_, *_) as parts:
            links = [part.image_url.url for part in parts]
            shown = {"video": await service.reading(service.media.images, links)}
        case _:
            shown = {}
    options: dict[str, Any] = {"compression": compression, "sampling": sampling, **shown}
    pieces = await service.apart(watcher.generate_stream, said, **options)
    return Answering(pieces, until)


class _Pieces:
    """Pieces of an answer, from the model's thread into the event loop, for as long as the client is there."""

    def __init__(self, service: Service, request: Request, answer: Answering) -> None:
        self._service, self._request, self.answer = service, request, answer
        self._closed = False

    async def next(self) -> str | None:
        """The next text, often empty; None at the end. Raises what the model raised."""
        if self.answer.until.reached:
            self.close()
            await self._service.apart(
                self._service.watcher.check_bundle
            )  # its last piece, which does that, is not read
            return None
        try:
            if self._service.closing.is_set() or await self._request.is_disconnected():
                raise gone()
            piece = await self._service.apart(next, self.answer.pieces, None)
            if self._closed:
                raise gone()
        except BaseException:
            self.close()
            raise
        return None if piece is None else self.answer.take(piece)

    async def rest(self) -> None:
        """Take all that is left."""
        while await self.next() is not None:
            pass

    def close(self) -> None:
        """Let the model go on to something else. Legal while `next` waits, which raises then."""
        self._closed = True
        close = getattr(self.answer.pieces, "close", None)
        if close is not None:
            close()


async def _events(service: Service, pieces: _Pieces, first: str | None, usage: bool) -> AsyncIterator[str]:
    """The answer as server-sent events. An error is one of its own, never text of the answer."""
    answer, text = pieces.answer, first
    try:
        yield _chunk(service, answer, {"role": "assistant", "content": ""})
        while text is not None:
            if text:
                yield _chunk(service, answer, {"content": text})
            text = await pieces.next()
        if rest := _rest(service, answer):
            yield _chunk(service, answer, {"content": rest})
        yield _chunk(service, answer, {}, _finish(service, answer), {"dycoke": _costs(answer)})
        if usage:
            yield _data(_frame(service, answer, []) | {"usage": _usage(answer)})
    except Exception as error:
        failed = as_api_error(error)
        yield _data(body(failed.status, str(failed), failed.param, failed.code))
    finally:
        pieces.close()
    yield "data: [DONE]\n\n"


def _rest(service: Service, answer: Answering) -> str:
    """What is left to say at the end: what could have begun a stop string, and a character that broke off."""
    whole = service.decode(answer.tokens)
    if whole.startswith(answer.text):
        return answer.until.push(whole[len(answer.text) :]) + answer.until.rest()
    return answer.until.rest()


def _data(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"


def _chunk(
    service: Service,
    answer: Answering,
    delta: dict[str, str],
    finish: str | None = None,
    more: dict[str, Any] = {},  # noqa: B006
) -> str:
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
    return _data(_frame(service, answer, [choice]) | more)


def _frame(
    service: Service, answer: Answering, choices: list[Any], kind: str = "chat.completion.chunk"
) -> dict[str, Any]:
    return {"id": answer.id, "object": kind, "created": answer.created, "model": service.model_id, "choices": choices}


def _whole(service: Service, answer: Answering) -> dict[str, Any]:
    until = Until(answer.until.stops)
    content = until.push(service.decode(answer.tokens)) + until.rest()
    message = {"role": "assistant", "content": content, "refusal": None}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": _finish(service, answer)}
    frame = _frame(service, answer, [choice], "chat.completion")
    return frame | {"usage": _usage(answer), "dycoke": _costs(answer)}


def _finish(service: Service, answer: Answering) -> str:
    return "stop" if answer.until.reached or answer.tokens[-1] in service.stop_token_ids else "length"


def _usage(answer: Answering) -> dict[str, int]:
    stats = answer.stats
    prompt = stats.text_tokens + stats.visual_tokens_kept
    total = prompt + stats.new_tokens
    return {"prompt_tokens": prompt, "completion_tokens": stats.new_tokens, "total_tokens": total}


def _costs(answer: Answering) -> dict[str, Any]:
    """What compression did for this answer. `finish_reason` may be "repetition", which OpenAI's clients know as
    "length"; `window` is UTC of the oldest and newest frame of a live camera."""
    stats = answer.stats
    return {
        "finish_reason": "stop" if answer.until.reached else answer.finish,
        "vision_tokens_in": stats.visual_tokens_in,
        "vision_tokens_kept": stats.visual_tokens_kept,
        "frames": stats.frames,
        "window": None if answer.window is None else [rfc3339(moment) for moment in answer.window],
    }
