"""A conversation: who said what, and where the one video or image stands in it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

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


Said = Message | Mapping[str, Any]  # a mapping has "role" and "content": a text, or a list of parts
Asked = str | Said | Sequence[Said]  # a string is a conversation of one message, the user's


def conversation(asked: Asked, name: str = "prompt (--prompt)") -> tuple[Message, ...]:
    """The messages, the last of them the user's. UsageError for what cannot be said; it calls a string `name`."""
    messages = (Message("user", asked),) if isinstance(asked, str) else tuple(_messages(asked))
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


def _messages(asked: Said | Sequence[Said]) -> Iterable[Message]:
    """One message or several, mappings among them."""
    several = [asked] if isinstance(asked, (Message, Mapping)) else asked
    for number, said in enumerate(several):
        yield _of_mapping(said, f"messages[{number}]") if isinstance(said, Mapping) else said


def _of_mapping(said: Mapping[str, Any], name: str) -> Message:
    """A message as OpenAI's clients and chat templates write it. A part of type video or image says where the clip is
    shown, and holds nothing."""
    for key in ("role", "content"):
        if key not in said:
            raise UsageError(f'{name} has no {key}; give {{"role": "user", "content": "What happens?"}}')
    content, texts, visual = said["content"], list[str](), False
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, Sequence) or not all(isinstance(part, Mapping) for part in parts):
        raise UsageError(f'{name}: content is a {type(content).__name__}; give a text, or a list of {{"type": ...}}')
    for part in parts:
        kind = part.get("type")
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind in ("video", "image") and len(part) == 1:
            visual = True
        else:
            raise UsageError(
                f'{name}: a part of type {kind!r} is none that is taken; give {{"type": "text", "text": ...}}, and '
                '{"type": "video"} where the video=... of the call is shown'
            )
    return Message(said["role"], "\n".join(texts), visual)


def _check(message: Message, name: str, last: bool) -> None:
    if not isinstance(message, Message):
        raise UsageError(f"{name} is a {type(message).__name__}; give Message(role, text), or a dict")
    if message.role not in get_args(Role):
        raise UsageError(f"{name} has a role that is none; use one of: {', '.join(get_args(Role))}")
    if message.visual and message.role != "user":
        raise UsageError(f"{name} of the {message.role} shows a video or image; show it in one of the user's")
    if not message.text.strip() and (last or not message.visual):
        raise UsageError(f'{name} is empty; ask something, e.g. "What happens?"')
    if not message.text.isprintable() and any("\ud800" <= letter <= "\udfff" for letter in message.text):
        raise UsageError(f"{name} is not valid UTF-8; type it in a UTF-8 terminal")
