"""Text on the device: chat template, token ids, and text from tokens without ever half a character."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import jinja2
import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from dycoke_edge.bundle import Bundle
from dycoke_edge.errors import BundleError, UsageError
from dycoke_edge.runtime.conversation import Asked, Message, called, conversation, shown
from dycoke_edge.template import Broken, ChatTemplate, Refused

Ids = NDArray[np.int64]
Kind = str  # "video" or "image": what the template is told
PRIVATE = range(0xE000, 0xF900)  # characters that mean nothing
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
        added = self._tokenizer.get_added_tokens_decoder()
        self._special = {token.content for number, token in added.items() if number not in self._placeholders}
        try:
            self._template = ChatTemplate(self._template_file.read_text(encoding="utf-8"))
        except (jinja2.TemplateError, OSError, UnicodeError, RecursionError) as error:
            raise BundleError(f"{self._template_file} is no template ({error}); export again") from None

    def encode(self, asked: Asked, visual: Kind | None) -> tuple[Ids, Ids]:
        """Render a conversation and cut its ids at the visual placeholder: (before, after); after is empty without one.

        A text that names the placeholder itself (e.g. "<video>") puts the frames there; otherwise they come where
        the chat template puts them in the message that shows them. UsageError for what cannot be said, or what the
        template refuses or leaves out.
        """
        messages = conversation(asked)
        spelled = _Spelled(self._special, [message.text for message in messages])
        turns = self._turns([replace(message, text=spelled.hide(message.text)) for message in messages], visual)
        ids = self._read(self._render(turns, called(asked)), spelled)
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
            text = self._template.render(turns)
        except Refused as error:
            why = " ".join(str(error).split())[:200]
            raise UsageError(f"{name}: the model's chat template refuses this: {why}; leave that out") from None
        except Broken as error:
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
            return text == self._template.render(others)
        except jinja2.TemplateError:
            return False

    def _read(self, text: str, spelled: _Spelled) -> Ids:
        """The ids of what the template made; what somebody said is text, even where it spells a special token."""
        parts = [self._as_text(part) if said else self._ids(part) for part, said in spelled.parts(text) if part]
        return np.concatenate(parts) if parts else self._ids("")

    def _as_text(self, text: str) -> Ids:
        """The ids of a text in which no token is special."""
        return np.array(self._plain.encode(text, add_special_tokens=False).ids, np.int64)

    @cached_property
    def _plain(self) -> Tokenizer:
        """The tokenizer without special tokens: one of its own, for several threads may encode at once."""
        plain = Tokenizer.from_str(self._tokenizer.to_str())
        plain.encode_special_tokens = True
        return plain

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


class _Spelled:
    """Special tokens that texts spell, e.g. "<|im_end|>", out of sight while the template puts the texts together."""

    def __init__(self, special: Iterable[str], texts: Sequence[str]) -> None:
        found = sorted((token for token in special if any(token in text for text in texts)), key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, found))) if found else None
        self._mark = next(mark for mark in map(chr, PRIVATE) if not any(mark in text for text in texts))
        self._found = list[str]()

    def hide(self, text: str) -> str:
        """The text with a mark and a number in place of each."""
        return self._pattern.sub(self._hidden, text) if self._pattern else text

    def parts(self, text: str) -> Iterator[tuple[str, bool]]:
        """The text in pieces: those between the marks, and in their places what was hidden (True)."""
        pieces = re.split(f"{self._mark}(\\d+){self._mark}", text) if self._found else [text]
        for number, piece in enumerate(pieces):
            yield (self._found[int(piece)], True) if number % 2 else (piece, False)

    def _hidden(self, match: re.Match[str]) -> str:
        self._found.append(match[0])
        return f"{self._mark}{len(self._found) - 1}{self._mark}"


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
