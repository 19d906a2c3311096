"""ONNX Runtime on a GPU, without one: the engine over the emulated device and ONNX Runtime's CPU kernels, and what is
said where something is missing."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from numpy.typing import NDArray

from dycoke_edge import Compression, EngineError, EngineSpec, LiveSpec, Sampling, VideoLLM
from dycoke_edge.bundle import Bundle, open_bundle
from dycoke_edge.ort import onnxruntime
from dycoke_edge.runtime import ort_cuda, pipeline, readiness, visual
from dycoke_edge.runtime.engine import AnyArray, Engine, OrtCpuEngine, open_engine
from dycoke_edge.runtime.gpu import libraries
from dycoke_edge.runtime.gpu.device import Device, DeviceArray
from dycoke_edge.runtime.ort_cuda import OrtCudaEngine
from tests.commands import Outcome, here
from tests.emulator import EmulatedDevice
from tests.test_parity import frames

Capture = pytest.CaptureFixture[str]
SHORT = Sampling(max_new_tokens=12, stop_token_ids=())
SPEC = EngineSpec("cuda", decoder="graphs", kv_capacity=512, prefill_chunk=32, vision_batch=4)


class CountingDevice(EmulatedDevice):
    """Counts what crosses the bus."""

    up = down = 0

    def upload(self, address: int, array: NDArray[Any]) -> None:
        self.up += 1
        super().upload(address, array)

    def download(self, address: int, array: NDArray[Any]) -> None:
        self.down += 1
        super().download(address, array)


class OnHost(OrtCudaEngine):
    """The GPU engine on ONNX Runtime's CPU kernels: memory of the emulated device is the host's."""

    memory = "cpu"
    on_cuda_only: ClassVar[dict[str, str]] = {}

    def _providers(self) -> list[tuple[str, dict[str, str]]]:
        return [("CPUExecutionProvider", {})]


@pytest.fixture
def device() -> CountingDevice:
    return CountingDevice()


@pytest.fixture
def bundle(tiny_bundle: Path) -> Bundle:
    return open_bundle(tiny_bundle)


@pytest.fixture
def engine(bundle: Bundle, device: Device) -> OnHost:
    return OnHost(bundle, SPEC, device)


@pytest.fixture
def cpu(bundle: Bundle) -> Engine:
    return OrtCpuEngine(bundle, EngineSpec())


def host(array: AnyArray) -> NDArray[Any]:
    return np.asarray(array)


# What the engine does


def test_tokens_stay_on_the_device(bundle: Bundle, engine: OnHost, cpu: Engine, device: CountingDevice) -> None:
    """Frames go up once, as bytes, batch by batch; nothing comes back, but for the places of what merge kept where they
    are asked for."""
    tokens = visual.encode(bundle, engine, frames(9), 4)
    assert isinstance(tokens, DeviceArray) and (device.up, device.down) == (3, 0)
    merged = visual.merge(bundle, engine, tokens, Compression(merge_ratio=0.5))
    kept, index = merged.tokens, merged.index
    assert isinstance(kept, DeviceArray) and isinstance(index, DeviceArray) and device.waits == 0
    want = visual.encode(bundle, cpu, frames(9), 4)
    np.testing.assert_allclose(host(tokens), host(want), atol=3e-6 * np.abs(host(want)).max())
    wanted = visual.merge(bundle, cpu, host(tokens), Compression(merge_ratio=0.5))
    want_kept, want_index = wanted.tokens, wanted.index
    assert index.dtype == np.int32
    np.testing.assert_array_equal(index, want_index)
    np.testing.assert_array_equal(host(kept), host(want_kept))


@pytest.mark.parametrize(
    "compression", [Compression.off(), Compression(merge_ratio=0.7, mode="official"), Compression(merge_ratio=0.7)]
)
def test_merge_of_every_kind_gives_device_memory(
    bundle: Bundle, engine: OnHost, cpu: Engine, compression: Compression
) -> None:
    tokens = visual.encode(bundle, engine, frames(8), 8)
    merged = visual.merge(bundle, engine, tokens, compression)
    kept, index = merged.tokens, merged.index
    wanted = visual.merge(bundle, cpu, host(tokens), compression)
    want, places = wanted.tokens, wanted.index
    assert isinstance(kept, DeviceArray)
    np.testing.assert_array_equal(host(kept), host(want))
    np.testing.assert_array_equal(index, places)


@pytest.mark.parametrize("weigh", [False, True])
def test_a_request_is_answered_as_on_the_cpu(bundle: Bundle, engine: OnHost, llm: VideoLLM, weigh: bool) -> None:
    """The decoder graphs, on host arrays that the engine carries to the device and back."""
    gpu = VideoLLM(bundle, engine, SPEC)
    settings: dict[str, Any] = {
        "video": frames(9),
        "compression": Compression(mode="paper", weigh=weigh),
        "sampling": SHORT,
    }
    assert gpu.generate("What?", **settings).token_ids == llm.generate("What?", **settings).token_ids


def test_live_video_on_a_device(bundle: Bundle, engine: OnHost, llm: VideoLLM) -> None:
    answers = []
    for model in (VideoLLM(bundle, engine, SPEC), llm):
        live = model.live(Compression(), LiveSpec(8, max_question_tokens=64, max_answer_tokens=32))
        for image in frames(6):
            live.push(image)
        live.push_tokens(model.encode(frames(7)[6:])[0])
        answers.append([piece.token for piece in live.ask("What?", SHORT)])
    assert answers[0] == answers[1]


def test_a_host_array_is_carried_both_ways(bundle: Bundle, engine: OnHost, cpu: Engine) -> None:
    pixels = np.random.default_rng(0).uniform(-1, 1, (2, 3, 100, 100)).astype(np.float32)
    got, want = (np.empty((2, 16, 128), np.float32) for _ in "ab")
    for part in (slice(0, 1), slice(0, 2)):  # the second is more than was made room for
        engine.run("vision", {"pixels": pixels[part]}, {"tokens": got[part]})
        cpu.run("vision", {"pixels": pixels[part]}, {"tokens": want[part]})
    np.testing.assert_allclose(got, want, atol=3e-6 * np.abs(want).max())


def test_unload_gives_memory_back(engine: OnHost, device: CountingDevice) -> None:
    pixels, tokens = np.zeros((1, 3, 100, 100), np.float32), np.zeros((1, 16, 128), np.float32)
    engine.run("vision", {"pixels": pixels}, {"tokens": tokens})
    assert device.bytes_in_use > pixels.nbytes
    engine.unload("vision")
    engine.unload("vision")
    assert device.bytes_in_use == 0


def test_the_provider_is_told_what_the_device_is(bundle: Bundle, device: Device) -> None:
    ((name, options),) = OrtCudaEngine(bundle, SPEC, device)._providers()
    assert name == "CUDAExecutionProvider" and options["user_compute_stream"] == str(device.stream)
    assert options["use_tf32"] == "0" and options["device_id"] == "0"


class Failing:
    """A session that fails as ONNX Runtime does."""

    def __init__(self, text: str) -> None:
        self.text = text

    def run_with_iobinding(self, *given: object) -> None:
        raise RuntimeError(self.text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("CUDA failure 2: out of memory ; GPU=0", "no memory left for vision .* MiB are ours.*--vision-batch"),
        ("bfc_arena.cc:376 Available memory of 12 is smaller than requested bytes of 99", "no memory left for vision"),
        ("Non-zero status code while running\nMatMul", "onnxruntime failed in vision.*running MatMul"),
    ],
)
def test_what_fails_is_said_in_our_words(engine: OnHost, bundle: Bundle, text: str, said: str) -> None:
    engine.load("vision")
    engine._sessions["vision"] = Failing(text)
    with pytest.raises(EngineError, match=said):
        visual.encode(bundle, engine, frames(1), 1)


def test_a_lost_gpu_is_said_to_be_lost(engine: OnHost, bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost() -> None:
        raise EngineError("the GPU context is lost")

    engine.load("vision")
    engine._sessions["vision"] = Failing("CUDA failure 700: an illegal memory access was encountered")
    monkeypatch.setattr(engine.device, "synchronize", lost)
    with pytest.raises(EngineError, match="context is lost"):
        visual.encode(bundle, engine, frames(1), 1)


def test_another_provider_than_asked_for_is_an_error(bundle: Bundle, device: Device) -> None:
    """With a CUDA library missing ONNX Runtime takes the CPU, and no word of it."""

    class Silent(OnHost):
        def _providers(self) -> list[tuple[str, dict[str, str]]]:
            asked = "CPUExecutionProvider" if self.opening else "CUDAExecutionProvider"
            self.opening = False
            return [(asked, {})]

        opening = True

    with pytest.raises(EngineError, match=r"does not use this GPU \(emulated\).*doctor"):
        Silent(bundle, SPEC, device).load("vision")


def test_a_damaged_graph(tiny_bundle: Path, device: Device, tmp_path: Path) -> None:
    shutil.copytree(tiny_bundle, tmp_path / "b")
    path = tmp_path / "b/onnx/vision_cuda.onnx"
    path.write_bytes(b"\0" * path.stat().st_size)
    with pytest.raises(EngineError, match=r"vision_cuda\.onnx"):
        OnHost(open_bundle(tmp_path / "b"), SPEC, device).load("vision")


def verified(
    capsys: Capture, bundle: Path, device: Device, monkeypatch: pytest.MonkeyPatch, engine: type[OnHost] = OnHost
) -> Outcome:
    monkeypatch.setattr(pipeline, "open_engine", lambda bundle, spec: engine(bundle, spec, device))
    return here(capsys, "verify", bundle, "--provider", "cuda")


def test_verify_on_a_gpu_compares_with_the_cpu(
    capsys: Capture, tiny_bundle: Path, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcome = verified(capsys, tiny_bundle, device, monkeypatch)
    assert outcome.code == 0 and json.loads(outcome.out)["ok"]
    lines = [line.split()[:2] for line in outcome.err.splitlines()]
    merges = [[f"merge_0{ratio}0", output] for ratio in (3, 5, 7, 9) for output in ("kept", "index")]
    assert lines == [["vision", "tokens"], *merges]


def test_verify_refuses_a_gpu_that_computes_otherwise(
    capsys: Capture, tiny_bundle: Path, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Wrong(OnHost):
        def run(self, graph: str, inputs: Mapping[str, AnyArray], outputs: Mapping[str, AnyArray]) -> None:
            super().run(graph, inputs, outputs)
            tokens = outputs.get("tokens")
            if isinstance(tokens, np.ndarray):
                tokens *= 1.001

    outcome = verified(capsys, tiny_bundle, device, monkeypatch, Wrong)
    assert outcome.code == 4 and "vision: tokens on cuda differs from the CPU by 0.001" in outcome.complaint


# What is missing


def elf(folder: Path, name: str, *needs: Path) -> Path:
    """A shared library that needs others."""
    library = folder / name
    library.parent.mkdir(parents=True, exist_ok=True)
    command = ["g++", "-shared", "-fPIC", "-x", "c++", "/dev/null", "-o", str(library), f"-Wl,-soname,{name}"]
    subprocess.run([*command, "-Wl,--no-as-needed", *(f"-l:{need.name}" for need in needs), f"-L{folder}"], check=True)
    return library


def test_libraries_of_a_library(tmp_path: Path) -> None:
    """As its dynamic section has them, those that others need first."""
    needs = [elf(tmp_path, name) for name in ("libcurand.so.99", "libcublas.so.99", "libcublasLt.so.99")]
    found = libraries.needed_by(elf(tmp_path, "libkernels.so", *needs))
    assert found == ["libcublasLt.so.99", "libcublas.so.99", "libcurand.so.99"]
    (tmp_path / "text").write_text("not a library" * 10)
    assert libraries.needed_by(tmp_path / "text") == []


def test_libraries_are_found_in_pips_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "libcudycoke.so.99"
    assert libraries.load([name]) == [name]
    elf(tmp_path / "nvidia" / "cu99" / "lib", name)
    (tmp_path / "nvidia" / "__init__.py").touch()  # before any other of that name
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "nvidia", raising=False)
    assert libraries.load([name]) == []


def complaint(capsys: Capture, bundle: Path, *options: str) -> str:
    outcome = here(capsys, "run", bundle, "--prompt", "?", *options)
    assert outcome.code == 4 and outcome.out == ""
    return outcome.complaint


@pytest.fixture
def cpu_package() -> None:
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("onnxruntime-gpu is installed")


@pytest.mark.usefixtures("cpu_package")
def test_cuda_without_its_package(capsys: Capture, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = complaint(capsys, tiny_bundle, "--provider", "cuda", "--vision", "graph")
    assert "package for the CPU is installed" in said and ort_cuda.INSTALL in said
    monkeypatch.setattr(ort_cuda, "version", lambda name: "1.31.1")
    said = complaint(capsys, tiny_bundle, "--provider", "cuda", "--vision", "graph")
    assert "onnxruntime-gpu 1.31.1 is installed, but the package onnxruntime overwrote its files" in said


def gpu_build(monkeypatch: pytest.MonkeyPatch, folder: Path, *needs: Path) -> None:
    """As if onnxruntime-gpu were installed, its kernels needing these libraries."""
    capi = folder / "onnxruntime" / "capi"
    elf(capi, "libonnxruntime_providers_cuda.so")
    if needs:
        elf(capi, "libonnxruntime_providers_cuda.so", *(elf(capi, need.name) for need in needs))
    monkeypatch.setattr(onnxruntime, "__file__", str(folder / "onnxruntime" / "__init__.py"))
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])


def test_cuda_without_its_libraries(
    capsys: Capture, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu_build(monkeypatch, tmp_path, Path("libcublas.so.99"), Path("libcuda.so.1"))
    said = complaint(capsys, tiny_bundle, "--provider", "cuda", "--vision", "graph")
    assert f"onnxruntime-gpu {onnxruntime.__version__} needs libcublas.so.99, not found" in said
    assert "onnxruntime-gpu[cuda,cudnn]" in said


def test_cuda_without_a_gpu(
    capsys: Capture, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nothing() -> Device:
        raise EngineError("the NVIDIA driver finds no GPU")

    gpu_build(monkeypatch, tmp_path)
    monkeypatch.setattr(ort_cuda, "open_device", nothing)
    assert complaint(capsys, tiny_bundle, "--provider", "cuda") == "the NVIDIA driver finds no GPU"
    facts = json.loads(here(capsys, "doctor", "--json").out)
    assert (facts["gpu"], facts["can_run_cuda"]) == (None, False)
    assert facts["why_not_cuda"] == facts["why_not_cuda_graphs"] == "the NVIDIA driver finds no GPU"


def test_a_bundle_without_the_form_for_cuda(tiny_bundle: Path, bundle: Bundle, device: Device) -> None:
    files = {name: entry for name, entry in bundle.manifest.files.items() if "vision_cuda" not in name}
    old = Bundle(tiny_bundle, bundle.manifest.model_copy(update={"files": files}))
    with pytest.raises(RuntimeError, match=r"no onnx/vision_cuda\.onnx.*export again"):
        OnHost(old, SPEC, device).load("vision")


def test_doctor_says_what_a_gpu_would_need(monkeypatch: pytest.MonkeyPatch, device: EmulatedDevice) -> None:
    monkeypatch.setattr(ort_cuda, "open_device", lambda: device)
    monkeypatch.setattr(ort_cuda, "check_onnxruntime", lambda: None)
    facts = readiness.gpu_facts()
    assert facts["gpu"] == "emulated" and facts["can_run_cuda"] and facts["can_run_cuda_graphs"]

    def missing() -> None:
        raise EngineError("no CUDA kernels")

    monkeypatch.setattr(ort_cuda, "check_onnxruntime", missing)
    facts = readiness.gpu_facts()
    assert facts["can_run_cuda"] and facts["why_not_cuda"] is None
    assert (facts["can_run_cuda_graphs"], facts["why_not_cuda_graphs"]) == (False, "no CUDA kernels")


def test_here_as_it_is(capsys: Capture, tiny_bundle: Path) -> None:
    """This machine, whatever it has: what doctor says is what an attempt says."""
    facts = json.loads(here(capsys, "doctor", "--json").out)
    for provider in ("cuda", "tensorrt"):
        why = facts[f"why_not_{provider}"]
        assert facts[f"can_run_{provider}"] is (why is None)
        if why is not None:
            with pytest.raises(EngineError) as caught:
                open_engine(open_bundle(tiny_bundle), EngineSpec(provider))
            assert str(caught.value) in why
    assert set(facts["packages"]) >= {"onnxruntime-gpu", "cuda-bindings", "tensorrt"}
    assert facts["packages"]["onnxruntime"] == importlib.metadata.version("onnxruntime")
