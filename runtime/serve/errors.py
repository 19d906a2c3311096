"""Every error as an OpenAI-style body, without credentials, without echoes of what was sent."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import re
import traceback
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from dycoke_edge.errors import (
    BusyError,
    DycokeEdgeError,
    InputError,
    ReplacedError,
    StaleError,
    UnavailableError,
    UsageError,
)
from dycoke_edge.runtime.camera.redact import one_line
from dycoke_edge.runtime.serve.room import full_disk

LOGGER = logging.getLogger("dycoke_edge.serve")
MOST = 1000  # letters of a message
KEY = re.compile(r"\w{1,64}", re.ASCII)  # what a key may be made of to be named in an answer
TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    409: "conflict_error",
    429: "rate_limit_error",
}


class Json(Response):
    """JSON in ASCII: whatever a string holds, it can be sent."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """The body; NaN is a bug and raises."""
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode()


class ApiError(Exception):
    """Something that a client did wrong, or cannot have now. `param` names the key that is wrong."""

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None, retry_after: float = 0.0
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.retry_after = status, param, code, retry_after


def body(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """What OpenAI's clients understand: one line in `message`."""
    kind = TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    line = one_line(" ".join(message[: 2 * MOST].split()), MOST)
    return {"error": {"message": line, "type": kind, "param": param, "code": code}}


def response(error: ApiError) -> Json:
    """An error as a response."""
    headers = {"Retry-After": str(max(1, math.ceil(error.retry_after)))} if error.retry_after else {}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if error.status == 405:
        headers["Allow"] = "GET, HEAD"
    return Json(body(error.status, str(error), error.param, error.code), error.status, headers)


def as_api_error(error: BaseException) -> ApiError:
    """What a client is told of any failure; of a bug, only that there is one."""
    if isinstance(error, ApiError):
        return error
    if (full := full_disk(error)) is not None:
        return no_room(full)
    if isinstance(error, BusyError):
        return ApiError(429, str(error), code="busy", retry_after=error.retry_after_s)
    if isinstance(error, StaleError):
        return ApiError(503, str(error), code="stale")
    if isinstance(error, UnavailableError):
        return ApiError(503, str(error), code="unavailable", retry_after=1.0)
    if isinstance(error, ReplacedError):
        return ApiError(503, error.brief, code="replaced")
    if isinstance(error, UsageError | InputError):
        return ApiError(400, str(error))
    if isinstance(error, DycokeEdgeError):
        log(str(error))
        return ApiError(500, str(error), code="engine_error")
    for line in "".join(traceback.format_exception(error)).splitlines():  # a record each: none can be forged
        log(line)
    return ApiError(500, "internal error; the server's log says more", code="internal_error")


def log(reason: str) -> None:
    """Put a line into the log."""
    LOGGER.error("%s", one_line(reason, MOST))


def no_room(error: OSError) -> ApiError:
    """Nothing can be put into the temporary folder, where what a request shows lies while it is decoded."""
    reason = error.strerror or os.strerror(error.errno or errno.ENOSPC)
    why = f"the server's temporary folder takes no file ({reason}); make room, or start it with TMPDIR=FOLDER"
    log(why)
    return ApiError(507, why, code="no_room")


def install(app: FastAPI) -> None:
    """Have every error of the application answered here."""
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(ApiError, _ours)
    app.add_exception_handler(DycokeEdgeError, _ours)
    app.add_exception_handler(Exception, _ours)


async def _ours(request: Request, error: Exception) -> Response:
    return response(as_api_error(error))


async def _http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    answer = response(ApiError(error.status_code, f"{error.detail}; GET /openapi.json lists what there is"))
    answer.headers.update(error.headers or {})
    return answer


async def _invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = deepest(error.errors())
    named = [str(part)[:100] for part in first["loc"] if part != "body"]
    place = ".".join(part if KEY.fullmatch(part) else "?" for part in named if "[" not in part)
    return response(ApiError(400, f"{place or 'body'}: {complaint(first)}", param=place or None))


def deepest(errors: Sequence[Any]) -> dict[str, Any]:
    """The error that is told: of several forms that a value may have, the one that was meant."""
    return dict(max(errors, key=lambda found: (len(found["loc"]), not found["type"].endswith("_type"))))


def complaint(found: Any) -> str:
    """What pydantic complains of, without the value: it may hold a secret, and be long."""
    kind, message = found["type"], str(found["msg"])
    if kind == "extra_forbidden":
        return "unknown key; leave it out"
    if kind == "missing":
        return "is missing"
    if kind == "json_invalid":
        return "is not JSON"
    if kind == "union_tag_invalid":  # pydantic would say what it was instead
        return f"should be one of {found['ctx']['expected_tags']}"
    return message[:1].lower() + message[1:]
