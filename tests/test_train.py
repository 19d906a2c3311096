"""Training `tiny`: questions in one batch do not see each other, it learns, goes on after a stop, and exports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from transformers import LlavaOnevisionForConditionalGeneration

from benchmarks.scenes import batches, model, questions, train
from dycoke_edge import Sampling, VideoLLM
from dycoke_edge.config import ExportSpec
from dycoke_edge.export.build import export


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return model.train_tokenizer()


@pytest.fixture(scope="module")
def fresh(tokenizer: Tokenizer) -> Any:
    torch.manual_seed(0)
    make: Any = LlavaOnevisionForConditionalGeneration
    return make(model.config(tokenizer)).eval()


def test_the_shape_is_what_was_asked_for(fresh: Any) -> None:
    text = fresh.config.text_config
    assert sum(weight.numel() for weight in fresh.parameters()) < 8_000_000
    assert text.num_hidden_layers >= 6
    assert text.num_key_value_heads * text.hidden_size // text.num_attention_heads * 2 % 256 == 0
    assert batches.TOKENS >= 49


def test_words_of_the_scenes_are_one_token(tokenizer: Tokenizer) -> None:
    for word in (" red", " triangle", " moves", " left", "yes", "nothing"):
        assert len(tokenizer.encode(word, add_special_tokens=False).ids) == 1, word
    for text in ("Wie spät ist es? 漢字 🙂", "a b"):
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids) == text


@torch.no_grad()
def test_a_question_is_blind_to_the_others(fresh: Any, tokenizer: Tokenizer) -> None:
    batch = batches.make(tokenizer, "train", [3], 8)
    logits, _ = train.answer_logits(fresh, batch)
    one = batch.block[0] == 2
    alone = batches.Batch(
        batch.frames,
        batch.prefix,
        batch.ids[:, one],
        batch.labels[:, one],
        torch.ones_like(batch.block[:, one]),
        torch.cat((batch.positions[:, : -batch.ids.shape[1]], batch.positions[:, -batch.ids.shape[1] :][:, one]), 1),
    )
    wanted = batch.labels[0] != batches.IGNORED
    expected = logits[one[wanted]]
    got, _ = train.answer_logits(fresh, alone)
    # the first token of a block is predicted from the row before it, so compare the answers' rows only
    assert torch.allclose(got, expected, atol=1e-4)


def test_labels_are_the_answers(tokenizer: Tokenizer) -> None:
    asked = [questions.Question("colour", "Which colour is the ball?", "red")]
    ids, labels, numbers, positions = batches.blocks(tokenizer, asked)
    answer = [label for label in labels if label != batches.IGNORED]
    assert tokenizer.decode(answer, skip_special_tokens=False) == "red<|im_end|>"
    assert set(numbers) == {1} and positions == list(range(len(ids)))


@pytest.mark.slow
def test_twenty_steps_learn_resume_and_export(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "HELD_OUT_CLIPS", 2)
    out = tmp_path / "tiny"
    settings: dict[str, Any] = {"batch": 2, "every": 10, "workers": 0, "frames": (8,)}
    first = train.train(out, 10, **settings)
    again = train.train(out, 20, **settings)
    assert len(first) == len(again) == 10
    assert sum(again) / 10 < sum(first) / 10
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert [line["step"] for line in lines] == [10, 20]
    weights = list(out.glob("*.safetensors"))
    assert sum(file.stat().st_size for file in weights) < 16_000_000
    export(out, tmp_path / "bundle", ExportSpec(merge_ratio=(0.7,)))
    llm = VideoLLM.load(tmp_path / "bundle", kv_capacity=1024)
    reply = llm.generate("Is anything moving?", video="examples/clip.mp4", sampling=Sampling(max_new_tokens=8))
    assert 0 < reply.stats.visual_tokens_kept < reply.stats.visual_tokens_in
