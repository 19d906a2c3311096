"""Copies what the device needs of a checkpoint's text side: tokenizer, chat template, configs, special token ids."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import jinja2
from tokenizers import Tokenizer

from dycoke_edge.errors import InputError
from dycoke_edge.export.checkpoint import Checkpoint, read_json, read_text
from dycoke_edge.template import ChatTemplate


@dataclass(frozen=True)
class Tokens:
    """Special token ids: the placeholders for an image and a video, and what ends an answer."""

    image: int
    video: int
    stop: tuple[int, ...]


def write(folder: Path, checkpoint: Checkpoint) -> Tokens:
    """Write config.json, generation_config.json, preprocessor_config.json, tokenizer.json, chat_template.jinja."""
    source = checkpoint.path
    if not (source / "tokenizer.json").is_file():
        raise InputError(f"{source} has no tokenizer.json; save the tokenizer with AutoTokenizer(...).save_pretrained")
    config, stop = checkpoint.config, _stop_ids(checkpoint)
    tokens = Tokens(int(config.image_token_index), int(config.video_token_index), stop)
    _check_tokenizer(source / "tokenizer.json", tokens)
    for name in ("config.json", "tokenizer.json"):
        shutil.copyfile(source / name, folder / name)
    generation = source / "generation_config.json"
    data = read_json(generation) if generation.is_file() else {"eos_token_id": list(stop)}
    (folder / "generation_config.json").write_text(json.dumps(data, indent=1) + "\n")
    (folder / "preprocessor_config.json").write_text(json.dumps(checkpoint.pixels, indent=1) + "\n")
    (folder / "chat_template.jinja").write_text(_chat_template(source), encoding="utf-8")
    return tokens


def _check_tokenizer(file: Path, tokens: Tokens) -> None:
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises plain Exception
        raise InputError(f"{file} cannot be read ({error}); fetch it again") from None
    for name, token in (("image_token_index", tokens.image), ("video_token_index", tokens.video)):
        if tokenizer.id_to_token(token) is None:
            raise InputError(f"{file} has no token {token}, which config.json names as {name}; fetch both again")


def _stop_ids(checkpoint: Checkpoint) -> tuple[int, ...]:
    """What ends an answer: generation_config.json first, as in transformers, then config.json."""
    file = checkpoint.path / "generation_config.json"
    stop = read_json(file).get("eos_token_id") if file.is_file() else None
    if stop is None:
        stop = getattr(checkpoint.config.text_config, "eos_token_id", None)
    if stop is None:
        raise InputError(f"{file} names no eos_token_id; add it, or answers never end")
    stop = stop if isinstance(stop, list) else [stop]
    if not all(isinstance(token, int) for token in stop):
        raise InputError(f"{file}: eos_token_id is {stop}, not token ids; fetch it again")
    return tuple(stop)


def _chat_template(source: Path) -> str:
    """The template, from whichever of three files this transformers version wrote."""
    if (source / "chat_template.jinja").is_file():
        return _checked(source / "chat_template.jinja", read_text(source / "chat_template.jinja"))
    for name in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
        template = read_json(source / name).get("chat_template") if (source / name).is_file() else None
        if isinstance(template, str):
            return _checked(source / name, template)
    raise InputError(f"{source} has no chat_template.jinja; copy it from the original model")


def _checked(file: Path, template: str) -> str:
    try:
        ChatTemplate(template)
    except jinja2.TemplateError as error:
        raise InputError(f"{file} holds no valid chat template ({error}); copy it from the original model") from None
    return template
