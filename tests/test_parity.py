"""The runtime gives the ids that torch gives: transformers without compression, the plain reference with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import AutoTokenizer

from dycoke_edge import Compression, Message, Sampling, VideoLLM
from dycoke_edge.runtime.loop import Prompt
from dycoke_edge.runtime.stats import Stats
from dycoke_edge.runtime.step import Step
from tests import lively, reference

TOKENS = 64
Frames = NDArray[np.uint8]


@pytest.fixture
def llm(load: Callable[..., VideoLLM], tiny_bundle: Path) -> VideoLLM:
    """On every engine."""
    return load(tiny_bundle, kv_capacity=512, prefill_chunk=32)


def frames(count: int) -> Frames:
    """uint8 [F, 100, 100, 3] of the lively clip."""
    pixels = (lively.clip(count, seed=2).numpy() + 1) * 127.5
    return np.ascontiguousarray(pixels.round().astype(np.uint8).transpose(0, 2, 3, 1))


def transformers_ids(model: Any, checkpoint: Path, text: str, video: Frames | None, kind: str) -> list[int]:
    """Greedy ids of transformers: its tokenizer, its chat template, its generate."""
    place = f"<{kind}>"
    content: list[dict[str, str]] = [{"type": "text", "text": text}]
    if video is not None and place not in text:
        content.insert(0, {"type": kind})
    return conversation_ids(model, checkpoint, [{"role": "user", "content": content}], video, kind)


def conversation_ids(model: Any, checkpoint: Path, turns: list[Any], video: Frames | None, kind: str) -> list[int]:
    """The same of several messages, one of which has the place of the video."""
    tokenizer: Any = AutoTokenizer.from_pretrained(checkpoint)
    chat = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    count = 0 if video is None else len(video) * 16 + 1
    ids = tokenizer(chat.replace(f"<{kind}>", "<video>" * count), return_tensors="pt").input_ids
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if video is not None:
        pixels = (torch.from_numpy(video).permute(0, 3, 1, 2) / 255 - 0.5) / 0.5
        inputs["pixel_values_videos"] = pixels[None]
    out = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
    answer: list[int] = out[0, ids.shape[1] :].tolist()
    return answer


@pytest.mark.parametrize("count", [1, 4, 9, 16])
def test_off_equals_transformers_on_video(llm: VideoLLM, model: Any, tiny_checkpoint: Path, count: int) -> None:
    want = transformers_ids(model, tiny_checkpoint, "What?", frames(count), "video")
    reply = llm.generate("What?", video=frames(count), compression=Compression.off(), sampling=GREEDY)
    assert reply.token_ids == want
    assert len(set(want)) > 8  # a model that repeats itself would prove little


def test_off_equals_transformers_on_an_image(llm: VideoLLM, model: Any, tiny_checkpoint: Path) -> None:
    want = transformers_ids(model, tiny_checkpoint, "What?", frames(1), "image")
    reply = llm.generate("What?", image=frames(1)[0], compression=Compression.off(), sampling=GREEDY)
    assert reply.token_ids == want


def test_off_equals_transformers_on_text(llm: VideoLLM, model: Any, tiny_checkpoint: Path) -> None:
    want = transformers_ids(model, tiny_checkpoint, "Say something.", None, "video")
    assert llm.generate("Say something.", sampling=GREEDY).token_ids == want


@pytest.mark.parametrize("text", ["<video>\nWhat?", "Look here: <video> and there.", "And now <video>"])
def test_the_video_may_stand_anywhere(llm: VideoLLM, model: Any, tiny_checkpoint: Path, text: str) -> None:
    want = transformers_ids(model, tiny_checkpoint, text, frames(4), "video")
    reply = llm.generate(text, video=frames(4), compression=Compression.off(), sampling=GREEDY)
    assert reply.token_ids == want


@pytest.mark.parametrize("shown", [1, 3])
def test_off_equals_transformers_on_a_conversation(
    llm: VideoLLM, model: Any, tiny_checkpoint: Path, shown: int
) -> None:
    said = [("system", "Be brief."), ("user", "What?"), ("assistant", "A square."), ("user", "And then?")]
    messages = [Message(role, text, number == shown) for number, (role, text) in enumerate(said)]  # type: ignore
    turns = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in said]
    turns[shown]["content"].insert(0, {"type": "video"})  # type: ignore
    want = conversation_ids(model, tiny_checkpoint, turns, frames(4), "video")
    reply = llm.generate(messages, video=frames(4), compression=Compression.off(), sampling=GREEDY)
    assert reply.token_ids == want
    assert want != transformers_ids(model, tiny_checkpoint, "And then?", frames(4), "video")


GREEDY = Sampling(max_new_tokens=TOKENS, stop_token_ids=())


def answer(llm: VideoLLM, case: lively.Case, count: int = TOKENS) -> tuple[list[Step], Prompt]:
    """The runtime's steps for a lively case: the same graphs and loop as `generate`, from given pixels and ids."""
    pixels = case.pixels.numpy()
    model = llm.bundle.model
    tokens = llm.engine.empty((len(pixels), model.tokens_per_frame, model.hidden_size), np.float32)
    llm.engine.run("vision", {"pixels": pixels}, {"tokens": tokens})
    prefix, suffix = np.array(lively.PREFIX_IDS), np.array(lively.SUFFIX_IDS)
    prompt, _ = llm.assemble(prefix, suffix, tokens, case.compression, Stats())
    return list(llm._decoder.decode(prompt, case.compression, replace(GREEDY, max_new_tokens=count))), prompt


@pytest.mark.parametrize("chunk", [1, 7, 256])
@pytest.mark.parametrize("name", lively.CASES)
def test_compression_equals_the_torch_reference(
    load: Callable[..., VideoLLM], tiny_bundle: Path, model: Any, name: str, chunk: int
) -> None:
    case = lively.CASES[name]
    llm = load(tiny_bundle, kv_capacity=512, prefill_chunk=chunk)
    steps, prompt = answer(llm, case)
    tokens = reference.visual_tokens(model, case.pixels)
    want = reference.generate(
        model, lively.PREFIX_IDS, tokens, lively.SUFFIX_IDS, case.compression, TOKENS, lively.SPLIT_LAYER
    )
    assert [step.token for step in steps] == want.ids
    assert [step.active for step in steps[1:]] == want.active_counts
    assert (want.refreshes, want.returned) == (case.refreshes, case.returned)
    if case.compression.keep == "attention" and not case.compression.free_parked:
        assert want.returned >= 3
    assert prompt.num_visual == want.num_visual


def test_the_plain_answer_would_differ(llm: VideoLLM) -> None:
    """The cases above are lively: without keep, the same prompt gives other ids."""
    case = lively.CASES["merge-0.7"]
    with_keep = [step.token for step in answer(llm, case)[0]]
    without = lively.Case(case.frames, case.clip_seed, Compression(merge_ratio=0.7, prune_ratio=0.0), 0, 0)
    assert with_keep != [step.token for step in answer(llm, without)[0]]


def test_half_precision_follows_full_precision_where_margins_are_clear(
    load: Callable[..., VideoLLM], half_bundle: Path, tiny_bundle: Path
) -> None:
    """fp16: teacher-forced logits stay within 2 % of the fp32 bundle's, and so does the argmax where it is clear."""
    full, half = VideoLLM.load(tiny_bundle, kv_capacity=256), load(half_bundle, kv_capacity=256)
    for llm in (full, half):
        ids = np.arange(40) % 250
        llm._decoder.prefill(Prompt(ids, ids[:0]), 1)
    a, b = full._decoder.logits[0], half._decoder.logits[0]
    assert np.abs(a - b).max() < 0.02 * np.abs(a).max()
    assert a.argmax() == b.argmax() or np.sort(a)[-1] - np.sort(a)[-2] < 2 * np.abs(a - b).max()
