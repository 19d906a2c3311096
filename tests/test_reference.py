"""The reference is transformers without DyCoke and the paper with it; random models load."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from benchmarks import random_model, random_weights
from dycoke_edge.config import Compression
from tests import lively, reference

transformers = pytest.importorskip("transformers")


def load(directory: Path) -> tuple[Any, dict[str, Any]]:
    """An fp32 model with eager attention, and what transformers says about loading it."""
    model, info = transformers.LlavaOnevisionForConditionalGeneration.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    return model.eval(), info


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """A tiny model gains nothing from threads, which wait for one another on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    random_model.make(lively.SHAPE, path, seed=lively.SEED)
    return path


@pytest.fixture(scope="module")
def model(directory: Path) -> Any:
    return load(directory)[0]


def transformers_answer(model: Any, pixels: Tensor | None, count: int) -> list[int]:
    """Greedy ids of transformers' own generate."""
    video: list[int] = []
    if pixels is not None:
        video = [model.config.video_token_index] * (len(pixels) * 16 + 1)
    ids = torch.tensor([lively.PREFIX_IDS + video + lively.SUFFIX_IDS])
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=count,
        do_sample=False,
        **({} if pixels is None else {"pixel_values_videos": pixels[None]}),
    )
    answer: list[int] = out[0, ids.shape[1] :].tolist()
    return answer


@pytest.mark.parametrize("frames", [0, 1, 4, 9, 16])
def test_without_compression_it_is_transformers(model: Any, frames: int) -> None:
    pixels = lively.clip(frames, seed=2) if frames else None
    visual = None if pixels is None else reference.visual_tokens(model, pixels)
    off = Compression.off()
    trace = reference.generate(model, lively.PREFIX_IDS, visual, lively.SUFFIX_IDS, off, 64)
    assert trace.ids == transformers_answer(model, pixels, 64)
    assert min(trace.margins) > 1e-3
    assert (trace.num_visual, trace.refreshes) == (16 * frames, 0)
    assert set(trace.active_counts) == {16 * frames}


@pytest.mark.parametrize("name", lively.CASES)
def test_lively_cases(model: Any, name: str) -> None:
    case = lively.CASES[name]
    trace = lively_trace(model, case)
    threshold = case.compression.refresh_threshold
    assert (trace.refreshes, trace.returned) == (case.refreshes, case.returned)
    assert len(trace.ids) == 64 == len(trace.active_counts) + 1
    assert len(set(trace.ids)) >= 20
    assert max(trace.ids) < 256
    assert min(trace.margins) > 5e-3
    if case.compression.keep == "coverage":
        kept = max(1, int(16 * case.compression.budget))
        assert set(trace.active_counts) == {case.frames * max(1, int(kept * (1 - case.compression.prune_ratio)))}
        return
    assert min(trace.gaps) > 3e-6
    if not case.compression.free_parked:
        assert min(abs(cosine - threshold) for cosine in trace.cosines) > 4e-4
    counts = {int(trace.num_visual * (1 - case.compression.prune_ratio))}
    assert set(trace.active_counts) == counts | ({trace.num_visual} if name == "official" else set())


def lively_trace(model: Any, case: lively.Case) -> reference.Trace:
    visual = reference.visual_tokens(model, case.pixels)
    return reference.generate(
        model,
        lively.PREFIX_IDS,
        visual,
        lively.SUFFIX_IDS,
        case.compression,
        64,
        lively.SPLIT_LAYER,
    )


def test_keep_changes_the_answer(model: Any) -> None:
    case = lively.CASES["merge-0.7"]
    kept_all = lively.Case(9, 3, Compression(mode="paper", prune_ratio=0), 0, 0)
    assert lively_trace(model, case).ids != lively_trace(model, kept_all).ids


def test_visual_tokens_are_those_of_transformers(model: Any) -> None:
    pixels = lively.clip(5, seed=0)
    with torch.no_grad():
        theirs = model.get_video_features(pixels[None]).pooler_output[0]
    ours = torch.cat((reference.visual_tokens(model, pixels).flatten(0, 1), reference.newline(model)[None]))
    torch.testing.assert_close(ours, theirs)


def test_merge_on_the_papers_window() -> None:
    """Three tokens a frame; token f of frame f turns, so the least similar one is known."""
    tokens = torch.ones(8, 3, 2)
    for frame, place in ((1, 1), (2, 2), (3, 0), (5, 2)):
        tokens[frame, place] = torch.tensor([1.0, -1.0])
    # 3 against 2: places 0 and 2 differ alike, the lower stays. 6 and 7: all alike, the lowest.
    kept = [0, 1, 2, 4, 8, 9, 12, 13, 14, 17, 18, 21]
    assert reference.merge(tokens, 0.6).tolist() == kept
    assert reference.merge(tokens[:1], 0.6).tolist() == [0, 1, 2]


def test_merge_official() -> None:
    tokens = torch.randn(9, 16, 8, generator=torch.Generator().manual_seed(0))
    kept = reference.merge(tokens, 0.7, "official")
    per_frame = torch.bincount(kept // 16, minlength=9).tolist()
    assert per_frame == [16, 4, 4, 4, 16, 4, 4, 4, 0]
    last_whole = torch.bincount(reference.merge(tokens[:8], 0.7, "official") // 16).tolist()
    assert last_whole == [16, 4, 4, 4, 16, 4, 16, 4]
    with pytest.raises(ValueError, match="4 frames"):
        reference.merge(tokens[:4], 0.7, "official")


@pytest.mark.parametrize("tied", [False, True])
def test_both_layouts_load_as_the_same_model(tmp_path: Path, tied: bool) -> None:
    layouts: tuple[Literal["hub", "v5"], ...] = ("hub", "v5")
    states = []
    for layout in layouts:
        random_model.make("tiny", tmp_path / layout, seed=7, layout=layout, tied=tied)
        model, info = load(tmp_path / layout)
        assert not any(info.values()), info
        assert model.config.text_config.rope_parameters["rope_theta"] == 1e6
        assert (model.lm_head.weight is model.model.language_model.embed_tokens.weight) == tied
        states.append(model.state_dict())
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_v5_names_are_those_transformers_writes(directory: Path, model: Any, tmp_path: Path) -> None:
    from safetensors import safe_open

    model.save_pretrained(tmp_path)
    with (
        safe_open(directory / "model.safetensors", "pt") as ours,
        safe_open(tmp_path / "model.safetensors", "pt") as theirs,
    ):
        assert set(ours.keys()) == set(theirs.keys())
        assert all(torch.equal(ours.get_tensor(k), theirs.get_tensor(k)) for k in ours.keys())  # noqa: SIM118


def test_shards_fp16_and_fewer_layers(tmp_path: Path, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random_weights, "SHARD_BYTES", 1 << 19)
    monkeypatch.setattr(random_weights, "CHUNK", 1000)
    random_model.make("tiny", tmp_path, lively.SEED, "fp16", layers=2, vision_layers=1)
    assert len(list(tmp_path.glob("model-*.safetensors"))) >= 2
    small, info = load(tmp_path)
    assert not any(info.values()), info
    state = model.state_dict()
    assert len(small.model.language_model.layers) == 2
    for name, value in small.state_dict().items():
        assert torch.equal(value, state[name].half().float()), name


def test_config_says_random_and_ids_are_real(directory: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    assert config["dycoke_edge_random_seed"] == lively.SEED
    big = random_model.SHAPES["0.5b"]
    assert (big.token_id("<image>"), big.token_id("<video>")) == (151646, 151647)
    assert big.token_id("<|im_end|>") == 151645


@pytest.mark.parametrize(("name", "millions"), [("0.5b", 894), ("7b", 8031)])
def test_real_sizes(name: str, millions: int) -> None:
    shape = random_model.SHAPES[name]
    names = random_model.weight_shapes(random_model.model_config(shape), shape.tied)
    total = sum(torch.Size(size).numel() for size in names.values())
    assert round(total / 1e6) == millions


def test_chat_template_and_tokenizer(directory: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    content = [{"type": "text", "text": "Hi?"}, {"type": "video"}]
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    assert text == "<|im_start|>user <video>\nHi?<|im_end|><|im_start|>assistant\n"
    video = tokenizer.convert_tokens_to_ids("<video>")
    assert tokenizer(text).input_ids == [*lively.PREFIX_IDS, video, *lively.SUFFIX_IDS]
    assert tokenizer.decode(tokenizer("é 木 🙂\n").input_ids) == "é 木 🙂\n"
