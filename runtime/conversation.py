"""A conversation: who said what, and where the one video or image stands in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from dycoke_edge.errors import UsageError

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True)
class Message:
    """What one side said. `visual`: the video or image of the request is shown with it, and `text` may be empty then.

    Where no message of a conversation is marked so, it is shown with the user's first.
    """

    role: Role
    text: str
    visual: bool = False


Asked = str | Sequence[Message]  # a string is a conversation of one message, the user's


def conversation(asked: Asked, name: str = "prompt (--prompt)") -> tuple[Message, ...]:
    """The messages, the last of them the user's. UsageError for what cannot be said; it calls a string `name`."""
    messages = (Message("user", asked),) if isinstance(asked, str) else tuple(asked)
    for number, message in enumerate(messages):
        _check(message, name if isinstance(asked, str) else f"messages[{number}]", number + 1 == len(messages))
    if not messages or messages[-1].role != "user":
        raise UsageError("messages: the user's comes last, which is the one to answer; move or add it")
    return messages


def called(asked: Asked) -> str:
    """What errors call it."""
    return "prompt (--prompt)" if isinstance(asked, str) else "messages"


def shown(messages: Sequence[Message]) -> set[int]:
    """Which of them show the video: those marked, or else the user's first."""
    marked = {number for number, message in enumerate(messages) if message.visual}
    return marked or {next(number for number, message in enumerate(messages) if message.role == "user")}


def check_live(messages: Sequence[Message]) -> None:
    """UsageError if anything is said before a live video, which the model saw before it was asked."""
    if min(shown(messages)) > 0:
        raise UsageError(
            f"messages[0] of the {messages[0].role} comes before the live video, which was seen already; show the "
            "video in the first message, and put what comes before it into that message's text"
        )


def _check(message: Message, name: str, last: bool) -> None:
    if not isinstance(message, Message):
        raise UsageError(f"{name} is a {type(message).__name__}; give Message(role, text)")
    if message.role not in get_args(Role):
        raise UsageError(f"{name} has a role that is none; use one of: {', '.join(get_args(Role))}")
    if message.visual and message.role != "user":
        raise UsageError(f"{name} of the {message.role} shows a video or image; show it in one of the user's")
    if not message.text.strip() and (last or not message.visual):
        raise UsageError(f'{name} is empty; ask something, e.g. "What happens?"')
    if not message.text.isprintable() and any("\ud800" <= letter <= "\udfff" for letter in message.text):
        raise UsageError(f"{name} is not valid UTF-8; type it in a UTF-8 terminal")
