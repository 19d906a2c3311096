"""The small files of a LLaVA-OneVision directory: tokenizer, chat template, preprocessing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>")

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + ' ' -}}
{%- if message['content'] is string -%}
{{- '\\n' + message['content'] -}}
{%- else -%}
{%- for kind in ('image', 'video') -%}
{%- for part in message['content'] if part['type'] == kind -%}
{{- '<' + kind + '>' -}}
{%- endfor -%}
{%- endfor -%}
{%- for part in message['content'] if part['type'] == 'text' -%}
{{- '\\n' + part['text'] -}}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON file as Hugging Face does: indented, one newline at the end."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def tokenizer(first_special: int) -> Tokenizer:
    """Byte-level: 256 bytes, words " w256", " w257"... that no text encodes to, then SPECIALS."""
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {symbol: index for index, symbol in enumerate(symbols)}
    vocab |= {f"Ġw{index}": index for index in range(len(symbols), first_special)}
    result = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    result.normalizer = normalizers.NFC()
    result.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    result.decoder = decoders.ByteLevel()
    result.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in SPECIALS])
    assert result.token_to_id(SPECIALS[0]) == first_special
    return result


def write_tokenizer(directory: Path, made: Tokenizer) -> None:
    """tokenizer.json, tokenizer_config.json, special_tokens_map.json, chat_template.jinja."""
    made.save(str(directory / "tokenizer.json"))
    flags = {
        "lstrip": False,
        "normalized": False,
        "rstrip": False,
        "single_word": False,
        "special": True,
    }
    named = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    extra = ["<|im_start|>", "<image>", "<video>"]
    added = {str(made.token_to_id(text)): {"content": text, **flags} for text in SPECIALS}
    write_json(directory / "special_tokens_map.json", {"additional_special_tokens": extra, **named})
    write_json(
        directory / "tokenizer_config.json",
        {
            "added_tokens_decoder": added,
            "additional_special_tokens": extra,
            "clean_up_tokenization_spaces": False,
            "model_max_length": 32768,
            "processor_class": "LlavaOnevisionProcessor",
            "tokenizer_class": "PreTrainedTokenizerFast",
            **named,
        },
    )
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


def write_preprocessing(directory: Path, image_size: int, patches: int) -> None:
    """The preprocessor_config.json of images, of videos, and processor_config.json."""
    common = {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"height": image_size, "width": image_size},
        "processor_class": "LlavaOnevisionProcessor",
    }
    image = {
        "image_processor_type": "LlavaOnevisionImageProcessor",
        "do_pad": True,
        "image_grid_pinpoints": grid_pinpoints(image_size),
    }
    write_json(directory / "preprocessor_config.json", common | image)
    video = {"video_processor_type": "LlavaOnevisionVideoProcessor"}
    write_json(directory / "video_preprocessor_config.json", common | video)
    write_json(
        directory / "processor_config.json",
        {
            "image_token": "<image>",
            "video_token": "<video>",
            "num_image_tokens": patches,
            "processor_class": "LlavaOnevisionProcessor",
            "vision_aspect_ratio": "anyres_max_9",
            "vision_feature_select_strategy": "full",
        },
    )


def grid_pinpoints(image_size: int) -> list[list[int]]:
    """All sizes of 1 to 6 by 1 to 6 tiles, as in the real checkpoints."""
    return [[row * image_size, column * image_size] for row in range(1, 7) for column in range(1, 7)]
