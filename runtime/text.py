"""Text on the device: chat template, token ids, and text from tokens without ever half a character."""

from __future__ import annotations

from typing import Any

import jinja2
import numpy as np
from jinja2.sandbox import ImmutableSandboxedEnvironment
from numpy.typing import NDArray
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from dycoke_edge.bundle import Bundle
from dycoke_edge.errors import BundleError, UsageError

Ids = NDArray[np.int64]
Kind = str  # "video" or "image": what the template is told


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
            self._template = _environment().from_string(self._template_file.read_text(encoding="utf-8"))
        except (jinja2.TemplateError, OSError, UnicodeError) as error:
            raise BundleError(f"{self._template_file} is no template ({error}); export again") from None

    def encode(self, prompt: str, visual: Kind | None) -> tuple[Ids, Ids]:
        """Render a prompt and cut its ids at the visual placeholder: (before, after); after is empty without one.

        A prompt that names the placeholder itself (e.g. "<video>") puts the frames there; otherwise they come where
        the chat template puts them.
        """
        if not prompt.strip():
            raise UsageError('prompt (--prompt) is empty; ask something, e.g. --prompt "What happens?"')
        if not prompt.isprintable() and any("\ud800" <= letter <= "\udfff" for letter in prompt):
            raise UsageError("prompt (--prompt) is not valid UTF-8; type it in a UTF-8 terminal")
        placed = self._places(self._ids(prompt))
        content: list[dict[str, str]] = [{"type": "text", "text": prompt}]
        if visual and not len(placed):
            content.insert(0, {"type": visual})
        messages = [{"role": "user", "content": content}]
        try:
            ids = self._ids(self._template.render(messages=messages, add_generation_prompt=True))
        except (jinja2.TemplateError, TypeError) as error:
            raise BundleError(f"{self._template_file} cannot render this prompt ({error}); export again") from None
        places = self._places(ids)
        self._check(len(places), visual)
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

    def _ids(self, text: str) -> Ids:
        return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int64)

    def _places(self, ids: Ids) -> Ids:
        return np.flatnonzero(np.isin(ids, list(self._placeholders)))

    def _check(self, found: int, visual: Kind | None) -> None:
        if found > 1:
            raise UsageError(
                f"prompt (--prompt) has {found} places for a video or image; leave one, and ask about each apart"
            )
        if found and not visual:
            raise UsageError("prompt (--prompt) has a place for a video, but none was given; add --video or --image")
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


def _environment() -> ImmutableSandboxedEnvironment:
    """Templates come with a checkpoint, so they run in a sandbox, with what transformers gives them."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = _raise
    return environment


def _raise(message: str) -> Any:
    raise jinja2.TemplateError(message)
