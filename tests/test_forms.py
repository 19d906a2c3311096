"""The forms of the vision graph that GPU engines run: what they compute, and what is not rewritten."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import ModelProto, numpy_helper

from dycoke_edge import contract
from dycoke_edge.bundle import open_bundle, sealed
from dycoke_edge.config import ExportSpec
from dycoke_edge.errors import BundleError
from dycoke_edge.export import forms
from dycoke_edge.export.build import export
from dycoke_edge.ort import onnxruntime
from tests import lively

FORMS = ("vision_cuda", "vision_trt")
LAYERS = 3  # of the tiny tower
Change = Callable[[ModelProto], None]
WRITERS = {"vision_cuda": forms.write_cuda, "vision_trt": forms.write_tensorrt}


def run(path: Path, pixels: NDArray[Any]) -> NDArray[Any]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (tokens,) = session.run(None, {"pixels": pixels})
    assert isinstance(tokens, np.ndarray)
    return tokens


def ops(path: Path) -> list[str]:
    return [node.op_type for node in onnx.load(path, load_external_data=False).graph.node]


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("frames", [1, 3])
def test_a_form_computes_what_the_traced_graph_does(tiny_bundle: Path, name: str, frames: int) -> None:
    pixels = lively.clip(frames, 1).numpy()
    want, got = (run(tiny_bundle / "onnx" / f"{graph}.onnx", pixels) for graph in ("vision", name))
    assert np.abs(got - want).max() < 3e-6 * np.abs(want).max()


@pytest.mark.parametrize("name", FORMS)
def test_a_half_precision_form_is_as_near(half_bundle: Path, name: str) -> None:
    pixels = lively.clip(2, 1).numpy().astype(np.float16)
    want, got = (run(half_bundle / "onnx" / f"{graph}.onnx", pixels) for graph in ("vision", name))
    assert got.dtype == np.float16
    assert np.abs(got.astype(np.float32) - want).max() < 2e-3 * np.abs(want).max()


def test_what_a_layer_is_made_of_for_cuda(tiny_bundle: Path) -> None:
    """Six products, and one kernel each for Q's bias, attention, GELU and two norms; the first norm stands alone."""
    found = ops(tiny_bundle / "onnx/vision_cuda.onnx")
    start = found.index("LayerNormalization")
    layer = ["MatMul", "Add", "MatMul", "MatMul", "MultiHeadAttention", "MatMul", "SkipLayerNormalization"]
    layer += ["MatMul", "FastGelu", "MatMul", "SkipLayerNormalization"]
    assert found[start + 1 : start + 1 + 2 * len(layer)] == layer * 2


def test_the_forms_go_to_their_engines(tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = open_bundle(tiny_bundle)
    names = {provider: bundle.graph_path("vision", provider).name for provider in ("cpu", "cuda", "tensorrt")}
    assert names == {"cpu": "vision.onnx", "cuda": "vision_cuda.onnx", "tensorrt": "vision_trt.onnx"}
    assert bundle.graph_path("merge_070", "cuda") == bundle.graph_path("merge_070")
    old = tmp_path / "old"
    shutil.copytree(tiny_bundle, old)
    manifest = json.loads((old / "dycoke_edge.json").read_text())
    for form in FORMS:
        del manifest["files"][f"onnx/{form}.onnx"]
        (old / f"onnx/{form}.onnx").unlink()
    (old / "dycoke_edge.json").write_text(sealed(manifest))
    assert open_bundle(old).graph_path("vision").is_file()
    for (_, provider), form in contract.FORMS.items():
        with pytest.raises(BundleError, match=f"no onnx/{form}.onnx, which --provider {provider} runs; export again"):
            open_bundle(old).graph_path("vision", provider)


@pytest.mark.parametrize("name", FORMS)
def test_positions_may_be_looked_up(tiny_bundle: Path, tmp_path: Path, name: str) -> None:
    """The exporter leaves a Gather where the table of positions is larger than 8,192 numbers, as every real one is."""
    model = onnx.load(tiny_bundle / "onnx/vision.onnx", load_external_data=False)
    folder = str(tiny_bundle / "onnx")
    (table,) = (t for t in model.graph.initializer if list(t.dims) == [1, 49, 64])
    rows = numpy_helper.to_array(table, folder)[0]
    order = np.random.default_rng(0).permutation(49)
    model.graph.initializer.extend(
        [
            numpy_helper.from_array(rows[np.argsort(order)], "table"),
            numpy_helper.from_array(order[None].astype(np.int64), "places"),
        ]
    )
    model.graph.node.insert(0, onnx.helper.make_node("Gather", ["table", "places"], [table.name], axis=0))
    model.graph.initializer.remove(table)
    (tmp_path / "vision.onnx").write_bytes(model.SerializeToString())
    shutil.copy(tiny_bundle / "onnx/vision.onnx.data", tmp_path)
    WRITERS[name](tmp_path / "vision.onnx", tmp_path / "form.onnx", LAYERS)
    pixels = lively.clip(2, 1).numpy()
    want, got = run(tiny_bundle / "onnx/vision.onnx", pixels), run(tmp_path / "form.onnx", pixels)
    assert np.abs(got - want).max() < 3e-6 * np.abs(want).max()


def test_a_tower_that_is_left_early(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """A checkpoint may take its features from an earlier layer than the last."""
    model = tmp_path / "model"
    shutil.copytree(tiny_checkpoint, model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"vision_feature_layer": -2}))
    export(model, tmp_path / "bundle", ExportSpec(merge_ratio=(0.5,)))
    assert ops(tmp_path / "bundle/onnx/vision_cuda.onnx").count("MultiHeadAttention") == LAYERS - 1


# What is not rewritten


def replaced(op: str, other: str, last: bool = False) -> Change:
    def change(model: ModelProto) -> None:
        [node for node in model.graph.node if node.op_type == op][-1 if last else 0].op_type = other

    return change


def constant(user: str, value: float) -> Change:
    """Another value for the constant of the first node of an op."""

    def change(model: ModelProto) -> None:
        node = next(node for node in model.graph.node if node.op_type == user)
        for tensor in model.graph.initializer:
            if tensor.name in node.input:
                tensor.CopyFrom(numpy_helper.from_array(np.array(value, np.float32), tensor.name))

    return change


def strides(model: ModelProto) -> None:
    conv = next(node for node in model.graph.node if node.op_type == "Conv")
    next(attribute for attribute in conv.attribute if attribute.name == "strides").ints[:] = [7, 7]


def turned(model: ModelProto) -> None:
    """K^T as another permutation."""
    node = next(n for n in model.graph.node if n.op_type == "Transpose" and list(n.attribute[0].ints) == [0, 2, 3, 1])
    node.attribute[0].ints[:] = [0, 2, 1, 3]


ATTENTION = [
    ("2 attentions in 3 layers", replaced("Softmax", "LogSoftmax")),
    ("not 1/sqrt", constant("Mul", 0.5)),
    ("Transpose", turned),
    ("Reshape", replaced("Reshape", "Flatten", last=True)),
]
ONLY_CUDA = [
    ("norms", replaced("LayerNormalization", "InstanceNormalization")),
    ("2 GELUs in 3 layers", replaced("Tanh", "Sigmoid")),
    ("not in a tanh-GELU", constant("Pow", 2.0)),
    ("Conv", strides),
    ("no convolution", replaced("Conv", "ConvTranspose")),
]
CASES = [(name, *case) for name in WRITERS for case in ATTENTION] + [("vision_cuda", *case) for case in ONLY_CUDA]


@pytest.mark.parametrize(("name", "said", "change"), CASES)
def test_a_graph_of_another_form_is_refused(
    tiny_bundle: Path, tmp_path: Path, name: str, said: str, change: Change
) -> None:
    model = onnx.load(tiny_bundle / "onnx/vision.onnx", load_external_data=False)
    change(model)
    (tmp_path / "vision.onnx").write_bytes(model.SerializeToString())
    shutil.copy(tiny_bundle / "onnx/vision.onnx.data", tmp_path)
    with pytest.raises(BundleError) as caught:
        WRITERS[name](tmp_path / "vision.onnx", tmp_path / "form.onnx", LAYERS)
    assert said in str(caught.value) and "please report" in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "form.onnx").exists()
