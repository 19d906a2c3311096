"""`tiny`: the shape of the project's own LLaVA-OneVision, its tokenizer, and the small files beside its weights."""

from __future__ import annotations

from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import LlavaOnevisionConfig

from benchmarks.random_files import SPECIALS, grid_pinpoints, write_json, write_preprocessing, write_tokenizer
from benchmarks.scenes import questions, world

VOCABULARY = 512  # byte-level BPE: any text can be asked, the scenes' own words are one token each
TEXTS = 2000  # scenes whose texts the tokenizer is trained on
KNOWS = {  # goes into config.json, and with an export into the bundle
    "what": "drawn scenes: up to four coloured shapes that stand still or move",
    "questions": ["How many objects are there?", "Is anything moving?", "Which colour is the spark?"],
}
PATCH = 8  # 14 x 14 patches, pooled to 7 x 7 = 49 tokens a frame


def train_tokenizer() -> Tokenizer:
    """Train on the texts of training scenes; the special tokens come last."""
    texts = []
    for seed in range(TEXTS):
        for question in questions.ask(world.plan(seed, "train", 8), seed):
            texts += [question.text, question.answer]
    made = Tokenizer(models.BPE())
    made.normalizer = normalizers.NFC()
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    size = VOCABULARY - len(SPECIALS)
    made.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    )
    made.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in SPECIALS])
    return made


def config(tokenizer: Tokenizer) -> LlavaOnevisionConfig:
    """5.7 M parameters: SigLIP-style tower, projector, Qwen2 decoder of 6 layers, KV rows of 256 bytes in fp16."""
    ids = {text: int(tokenizer.token_to_id(text) or 0) for text in SPECIALS}
    vision = {
        "model_type": "siglip_vision_model",
        "image_size": world.SIDE,
        "patch_size": PATCH,
        "hidden_size": 160,
        "intermediate_size": 448,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "vision_use_head": False,
    }
    text = {
        "model_type": "qwen2",
        "hidden_size": 256,
        "intermediate_size": 704,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_window_layers": 6,
        "vocab_size": tokenizer.get_vocab_size(),
        "max_position_embeddings": 4096,
        "rope_theta": 1e5,
        "tie_word_embeddings": True,
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<|endoftext|>"],
    }
    made = LlavaOnevisionConfig(
        vision_config=vision,
        text_config=text,
        tie_word_embeddings=True,
        image_token_index=ids["<image>"],
        video_token_index=ids["<video>"],
        image_grid_pinpoints=grid_pinpoints(world.SIDE),
    )
    made.update({"dycoke_edge_knows": KNOWS})
    return made


def write_files(directory: Path, tokenizer: Tokenizer) -> None:
    """Everything but config.json and the weights."""
    write_tokenizer(directory, tokenizer)
    write_preprocessing(directory, world.SIDE, (world.SIDE // PATCH) ** 2)
    end = tokenizer.token_to_id("<|im_end|>")
    pad = tokenizer.token_to_id("<|endoftext|>")
    write_json(directory / "generation_config.json", {"eos_token_id": end, "pad_token_id": pad, "do_sample": False})
