"""Export: every way a checkpoint is laid out gives the same bundle, checked and described, in bounded memory."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks import random_model, random_weights
from dycoke_edge import Compression, Sampling, VideoLLM
from dycoke_edge.bundle import EMBED, open_bundle, sha256
from dycoke_edge.config import ExportSpec
from dycoke_edge.errors import UsageError
from dycoke_edge.export.build import export
from dycoke_edge.export.checkpoint import Checkpoint, canonical
from dycoke_edge.parity import Parity
from tests import lively
from tests.commands import ROOT, here

QUICK = ExportSpec(merge_ratio=(0.0, 1.0), split_layer=lively.SPLIT_LAYER)  # ratios that need no graph
Sums = dict[str, str]


def sums(bundle: Path, pattern: str = "**/*") -> Sums:
    """File name -> sha256."""
    return {str(file.relative_to(bundle)): sha256(file) for file in bundle.glob(pattern) if file.is_file()}


def answer(bundle: Path, merge_ratio: float) -> tuple[list[int], int]:
    """Token ids of an answer about 5 frames, and how many visual tokens merge kept."""
    pixels = (lively.clip(5, seed=1).numpy() + 1) * 127.5
    video = pixels.round().astype(np.uint8).transpose(0, 2, 3, 1)
    llm = VideoLLM.load(bundle, kv_capacity=256)
    sampling = Sampling(max_new_tokens=5, stop_token_ids=())
    reply = llm.generate("What?", video, compression=Compression(merge_ratio=merge_ratio), sampling=sampling)
    return reply.token_ids, reply.stats.visual_tokens_kept


@pytest.fixture(scope="module")
def quick_bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("export") / "quick"
    export(tiny_checkpoint, path, QUICK)
    return path


def test_an_export_is_reproducible(tiny_checkpoint: Path, quick_bundle: Path, tmp_path: Path) -> None:
    """Every file, graphs and manifest included."""
    export(tiny_checkpoint, tmp_path / "again", QUICK)
    assert sums(tmp_path / "again") == sums(quick_bundle)


def test_no_graph_names_a_place_on_this_machine(tiny_bundle: Path) -> None:
    for file in tiny_bundle.rglob("*.onnx"):
        assert not re.findall(rb"/(?:work|home|tmp|usr|root|site-packages)[/\w]*|\w+\.py", file.read_bytes())


def test_hub_names_and_shards(monkeypatch: pytest.MonkeyPatch, quick_bundle: Path, tmp_path: Path) -> None:
    """Old names, many files: the same bundle but for config.json, which is copied."""
    monkeypatch.setattr(random_weights, "SHARD_BYTES", 1 << 20)
    random_model.make(lively.SHAPE, tmp_path / "hub", lively.SEED, layout="hub")
    assert len(list((tmp_path / "hub").glob("model-*-of-*.safetensors"))) > 3
    export(tmp_path / "hub", tmp_path / "bundle", QUICK)
    ours, theirs = sums(tmp_path / "bundle"), sums(quick_bundle)
    differing = {name for name in ours | theirs if ours.get(name) != theirs.get(name)}
    assert differing == {"config.json", "dycoke_edge.json"}


@pytest.mark.parametrize(
    "name",
    [
        "model.language_model.layers.0.mlp.up_proj.weight",
        "language_model.model.layers.0.mlp.up_proj.weight",
        "language_model.layers.0.mlp.up_proj.weight",
    ],
)
def test_names_of_decoder_weights(name: str) -> None:
    assert canonical(name) == "layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("lm_head.weight", "lm_head.weight"),
        ("language_model.lm_head.weight", "lm_head.weight"),
        ("model.language_model.norm.weight", "norm.weight"),
        ("language_model.model.embed_tokens.weight", "embed_tokens.weight"),
        ("model.image_newline", "image_newline"),
        ("model.vision_tower.vision_model.encoder.layers.0.mlp.fc1.bias", "vision_tower.encoder.layers.0.mlp.fc1.bias"),
        ("vision_tower.encoder.layers.0.mlp.fc1.bias", "vision_tower.encoder.layers.0.mlp.fc1.bias"),
        ("model.multi_modal_projector.linear_1.weight", "multi_modal_projector.linear_1.weight"),
    ],
)
def test_names_of_other_weights(name: str, expected: str) -> None:
    assert canonical(name) == expected


def test_tied_weights_and_an_early_cut(tmp_path: Path) -> None:
    """Both layouts; the head is the embedding table."""
    found = []
    for layout in ("hub", "v5"):
        random_model.make(lively.SHAPE, tmp_path / layout, lively.SEED, layout=layout, tied=True)
        assert not any("lm_head" in name for name in load_file(tmp_path / layout / "model.safetensors"))
        export(tmp_path / layout, bundle := tmp_path / f"bundle-{layout}", replace(QUICK, split_layer=1))
        found.append(sums(bundle, "onnx/*"))
    assert found[0] == found[1]
    table = np.load(bundle / EMBED)
    graph = onnx.load(bundle / "onnx/decoder_deep.onnx").graph
    head = next(onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer if tensor.name == "lm_head")
    assert np.array_equal(head.T, table[:-1])
    assert open_bundle(bundle).model.split_layer == 1 and len(answer(bundle, 1.0)[0]) == 5


def test_bf16_weights_and_a_late_cut(tiny_checkpoint: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_checkpoint, model)
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(model / "model.safetensors").items()}
    save_file(tensors, model / "model.safetensors")
    results = list[Parity]()
    export(model, tmp_path / "bundle", replace(QUICK, split_layer=5), on_parity=results.append)
    assert all(result.ok for result in results)
    table = torch.from_numpy(np.load(tmp_path / "bundle" / EMBED))
    assert torch.equal(table[:-1], tensors["language_model.model.embed_tokens.weight"].float())
    assert torch.equal(table[-1], tensors["image_newline"].float())
    assert open_bundle(tmp_path / "bundle").model.split_layer == 5
    assert len(answer(tmp_path / "bundle", 1.0)[0]) == 5


def test_ratios_without_a_graph(quick_bundle: Path) -> None:
    assert not list(quick_bundle.rglob("merge*")) and open_bundle(quick_bundle).manifest.merge_ratios == (0.0, 1.0)
    assert answer(quick_bundle, 0.0)[1] == 5 * 16
    assert answer(quick_bundle, 1.0)[1] == 2 * 16  # frames 0 and 4 begin windows


def test_ratios_that_are_the_same(tiny_checkpoint: Path, tmp_path: Path) -> None:
    manifest = export(tiny_checkpoint, tmp_path / "b", replace(QUICK, merge_ratio=(1.0, 0.5, 0.5000000000001)))
    assert manifest.merge_ratios == (0.5, 1.0)
    assert [name for name in manifest.files if "merge" in name] == ["onnx/merge_050.onnx"]


def test_progress_parity_and_manifest(
    capsys: pytest.CaptureFixture[str], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    shares, results = list[tuple[str, float]](), list[Parity]()
    manifest = export(
        tiny_checkpoint,
        tmp_path / "bundle",
        QUICK,
        lambda what, share: shares.append((what, share)),
        results.append,
    )
    told = [share for _, share in shares]
    assert told == sorted(told) and (told[0], told[-1]) == (0.0, 1.0)
    assert sum(what.startswith("decoder layer") for what, _ in shares) == 6
    rows = [f"new_{kv}_{i}" for i in range(6) for kv in "kv"]
    tokens = ["tokens"] * 3  # of vision and its forms
    assert [result.output for result in results] == [*tokens, "hidden", "attention", *rows[:6], "logits", *rows[6:]]
    assert all(result.ok and result.argmax == 1 and result.relative < 1e-5 for result in results)
    assert json.loads(json.dumps(results[0].as_dict()))["ok"] is True
    assert manifest == open_bundle(tmp_path / "bundle").manifest
    assert manifest.model_dump(exclude={"files", "made_by", "model"}) == expected_facts()
    files = {str(path.relative_to(tmp_path / "bundle")) for path in (tmp_path / "bundle").rglob("*") if path.is_file()}
    assert files == {*manifest.files, "dycoke_edge.json"}


def expected_facts() -> dict[str, Any]:
    half = (0.5, 0.5, 0.5)
    ids = {"image_token_id": 259, "video_token_id": 260, "newline_id": 264, "stop_token_ids": (258,)}
    about = {
        "format_version": 1,
        "family": "llava_onevision",
        "task": "image-text-to-text",
        "random_seed": lively.SEED,
        "knows": None,
    }
    return {**about, **ids, "merge_ratios": (0.0, 1.0), "image_mean": half, "image_std": half}


def test_every_parity_is_a_line(capsys: pytest.CaptureFixture[str], tiny_checkpoint: Path, tmp_path: Path) -> None:
    outcome = here(capsys, "export", tiny_checkpoint, tmp_path / "b", "--merge-ratio", 1, "--dtype", "fp16")
    line = r"(\w+) +(\w+) +max abs \d\.\de[-+]\d\d +relative \d\.\de[-+]\d\d +argmax +\d+\.\d\d% +ok"
    lines = re.findall(f"^{line}$", outcome.err, re.M)
    assert len(lines) == 3 + 2 + 6 + 1 + 6 == len(outcome.err.splitlines()) - 1
    assert lines[0] == ("vision", "tokens") and ("decoder_deep", "logits") in lines


def test_where_settings_of_a_checkpoint_are_found(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Other transformers versions write other files."""
    model = tmp_path / "model"
    shutil.copytree(tiny_checkpoint, model)
    template = "{% generation %}{% endgeneration %}" + (model / "chat_template.jinja").read_text()  # as the real one's
    (model / "chat_template.jinja").unlink()
    (model / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    pixels = json.loads((model / "video_preprocessor_config.json").read_text())
    (model / "video_preprocessor_config.json").unlink()
    (model / "preprocessor_config.json").unlink()
    (model / "processor_config.json").write_text(json.dumps({"video_processor": pixels}))
    (model / "generation_config.json").unlink()
    manifest = export(model, tmp_path / "bundle", QUICK)
    assert manifest.stop_token_ids == (258,) and manifest.image_mean == (0.5, 0.5, 0.5)
    assert (tmp_path / "bundle" / "chat_template.jinja").read_text() == template
    assert open_bundle(tmp_path / "bundle").manifest == manifest


def test_one_file_is_preferred_to_shards(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """As transformers does, where both are there."""
    shutil.copytree(tiny_checkpoint, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors.index.json").write_text('{"weight_map": {"a": "gone.safetensors"}}')
    assert Checkpoint(tmp_path / "model").num_parameters == Checkpoint(tiny_checkpoint).num_parameters


@pytest.mark.slow
def test_memory_does_not_grow_with_layers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """6 more layers of 30 MB in fp16: the heap grows by less than one and a half of them."""
    shape = random_model.Shape(
        text=random_model.Text(1024, 4096, 8, 16, 4, 264),
        vision=random_model.Vision(28, 14, 64, 128, 2, 4),
        first_special=256,
    )
    monkeypatch.setitem(random_model.SHAPES, "wide", shape)
    (least, small), (most, large) = (_peak(tmp_path, layers) for layers in (2, 8))
    for _ in range(3):  # one run in five peaks 50 MB higher by chance; weights that pile up do so in every run
        if most - least >= (large - small) / 4:
            most = min(most, _peak(tmp_path, 8)[0])
    assert large - small > 170e6 and most - least < (large - small) / 4, (most - least, large - small)


def _peak(folder: Path, layers: int) -> tuple[int, int]:
    """Most bytes of heap while a model of the shape "wide" is exported, and those of its deep layers' weights."""
    model, bundle = folder / f"model-{layers}", folder / f"bundle-{layers}"
    random_model.make("wide", model, dtype="fp16", layers=layers)
    command = [sys.executable, "-m", "tests.peak_memory", str(model), str(bundle), "fp16"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    size = (bundle / "onnx/decoder_deep.onnx.data").stat().st_size
    shutil.rmtree(model)
    shutil.rmtree(bundle)
    return int(done.stdout), size


def test_two_exports_to_one_bundle_do_not_mix(tiny_checkpoint: Path, tmp_path: Path) -> None:
    target = tmp_path / "bundle"

    def second(what: str, share: float) -> None:
        if what == "vision":
            with pytest.raises(UsageError, match="another export"):
                export(tiny_checkpoint, target)
            assert (tmp_path / ".bundle.partial").exists()

    export(tiny_checkpoint, target, ExportSpec(merge_ratio=(0.5,)), second)
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
