"""Where a bundle says that the vision encoder's weights lie: that they are there, once, and are the encoder's."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from dycoke_edge.bundle import VISION_WEIGHTS, Bundle, open_bundle
from dycoke_edge.config import EngineSpec
from dycoke_edge.contract import VisionTable
from dycoke_edge.errors import BundleError
from dycoke_edge.export.checkpoint import Checkpoint
from dycoke_edge.export.tower import VECTORS
from dycoke_edge.export.vision import load_vision, write_vision
from dycoke_edge.ort import onnxruntime
from dycoke_edge.parity import run_on_cpu
from dycoke_edge.runtime.gpu.engine import KernelEngine
from tests import lively
from tests.emulator import EmulatedDevice
from tests.vision_reference import encode, weights_of

Array = NDArray[Any]
Change = Callable[[dict[str, Any]], None]
DATA = "vision.onnx.data"


@pytest.fixture(params=["tiny_bundle", "half_bundle"])
def bundle(request: pytest.FixtureRequest) -> Bundle:
    return open_bundle(request.getfixturevalue(request.param))


def same_as_graph(bundle: Bundle, table: VisionTable, weights: dict[str, Array]) -> None:
    """The encoder that the table describes against the vision graph on the CPU, for three frames."""
    pixels = lively.clip(3, 1).numpy().astype(bundle.model.numpy_dtype)
    (want,) = run_on_cpu(bundle.path / "onnx/vision.onnx", {"pixels": pixels}, bundle.model.dtype)
    error = np.abs(encode(table, weights, pixels) - want).max()
    assert error < (3e-6 if bundle.model.dtype == "fp32" else 4e-3) * np.abs(want.astype(np.float64)).max()


def test_the_table_is_the_graphs_encoder(bundle: Bundle) -> None:
    same_as_graph(bundle, bundle.vision_table(), weights_of(bundle))


def test_weights_lie_where_the_graph_has_them(bundle: Bundle) -> None:
    """Matrices are not stored twice, and the file for the rest holds that and nothing else."""
    placed, item = bundle.vision_table().weights, np.dtype(bundle.model.numpy_dtype).itemsize
    matrices = {name for name, place in placed.items() if len(place.shape) == 2} - {"patch.offset"}
    assert {placed[name].file for name in matrices} == {DATA} and len(matrices) == 6 * 3 + 3
    size = {name: math.prod(place.shape) * item for name, place in placed.items()}
    written = sorted((placed[name].offset, size[name]) for name in placed if placed[name].file == VECTORS)
    ends = np.cumsum([0, *(length for _, length in written)]).tolist()
    assert [offset for offset, _ in written] == ends[:-1]
    entries = bundle.manifest.files
    assert entries[f"onnx/{VECTORS}"].size == ends[-1] and VISION_WEIGHTS in entries
    held = [place.offset + size[name] for name, place in placed.items() if place.file == DATA]
    assert max(held) <= entries[f"onnx/{DATA}"].size


def written(checkpoint: Path, folder: Path, like: Bundle, equal: bool = False, **changes: Any) -> Bundle:
    """A bundle with the vision encoder of a checkpoint with another config.json, all other files left out."""
    model = folder / "model"
    shutil.copytree(checkpoint, model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | changes))
    tensors = load_file(model / "model.safetensors")
    if equal:  # the exporter makes one constant of them, and none of zeros
        biases = [name for name in tensors if name.endswith("k_proj.bias") and "vision_tower" in name]
        tensors |= {name: tensors[biases[0]].clone() for name in biases}
        (patch,) = (name for name in tensors if name.endswith("patch_embedding.bias"))
        tensors[patch].zero_()
    if not changes.get("multimodal_projector_bias", True):
        tensors = {name: t for name, t in tensors.items() if "projector" not in name or not name.endswith("bias")}
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    (folder / "onnx").mkdir()
    opened = Checkpoint(model)
    write_vision(folder / "onnx", load_vision(opened, like.model.dtype), like.model)
    names = [VISION_WEIGHTS] if (folder / VISION_WEIGHTS).exists() else []
    files = dict.fromkeys(names, next(iter(like.manifest.files.values())))
    return Bundle(folder, like.manifest.model_copy(update={"files": files}))


def test_a_projector_without_biases_and_a_tower_left_early(
    tiny_checkpoint: Path, half_bundle: Path, tmp_path: Path
) -> None:
    """And biases that are the same in every layer."""
    options = {"multimodal_projector_bias": False, "projector_hidden_act": "gelu_pytorch_tanh"}
    like = open_bundle(half_bundle)
    made = written(tiny_checkpoint, tmp_path, like, equal=True, vision_feature_layer=-2, **options)
    table, weights = made.vision_table(), weights_of(made)
    assert (table.layers, table.projector_act) == (2, "gelu_pytorch_tanh")
    assert not weights["projector.1.bias"].any() and not weights["projector.2.bias"].any()
    np.testing.assert_array_equal(weights["layers.0.k.bias"], weights["layers.1.k.bias"])
    same_as_graph(made, table, weights)


def test_another_projector_has_a_graph_and_no_table(tiny_checkpoint: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    made = written(tiny_checkpoint, tmp_path, open_bundle(tiny_bundle), projector_hidden_act="relu")
    assert not (tmp_path / "onnx" / VECTORS).exists()
    onnxruntime.InferenceSession(str(tmp_path / "onnx/vision_cuda.onnx"), providers=["CPUExecutionProvider"])
    with pytest.raises(BundleError, match=r"no onnx/vision_weights\.json.*use --vision graph"):
        KernelEngine(made, EngineSpec("cuda"), EmulatedDevice())


def removed(table: dict[str, Any]) -> None:
    del table["weights"]["layers.1.fc2.bias"]


def reshaped(table: dict[str, Any]) -> None:
    table["weights"]["projector.1.weight"]["shape"].reverse()


def more(table: dict[str, Any]) -> None:
    table["layers"] = 4


def finer(table: dict[str, Any]) -> None:
    table["side"] = 8


def negative(table: dict[str, Any]) -> None:
    table["weights"]["patch.weight"]["offset"] = -1


CORRUPT: list[tuple[Change, str]] = [
    (removed, r"does not fit the model \(layers\.1\.fc2\.bias\)"),
    (reshaped, r"does not fit the model \(projector\.1\.weight\)"),
    (more, r"does not fit the model \(layers\.3\."),
    (finer, r"does not fit the model \(side\)"),
    (negative, "cannot be read"),
]


@pytest.mark.parametrize(("change", "said"), CORRUPT)
def test_a_corrupt_table(tiny_bundle: Path, tmp_path: Path, change: Change, said: str) -> None:
    table = json.loads((tiny_bundle / VISION_WEIGHTS).read_text())
    change(table)
    (tmp_path / "onnx").mkdir()
    (tmp_path / VISION_WEIGHTS).write_text(json.dumps(table))
    with pytest.raises(BundleError, match=rf"vision_weights\.json {said}.*; export again$"):
        Bundle(tmp_path, open_bundle(tiny_bundle).manifest).vision_table()
