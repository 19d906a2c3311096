"""Copies what the device needs of a checkpoint's text side: tokenizer, chat template, configs, special token ids."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from dycoke_edge.errors import InputError
from dycoke_edge.export.checkpoint import Checkpoint, read_json


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
    for name in ("config.json", "tokenizer.json"):
        shutil.copyfile(source / name, folder / name)
    stop = _stop_ids(checkpoint)
    generation = source / "generation_config.json"
    data = read_json(generation) if generation.is_file() else {"eos_token_id": list(stop)}
    (folder / "generation_config.json").write_text(json.dumps(data, indent=1) + "\n")
    (folder / "preprocessor_config.json").write_text(json.dumps(checkpoint.pixels, indent=1) + "\n")
    (folder / "chat_template.jinja").write_text(_chat_template(source))
    config = checkpoint.config
    return Tokens(int(config.image_token_index), int(config.video_token_index), stop)


def _stop_ids(checkpoint: Checkpoint) -> tuple[int, ...]:
    """What ends an answer: generation_config.json first, as in transformers, then config.json."""
    file = checkpoint.path / "generation_config.json"
    stop = read_json(file).get("eos_token_id") if file.is_file() else None
    if stop is None:
        stop = getattr(checkpoint.config.text_config, "eos_token_id", None)
    if stop is None:
        raise InputError(f"{file} names no eos_token_id; add it, or answers never end")
    return tuple(stop) if isinstance(stop, list) else (int(stop),)


def _chat_template(source: Path) -> str:
    """The template, from whichever of three files this transformers version wrote."""
    if (source / "chat_template.jinja").is_file():
        return (source / "chat_template.jinja").read_text()
    for name in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
        template = read_json(source / name).get("chat_template") if (source / name).is_file() else None
        if isinstance(template, str):
            return template
    raise InputError(f"{source} has no chat_template.jinja; copy it from the original model")
