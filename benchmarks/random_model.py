"""Make a complete Hugging Face LLaVA-OneVision directory with random weights.

    python -m benchmarks.random_model tiny DIR
    python -m benchmarks.random_model 0.5b DIR --dtype fp16 --layers 4

Weights are drawn one by one from (seed, name) and streamed to disk: a model of any size takes
little memory, and one with fewer layers has the same first layers. Needs numpy, tokenizers, and
transformers 4.5x or 5.x with torch (for names only). `config.json` says "dycoke_edge_random_seed",
so that no one takes what such a model says for an answer.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

from benchmarks.random_files import (
    SPECIALS,
    grid_pinpoints,
    tokenizer,
    write_json,
    write_preprocessing,
    write_tokenizer,
)
from benchmarks.random_weights import DType, Layout, Names, Recipe, write_weights

TORCH_NAME = {"fp32": "float32", "fp16": "float16"}


@dataclass(frozen=True)
class Vision:
    """A SigLIP tower without head."""

    image_size: int = 384
    patch_size: int = 14
    hidden_size: int = 1152
    intermediate_size: int = 4304
    num_hidden_layers: int = 26
    num_attention_heads: int = 16

    @property
    def patches(self) -> int:
        """Patches of a frame, before 2x2 pooling."""
        return (self.image_size // self.patch_size) ** 2


@dataclass(frozen=True)
class Text:
    """A Qwen2 decoder."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    max_position_embeddings: int = 32768


@dataclass(frozen=True)
class Shape:
    """A whole model. `first_special` is the id of <|endoftext|>; other special tokens follow."""

    text: Text
    vision: Vision = Vision()
    first_special: int = 151643
    tied: bool = False

    def token_id(self, text: str) -> int:
        """The id of a special token."""
        return self.first_special + SPECIALS.index(text)


SHAPES = {
    # 100 // 14 = 7 patches a side, pooled to 4: odd to even, with a margin, like 384 -> 27 -> 14.
    "tiny": Shape(
        text=Text(128, 256, 6, 4, 2, 264),
        vision=Vision(100, 14, 64, 128, 3, 4),
        first_special=256,
    ),
    "0.5b": Shape(text=Text(896, 4864, 24, 14, 2, 152000), tied=True),
    "7b": Shape(text=Text(3584, 18944, 28, 28, 4, 152128)),
}


def make(
    shape: str,
    directory: Path,
    seed: int = 0,
    dtype: DType = "fp32",
    layout: Layout = "v5",
    tied: bool | None = None,
    layers: int | None = None,
    vision_layers: int | None = None,
    processes: int = 1,
) -> None:
    """Write a model of SHAPES[shape] into `directory`; None keeps the shape's own value."""
    chosen = SHAPES[shape]
    text, vision = asdict(chosen.text), asdict(chosen.vision)
    text["num_hidden_layers"] = layers or chosen.text.num_hidden_layers
    vision["num_hidden_layers"] = vision_layers or chosen.vision.num_hidden_layers
    chosen = Shape(Text(**text), Vision(**vision), chosen.first_special, chosen.tied if tied is None else tied)
    config = model_config(chosen)
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / "config.json", config_json(config, chosen, dtype, layout, seed))
    write_json(directory / "generation_config.json", {**ids(chosen), "do_sample": False})
    write_tokenizer(directory, tokenizer(chosen.first_special))
    write_preprocessing(directory, chosen.vision.image_size, chosen.vision.patches)
    recipe = Recipe(seed, dtype, layout, chosen.tied, chosen.first_special)
    write_weights(directory, weight_shapes(config, chosen.tied), recipe, processes)


def ids(shape: Shape) -> dict[str, int]:
    """The ids that begin, end and pad."""
    start, end = shape.token_id("<|endoftext|>"), shape.token_id("<|im_end|>")
    return {"bos_token_id": start, "eos_token_id": end, "pad_token_id": start}


def model_config(shape: Shape) -> LlavaOnevisionConfig:
    """The configuration, as transformers makes it."""
    vision = asdict(shape.vision) | {"model_type": "siglip_vision_model", "vision_use_head": False}
    text = (
        asdict(shape.text)
        | ids(shape)
        | {
            "model_type": "qwen2",
            "rope_theta": 1e6,
            "tie_word_embeddings": shape.tied,
            "max_window_layers": shape.text.num_hidden_layers,
        }
    )
    return LlavaOnevisionConfig(
        vision_config=vision,
        text_config=text,
        tie_word_embeddings=shape.tied,
        image_token_index=shape.token_id("<image>"),
        video_token_index=shape.token_id("<video>"),
        image_grid_pinpoints=grid_pinpoints(shape.vision.image_size),
    )


def config_json(config: LlavaOnevisionConfig, shape: Shape, dtype: DType, layout: Layout, seed: int) -> dict[str, Any]:
    """config.json as of its day: hub has torch_dtype, rope_theta, ties in text_config only."""
    top = cast(dict[str, Any], json.loads(config.to_json_string()))
    text = top["text_config"]
    for part in (top, text, top["vision_config"]):
        for key in ("torch_dtype", "dtype", "transformers_version", "tie_word_embeddings"):
            part.pop(key, None)
    for key in ("rope_parameters", "rope_scaling", "rope_theta"):
        text.pop(key, None)
    text["tie_word_embeddings"] = shape.tied
    if layout == "hub":
        text["rope_theta"] = 1e6
        top |= {"torch_dtype": TORCH_NAME[dtype], "tie_word_embeddings": False}
    else:
        text["rope_parameters"] = {"rope_theta": 1e6, "rope_type": "default"}
        top |= {"dtype": TORCH_NAME[dtype], "tie_word_embeddings": shape.tied}
    top["architectures"] = ["LlavaOnevisionForConditionalGeneration"]
    return top | {"dycoke_edge_random_seed": seed}


def weight_shapes(config: LlavaOnevisionConfig, tied: bool) -> Names:
    """Names (of modules in transformers 5) and shapes of all weights, from the meta device."""
    with torch.device("meta"):
        state = LlavaOnevisionForConditionalGeneration(config).state_dict()
    names = {name.replace(".vision_model.", "."): tuple(value.shape) for name, value in state.items()}
    if tied:
        del names["lm_head.weight"]
    return names


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.random_model", description=__doc__)
    parser.add_argument("shape", choices=sorted(SHAPES))
    parser.add_argument("directory", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=sorted(TORCH_NAME), default="fp32")
    parser.add_argument("--layout", choices=("hub", "v5"), default="v5")
    parser.add_argument("--tied", action=argparse.BooleanOptionalAction)
    parser.add_argument("--layers", type=int, help="decoder layers (the shape's own)")
    parser.add_argument("--vision-layers", type=int, help="layers of the vision tower (the shape's own)")
    parser.add_argument("--processes", type=int, default=1, help="that draw weights, which are the same for any number")
    make(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
