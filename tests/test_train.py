"""Training `tiny`: questions in one batch do not see each other, it learns, goes on after a stop, and exports."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from benchmarks.scenes import batches, cells, model, questions, train
from benchmarks.scenes.world import plan
from dycoke_edge import Sampling, VideoLLM
from dycoke_edge.config import ExportSpec
from dycoke_edge.export.build import export


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return model.train_tokenizer()


@pytest.fixture(scope="module")
def fresh(tokenizer: Tokenizer) -> train.Learner:
    torch.manual_seed(0)
    return train.Learner(tokenizer).eval()


def test_the_shape_is_what_was_asked_for(fresh: train.Learner) -> None:
    text = fresh.tiny.config.text_config
    assert sum(weight.numel() for weight in fresh.tiny.parameters()) < 8_000_000
    assert text.num_hidden_layers >= 6
    assert text.num_key_value_heads * text.hidden_size // text.num_attention_heads * 2 % 256 == 0
    assert batches.TOKENS >= 49


def test_words_of_the_scenes_are_one_token(tokenizer: Tokenizer) -> None:
    for word in (" red", " triangle", " moves", " left", "yes", "nothing"):
        assert len(tokenizer.encode(word, add_special_tokens=False).ids) == 1, word
    for text in ("Wie spät ist es? 漢字 🙂", "a b"):
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids) == text


@torch.no_grad()
def test_a_question_is_blind_to_the_others(fresh: train.Learner, tokenizer: Tokenizer) -> None:
    batch = batches.make(tokenizer, "train", [3], 8)
    logits, _, _ = fresh(batch)
    one = batch.block[0] == 2
    columns = torch.nonzero(one).flatten()
    front = batch.positions[:, : -batch.ids.shape[1]]
    alone = replace(
        batch,
        ids=batch.ids[:, columns],
        labels=batch.labels[:, columns],
        answers=torch.nonzero(batch.labels[0, columns] != batches.IGNORED).flatten(),
        block=torch.ones_like(batch.block[:, columns]),
        positions=torch.cat((front, batch.positions[:, -batch.ids.shape[1] :][:, columns]), 1),
    )
    expected = logits[one[batch.answers]]
    got, _, _ = fresh(alone)
    # the first token of a block is predicted from the row before it, so compare the answers' rows only
    assert torch.allclose(got, expected, atol=1e-4)


def test_labels_are_the_answers(tokenizer: Tokenizer) -> None:
    asked = [questions.Question("colour", "Which colour is the ball?", "red")]
    ids, labels, numbers, positions = batches.blocks(tokenizer, asked)
    answer = [label for label in labels if label != batches.IGNORED]
    assert tokenizer.decode(answer, skip_special_tokens=False) == "red<|im_end|>"
    assert set(numbers) == {1} and positions == list(range(len(ids)))


@torch.no_grad()
def test_pooling_is_what_transformers_does(fresh: train.Learner) -> None:
    features = torch.randn(2, 14 * 14, 8)
    pool = type(fresh.tiny.model).apply_pooling
    assert torch.allclose(train.halved(features), pool(fresh.tiny.model, features), atol=1e-6)


def test_a_lossy_batch_loses_borders_frames_or_lines(tokenizer: Tokenizer) -> None:
    found = set()
    for seed in range(0, 80, 2):
        batch = batches.make(tokenizer, "train", [seed, seed + 1], 8, lossy=True)
        assert (batch.kept.diff(dim=1) > 0).all() and batch.kept.max() < 8 * batches.TOKENS
        assert batch.motions.shape[1] == batch.kept.shape[1]
        assert (batch.positions[:, : -batch.ids.shape[1]].diff() > 0).all()
        for row, clip in zip(batch.kept, (seed, seed + 1), strict=True):
            frames, places = row // batches.TOKENS, row % batches.TOKENS
            pictures = [places[frames == frame].tolist() for frame in frames.unique()]
            for picture in pictures:
                lines, columns = {p // cells.GRID for p in picture}, {p % cells.GRID for p in picture}
                assert len(picture) == len(lines) * len(columns) and min(len(lines), len(columns)) >= batches.LINES
            assert len(pictures) >= 4
            spark = plan(clip, "train", 8).spark
            if spark is not None:
                column, line = (int(c * cells.GRID) for c in spark.centre)
                assert spark.frame in frames
                inside = 0 < line < cells.GRID - 1 and 0 < column < cells.GRID - 1
                here = places[frames == spark.frame].tolist()
                assert not inside or line * cells.GRID + column in here
            kind = "alike" if all(picture == pictures[0] for picture in pictures) else "lines"
            found.add((kind, len(pictures) < 8, len(pictures[0]) < batches.TOKENS))
    assert {("lines", False, True), ("alike", True, True), ("alike", True, False), ("alike", False, True)} <= found
    whole = batches.make(tokenizer, "train", [0], 8)
    assert whole.kept.tolist() == [list(range(8 * batches.TOKENS))]


def test_cells_say_what_stands_there_and_where_it_goes() -> None:
    scene = next(
        s for s in (plan(seed, "train", 16) for seed in range(200)) if [t.motion for t in s.things] == ["cross"]
    )
    (thing,) = scene.things
    facts, motions = cells.facts(scene), cells.motions(scene)
    seen = facts[..., cells.FACTS.index(thing.colour)].astype(bool)
    assert np.array_equal(seen, facts[..., cells.FACTS.index(thing.shape)].astype(bool))
    frame = int(np.flatnonzero(((thing.track > 0.1) & (thing.track < 0.9)).all(1))[0])
    column, row = (thing.track[frame] * cells.GRID).astype(int)
    assert seen[frame].reshape(cells.GRID, cells.GRID)[row, column]
    assert facts[frame, row * cells.GRID + column, cells.FACTS.index(f"row {row}")]
    there = motions[frame][seen[frame]]
    assert there[:, cells.MOTIONS.index(thing.direction)].all() and there[:, cells.MOTIONS.index("came")].all()
    assert not there[:, cells.MOTIONS.index("stands")].any() and not motions[~seen].any()


@torch.no_grad()
def test_motions_are_asked_of_rows_that_answers_can_still_read(fresh: train.Learner, tokenizer: Tokenizer) -> None:
    """What later layers do to a row changes no motion, for no answer could read it there."""
    batch = batches.make(tokenizer, "train", [3], 8)
    layers = fresh.tiny.model.language_model.layers
    _, _, before = fresh(batch)
    saved = {
        index: layers[index].mlp.down_proj.weight.clone() for index in (train.MOTION_LAYER - 1, train.MOTION_LAYER)
    }
    changed = []
    for index, weight in saved.items():
        layers[index].mlp.down_proj.weight.mul_(-3)
        changed.append(not torch.allclose(fresh(batch)[2], before))
        layers[index].mlp.down_proj.weight.copy_(weight)
    assert changed == [True, False] and len(layers) > train.MOTION_LAYER + 1


def test_the_rate_falls_with_steps_or_time() -> None:
    assert train.rate(0.0, 1.0) < train.rate(0.01, 1.0) < train.rate(train.WARM, 1.0) == 1.0
    assert train.rate(0.5, 1.0) > train.rate(0.9, 1.0) > train.rate(1.0, 1.0) == pytest.approx(0.02)
    assert train.rate(1.3, 1.0) == pytest.approx(0.02)


@pytest.mark.slow
def test_training_ends_with_its_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "HELD_OUT_CLIPS", 2)
    done = train.train(tmp_path / "tiny", 1000, batch=2, workers=0, frames=(8,), minutes=1e-4)
    (line,) = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert 0 < len(done) == line["step"] < 1000 and {"short", "describe", "moving"} <= set(line)
    assert list((tmp_path / "tiny").glob("*.safetensors"))


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
