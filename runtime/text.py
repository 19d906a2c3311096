"""Text on the device: chat template, token ids, and text from tokens without ever half a character."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jinja2
import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from dycoke_edge.bundle import Bundle
from dycoke_edge.errors import BundleError, UsageError
from dycoke_edge.runtime.conversation import Asked, Message, called, conversation, shown
from dycoke_edge.template import Refused, environment

Ids = NDArray[np.int64]
Kind = str  # "video" or "image": what the template is told
Turn = dict[str, Any]  # a message as chat templates take it: role, content


class Text:
    """A bundle's tokenizer and chat template."""

    def __init__(self, bundle: Bundle) -> None:
        manifest = bundle.manifest
        self._placeholders = {manifest.video_token_id, manifest.image_token_id}
        tokenizer, self._template_file = bundle.path / "tokenizer.json", bundle.path / "chat_template.jinja"
        try:
            self._tokenizer = Tokenizer.from_file(str(tokenizer))
        except Exception as error:  # tokenizers raises plain Exception
            raise BundleError(f"{tokenizer} cannot be read ({error}); export again") from None
        try:
            self._template = environment().from_string(self._template_file.read_text(encoding="utf-8"))
        except (jinja2.TemplateError, OSError, UnicodeError) as error:
            raise BundleError(f"{self._template_file} is no template ({error}); export again") from None

    def encode(self, asked: Asked, visual: Kind | None) -> tuple[Ids, Ids]:
        """Render a conversation and cut its ids at the visual placeholder: (before, after); after is empty without one.

        A text that names the placeholder itself (e.g. "<video>") puts the frames there; otherwise they come where
        the chat template puts them in the message that shows them. UsageError for what cannot be said, or what the
        template refuses or leaves out.
        """
        turns = self._turns(conversation(asked), visual)
        ids = self._ids(self._render(turns, called(asked)))
        places = self._places(ids)
        self._check(len(places), visual, called(asked))
        return (ids[: places[0]], ids[places[0] + 1 :]) if visual else (ids, ids[:0])

    def decode(self, ids: list[int]) -> str:
        """All tokens as text, special ones left out."""
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))

    def first_tokens(self, answers: tuple[str, ...]) -> list[list[int]]:
        """The ids that each answer may begin with, in all its spellings: yes, Yes, YES, with a space before or not.

        Ids that two answers share say nothing and are left out; UsageError if one has no id of its own.
        """
        found = [{int(self._ids(spelling)[0]) for spelling in _spellings(answer)} for answer in answers]
        own = [ids.difference(*(other for other in found if other is not ids)) for ids in found]
        if len(answers) < 2 or not all(own):
            raise UsageError(
                f"answers {', '.join(map(repr, answers))} cannot be told apart by their first token; "
                "give two or more that begin differently, e.g. 'yes', 'no'"
            )
        return [sorted(ids) for ids in own]

    def stream(self) -> TextStream:
        """A fresh incremental decoder."""
        return TextStream(self._tokenizer)

    def _turns(self, messages: Sequence[Message], visual: Kind | None) -> list[Turn]:
        """The messages as a chat template takes them."""
        named = {number for number, message in enumerate(messages) if len(self._places(self._ids(message.text)))}
        for number in named:
            if messages[number].role != "user":
                raise UsageError(
                    f"messages[{number}] of the {messages[number].role} has a place for a video; leave it out"
                )
        marked = any(message.visual for message in messages)
        places = shown(messages) - named if marked or (visual and not named) else set[int]()
        kind = visual or "video"  # one that was not given is refused when it is found
        return [_turn(message, kind if number in places else None) for number, message in enumerate(messages)]

    def _render(self, turns: list[Turn], name: str) -> str:
        """The text that the model reads; each side's part must be in it."""
        try:
            text = self._template.render(messages=turns, add_generation_prompt=True)
        except Refused as error:
            why = " ".join(str(error).split())[:200]
            raise UsageError(f"{name}: the model's chat template refuses this: {why}; leave that out") from None
        except (jinja2.TemplateError, TypeError) as error:
            raise BundleError(f"{self._template_file} cannot render this prompt ({error}); export again") from None
        for role in sorted({turn["role"] for turn in turns} - {"user"}):
            if self._is_without(role, turns, text):
                raise UsageError(
                    f"{name}: the model's chat template leaves out what the {role} says; put it into the user's text"
                )
        return text

    def _is_without(self, role: str, turns: list[Turn], text: str) -> bool:
        """The text would be the same if this side had said nothing."""
        others = [turn for turn in turns if turn["role"] != role]
        try:
            return text == self._template.render(messages=others, add_generation_prompt=True)
        except (jinja2.TemplateError, TypeError):
            return False

    def _ids(self, text: str) -> Ids:
        return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int64)

    def _places(self, ids: Ids) -> Ids:
        return np.flatnonzero(np.isin(ids, list(self._placeholders)))

    def _check(self, found: int, visual: Kind | None, name: str) -> None:
        if found > 1:
            raise UsageError(f"{name}: {found} places for a video or image; leave one, and ask about each apart")
        if found and not visual:
            raise UsageError(f"{name}: a place for a video, but none was given; add --video or --image")
        if visual and not found:
            raise BundleError(
                f"chat_template.jinja puts no {visual} into the prompt; write its placeholder in --prompt"
            )


class TextStream:
    """Text token by token: an incomplete character is held back until its last byte comes."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)

    def push(self, token: int) -> str:
        """The text that this token completes, often empty inside a character."""
        piece = self._stream.step(self._tokenizer, token)
        return "" if piece is None else str(piece)


def _spellings(answer: str) -> list[str]:
    word = answer.strip()
    if not word:
        return []
    return [space + form for form in (word, word.lower(), word.capitalize(), word.upper()) for space in ("", " ")]


def _turn(message: Message, visual: Kind | None) -> Turn:
    parts = [{"type": visual}] if visual else []
    return {"role": message.role, "content": parts + ([{"type": "text", "text": message.text}] if message.text else [])}
