"""Clients that leave: what was begun for them is not gone on with."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

import anyio
from fastapi import Request

from dycoke_edge.runtime.serve.errors import ApiError

T = TypeVar("T")


def gone() -> ApiError:
    """What nobody reads, but the log."""
    return ApiError(503, "the server is stopping, or nobody listens", code="stopping")


async def while_there(request: Request, work: Awaitable[T], left: Callable[[], object] = lambda: None) -> T:
    """Wait for `work` while the client is there. When it leaves, `left` is called, and `work` is cancelled where it
    waits in line; what runs in a thread ends first. Raises `gone` if there is no result then."""
    results, errors = list[T](), list[BaseException]()
    async with anyio.create_task_group() as group:

        async def watch() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass
            left()
            group.cancel_scope.cancel()

        group.start_soon(watch)
        try:
            results.append(await work)
        except anyio.get_cancelled_exc_class():
            raise
        except BaseException as error:  # kept, for a group of tasks would wrap it
            errors.append(error)
        group.cancel_scope.cancel()
    if errors:
        raise errors[0]
    if not results:
        raise gone()
    return results[0]
