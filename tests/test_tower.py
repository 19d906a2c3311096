"""The vision tower's own kernels, each against numpy, and the whole against the vision graph on the CPU."""

from __future__ import annotations

import math
import shutil
from ctypes import c_float, c_int32
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from dycoke_edge import VideoLLM
from dycoke_edge.bundle import VISION_WEIGHTS, Bundle, open_bundle
from dycoke_edge.cli import main
from dycoke_edge.config import Compression, EngineSpec, LiveSpec, Sampling
from dycoke_edge.contract import VisionTable
from dycoke_edge.errors import BundleError, EngineError, UsageError
from dycoke_edge.export.vision import pooling_matrix
from dycoke_edge.runtime import ort_cuda
from dycoke_edge.runtime.engine import OrtCpuEngine, open_engine
from dycoke_edge.runtime.gpu import merge
from dycoke_edge.runtime.gpu.device import Device, DeviceArray
from dycoke_edge.runtime.gpu.engine import KernelEngine
from dycoke_edge.runtime.gpu.kernels import BLOCK, suffix, warps
from dycoke_edge.runtime.gpu.tower import MOST_GRAPHS, Tower
from tests.emulator import EmulatedDevice

Array = NDArray[Any]
TYPES = [np.float32, np.float16]


def close(dtype: Any) -> float:
    return 4e-3 if dtype == np.float16 else 1e-5


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("patch", "side", "size"), [(8, 4, 32), (14, 3, 45)])
def test_patches_are_what_a_convolution_sees(device: Device, patch: int, side: int, size: int, dtype: Any) -> None:
    pixels = np.random.default_rng(0).standard_normal((2, 3, size, size)).astype(dtype)
    depth = -(-3 * patch**2 // 8) * 8
    out = DeviceArray.empty(device, (2, side**2, depth), dtype)
    grid, sizes = (-(-(side**2) * depth // BLOCK), 2, 1), map(c_int32, (size, patch, side, depth))
    device.kernel(f"patches_{suffix(dtype)}", grid, BLOCK, DeviceArray.of(device, pixels), out, *sizes)()
    unfolded = torch.nn.functional.unfold(torch.from_numpy(pixels.astype(np.float32)), patch, stride=patch)
    found = out.numpy()
    np.testing.assert_array_equal(found[..., : 3 * patch**2], unfolded.transpose(1, 2).numpy())
    assert not found[..., 3 * patch**2 :].any()


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("rows", "width"), [(1, 8), (9, 160), (17, 1152), (3, 2048)])
def test_layer_norm(device: Device, rows: int, width: int, dtype: Any) -> None:
    random = np.random.default_rng(width)
    x = (random.standard_normal((rows, width)) * 3 + 5).astype(dtype)
    gain, bias = random.standard_normal((2, width)).astype(dtype)
    out = DeviceArray.empty(device, (rows, width), dtype)
    given = [DeviceArray.of(device, array) for array in (x, gain, bias)]
    sizes = c_int32(rows), c_int32(width)
    device.kernel(f"layer_norm_{suffix(dtype)}", warps(rows), BLOCK, *given, c_float(1e-6), out, *sizes)()
    wide = x.astype(np.float64)
    normed = (wide - wide.mean(1, keepdims=True)) / np.sqrt(wide.var(1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(out.numpy(), normed * gain + bias, rtol=close(dtype), atol=close(dtype))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("each", [8, 5000])
def test_places_are_added_to_every_frame(device: Device, each: int, dtype: Any) -> None:
    random = np.random.default_rng(each)
    x, offset = random.standard_normal((3, each)).astype(dtype), random.standard_normal(each).astype(dtype)
    given = DeviceArray.of(device, x)
    grid = -(-each * np.dtype(dtype).itemsize // (16 * BLOCK)), 3, 1
    args = given, DeviceArray.of(device, offset), c_int32(each)
    device.kernel(f"add_places_{suffix(dtype)}", grid, BLOCK, *args)()
    np.testing.assert_allclose(given.numpy(), x.astype(np.float32) + offset, rtol=close(dtype), atol=close(dtype))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("side", "near"), [(27, 0), (14, 1), (5, 0), (1, 0)])
def test_pooling_of_gelu(device: Device, side: int, near: int, dtype: Any) -> None:
    half, width = -(-side // 2), 24
    x = np.random.default_rng(side).standard_normal((2, side**2, width)).astype(dtype) * 3
    out = DeviceArray.empty(device, (2, half**2, width), dtype)
    sizes = map(c_int32, (side, half, width, near))
    device.kernel(f"gelu_pool_{suffix(dtype)}", (1, half**2, 2), BLOCK, DeviceArray.of(device, x), out, *sizes)()
    wide = x.astype(np.float64)
    inner = np.tanh(math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3))
    act = wide / 2 * (1 + (inner if near else np.vectorize(math.erf)(wide / math.sqrt(2))))
    want = pooling_matrix(side).numpy() @ act
    np.testing.assert_allclose(out.numpy(), want, rtol=close(dtype), atol=close(dtype))


@pytest.fixture(params=["tiny_bundle", "half_bundle"])
def bundle(request: pytest.FixtureRequest) -> Bundle:
    return open_bundle(request.getfixturevalue(request.param))


def pixels_for(bundle: Bundle, frames: int) -> Array:
    size = bundle.model.image_size
    return np.random.default_rng(frames).uniform(-1, 1, (frames, 3, size, size)).astype(bundle.model.numpy_dtype)


def tokens_for(bundle: Bundle, frames: int) -> Array:
    model = bundle.model
    return np.zeros((frames, model.tokens_per_frame, model.hidden_size), model.numpy_dtype)


def graph(bundle: Bundle, pixels: Array) -> Array:
    """What the vision graph gives on the CPU."""
    tokens = tokens_for(bundle, len(pixels))
    OrtCpuEngine(bundle, EngineSpec()).run("vision", {"pixels": pixels}, {"tokens": tokens})
    return tokens


def same(device: Device, bundle: Bundle, got: Array, want: Array) -> None:
    """cuBLASLt's GELU takes a GPU's own tanh, which is 1.1e-5 off; with erf in its place it would be 5e-4."""
    exact = isinstance(device, EmulatedDevice)
    close = (1e-5 if exact else 1e-4) if bundle.model.dtype == "fp32" else 4e-3
    assert np.abs(got.astype(np.float32) - want).max() < close * np.abs(want.astype(np.float32)).max()


def test_it_gives_what_the_graph_gives(device: Device, bundle: Bundle) -> None:
    tower = Tower(device, bundle)
    # scratch memory is there, is larger than needed, has to grow; again and again, captured the second time
    for frames in (2, 1, 1, 1, 3, 1, 1, 3, 3):
        pixels, tokens = pixels_for(bundle, frames), DeviceArray.of(device, tokens_for(bundle, frames))
        tower.run(DeviceArray.of(device, pixels), tokens)
        same(device, bundle, tokens.numpy(), graph(bundle, pixels))


def test_a_number_of_frames_seen_before_is_captured(half_bundle: Path) -> None:
    device, bundle = EmulatedDevice(), open_bundle(half_bundle)
    tower, launched = Tower(device, bundle), list[int]()
    for frames in [1, 1, 1, 2, *range(3, 3 + MOST_GRAPHS), 1, 1]:
        pixels, tokens = pixels_for(bundle, frames), DeviceArray.of(device, tokens_for(bundle, frames))
        before = device.launches
        tower.run(DeviceArray.of(device, pixels), tokens)
        launched.append(device.launches - before)
    assert launched[1:3] == [2, 2]  # patches and the graph; products are not counted
    assert launched[0] == launched[3] == launched[-2] > 10 and launched[-1] == 2  # forgotten, and made again


def test_the_engine_takes_arrays_from_the_host_and_gives_memory_back(device: Device, bundle: Bundle) -> None:
    engine = KernelEngine(bundle, EngineSpec("cuda"), device)
    pixels, tokens = pixels_for(bundle, 2), tokens_for(bundle, 2)
    engine.run("vision", {"pixels": pixels}, {"tokens": tokens})
    same(device, bundle, tokens, graph(bundle, pixels))
    held = device.bytes_in_use
    engine.unload("vision")
    weights = (bundle.path / "onnx" / "vision.onnx.data").stat().st_size
    assert device.bytes_in_use < held - weights // 2


def test_graphs_are_onnxruntimes_and_only_when_needed(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, device: Device
) -> None:
    def missing() -> None:
        raise EngineError("onnxruntime has no CUDA kernels")

    monkeypatch.setattr(ort_cuda, "check_onnxruntime", missing)
    monkeypatch.setattr(ort_cuda, "open_device", lambda: device)
    for spec in (EngineSpec("cuda", vision="graph"), EngineSpec("cuda", decoder="graphs")):
        with pytest.raises(EngineError, match="no CUDA kernels"):
            open_engine(open_bundle(tiny_bundle), spec)
    engine = open_engine(open_bundle(tiny_bundle), EngineSpec("cuda"))
    engine.load("vision")
    engine.load("merge_070")
    for graph in ("merge_070", "decoder_deep", "vision", "vision"):  # nothing is opened to be closed
        engine.unload(graph)
    with pytest.raises(EngineError, match="no CUDA kernels"):
        engine.load("decoder_deep")
    monkeypatch.setattr(merge, "MOST_TOKENS", 15)  # of 16 that a frame has
    with pytest.raises(EngineError, match="no CUDA kernels"):
        open_engine(open_bundle(tiny_bundle), EngineSpec("cuda")).load("merge_070")


def test_a_whole_answer_without_onnxruntimes_kernels(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, device: Device
) -> None:
    monkeypatch.setattr(ort_cuda, "open_device", lambda: device)
    frames = np.random.default_rng(0).integers(0, 256, (6, 40, 60, 3), np.uint8)
    sampling = Sampling(max_new_tokens=12, stop_token_ids=())
    options: dict[str, Any] = {"kv_capacity": 1024, "prefill_chunk": 64, "vision_batch": 4}
    own, cpu = (VideoLLM.load(tiny_bundle, provider, **options) for provider in ("cuda", "cpu"))
    got, want = (llm.generate("What?", video=frames, sampling=sampling) for llm in (own, cpu))
    assert got.token_ids == want.token_ids


def test_a_live_video_without_onnxruntimes_kernels(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, device: Device
) -> None:
    monkeypatch.setattr(ort_cuda, "open_device", lambda: device)
    frames = np.random.default_rng(1).integers(0, 256, (7, 40, 60, 3), np.uint8)
    found = []
    for provider in ("cuda", "cpu"):
        llm = VideoLLM.load(tiny_bundle, provider, kv_capacity=1024, prefill_chunk=64)
        live = llm.live(Compression(), LiveSpec(4, 0.0, max_question_tokens=40, max_answer_tokens=12))
        for frame in frames:
            live.push(frame)
        answer = live.ask("What?", Sampling(max_new_tokens=8, stop_token_ids=()))
        found.append(([piece.token for piece in answer], live.num_tokens))
    assert found[0] == found[1]


def test_verify_without_onnxruntimes_kernels(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, device: Device, capsys: pytest.CaptureFixture[str]
) -> None:
    """It checks what runs: the tower, and merge by our kernels."""
    monkeypatch.setattr(ort_cuda, "open_device", lambda: device)
    assert main(["verify", str(tiny_bundle), "--provider", "cuda", "--decoder", "launched"]) == 0
    lines = [line.split()[:2] for line in capsys.readouterr().err.splitlines()]
    merges = [[f"merge_0{ratio}0", output] for ratio in (3, 5, 7, 9) for output in ("kept", "index")]
    assert lines == [["vision", "tokens"], *merges]
    assert main(["verify", str(tiny_bundle), "--vision", "kernels"]) == 2


def test_towers_that_it_is_not_made_for(device: Device, tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = open_bundle(tiny_bundle)
    files = {name: entry for name, entry in bundle.manifest.files.items() if name != VISION_WEIGHTS}
    old = Bundle(tiny_bundle, bundle.manifest.model_copy(update={"files": files}))
    with pytest.raises(BundleError, match=r"no onnx/vision_weights\.json.*use --vision graph, or export again"):
        Tower(device, old)
    wide = bundle.vision_table().model_copy(update={"width": 4096, "mlp": 30})
    with pytest.raises(EngineError, match="a vision tower with MLP 30, width 4096; use --vision graph"):
        Tower(device, Replaced(bundle, wide))
    copy = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, copy)
    (copy / VISION_WEIGHTS).write_text("{}")
    with pytest.raises(BundleError, match=r"vision_weights\.json cannot be read .*export again"):
        Bundle(copy, bundle.manifest).vision_table()
    (copy / "onnx" / "vision_vectors.bin").write_bytes(b"short")
    with pytest.raises(BundleError, match="does not hold what its weight table says"):
        Tower(device, Replaced(Bundle(copy, bundle.manifest), bundle.vision_table()))


class Replaced(Bundle):
    """A bundle with another table."""

    def __init__(self, bundle: Bundle, table: VisionTable) -> None:
        super().__init__(bundle.path, bundle.manifest)
        self._table = table

    def vision_table(self) -> VisionTable:
        return self._table


def test_own_kernels_need_the_cuda_provider() -> None:
    for provider in ("cpu", "tensorrt"):
        with pytest.raises(UsageError, match=rf"--vision\) needs --provider cuda, not {provider}; use --vision graph"):
            EngineSpec(provider, vision="kernels")
    assert [EngineSpec(p).seeing for p in ("cpu", "cuda", "tensorrt")] == ["graph", "kernels", "graph"]
