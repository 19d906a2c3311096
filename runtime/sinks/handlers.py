"""What may be given as `on_event`: sinks, functions of an event, paths."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Sequence

from dycoke_edge.errors import UsageError
from dycoke_edge.runtime.camera.events import Event, Sink
from dycoke_edge.runtime.sinks.bounded import CallbackSink
from dycoke_edge.runtime.sinks.jsonl import JsonlSink

Handler = Callable[[Event], None] | Sink | str | os.PathLike[str]


def as_sinks(on_event: Handler | Sequence[Handler]) -> list[Sink]:
    """One sink or several: a path is a file of JSON Lines, a function is called in a thread of its own. UsageError for
    what can take no event; then no file was made."""
    single = not isinstance(on_event, Sequence) or isinstance(on_event, str | bytes)
    handlers: list[Handler] = [on_event] if single else list(on_event)  # type: ignore[arg-type, list-item]
    for handler in handlers:
        _check(handler)
    return [_sink(handler) for handler in handlers]


def _sink(handler: Handler) -> Sink:
    if isinstance(handler, str | os.PathLike):
        return JsonlSink(handler)
    return handler if isinstance(handler, Sink) else CallbackSink(handler)


def _check(handler: Handler) -> None:
    name = getattr(handler, "__qualname__", type(handler).__qualname__)
    if isinstance(handler, str | os.PathLike):
        return
    if not callable(handler):
        why = "cannot be called"
    elif isinstance(handler, type) and issubclass(handler, Sink):
        why = f"is a class; make one of it, {name}(...)"
    elif inspect.iscoroutinefunction(handler) or inspect.iscoroutinefunction(type(handler).__call__):
        why = "is async, and nobody would await it; wrap it in asyncio.run_coroutine_threadsafe"
    elif not _takes_one(handler):
        why = "does not take one argument, the event"
    else:
        return
    raise UsageError(f"on_event: {name} {why}; give a function of an event, a sink, or the path of a .jsonl file")


def _takes_one(function: Callable[..., object]) -> bool:
    """False only where that is known: some functions in C do not say what they take."""
    try:
        inspect.signature(function).bind(None)
    except ValueError:
        return True
    except TypeError:
        return False
    return True
