"""Fixtures that all tests share."""

from __future__ import annotations

import importlib.metadata
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import random_model
from dycoke_edge import VideoLLM
from dycoke_edge.config import ExportSpec
from dycoke_edge.export.build import export
from dycoke_edge.runtime.camera import redact
from dycoke_edge.runtime.gpu.device import Device
from tests import lively
from tests.emulator import EmulatedDevice
from tests.gpu import no_cuda_graphs, no_gpu, real_device
from tests.made import Made

torch.set_num_threads(1)  # on busy cores the spinning threads of torch made these tests 70 times slower


def pytest_report_header() -> list[str]:
    names = ("numpy", "onnxruntime", "torch", "transformers", "onnx")
    return [", ".join(f"{name} {_version(name)}" for name in names), f"providers: {_providers()}"]


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def _providers() -> str:
    try:
        from dycoke_edge.ort import onnxruntime
    except ImportError:
        return "absent"
    return ", ".join(onnxruntime.get_available_providers())


@pytest.fixture(autouse=True)
def _nothing_is_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values of the environment that one test fills in are words like any other in the next."""
    monkeypatch.setattr(redact, "_VALUES", redact._Values())


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Processes that a test starts take SIGINT, also where this one ignores it, as any background job does."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def made(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """What tests make once and read many times; kept from run to run, for as long as its sources stay the same."""
    cache = getattr(pytestconfig, "cache", None)  # runs inside of tests have none
    return Made(cache.mkdir("made") if cache else tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="session")
def tiny_checkpoint(made: Made) -> Path:
    """A Hugging Face directory of the lively tiny model."""
    return made.once("checkpoint/tiny", lambda path: random_model.make(lively.SHAPE, path, seed=lively.SEED))


@pytest.fixture(scope="session")
def tiny_bundle(made: Made, tiny_checkpoint: Path) -> Path:
    """Its fp32 bundle. Tests that damage a bundle copy it first."""
    spec = ExportSpec(split_layer=lively.SPLIT_LAYER)
    return made.once("bundle/tiny", lambda path: export(tiny_checkpoint, path, spec))


@pytest.fixture(scope="session")
def half_bundle(made: Made, tiny_checkpoint: Path) -> Path:
    """Its fp16 bundle."""
    spec = ExportSpec(dtype="fp16", merge_ratio=(0.5,))
    return made.once("bundle/half", lambda path: export(tiny_checkpoint, path, spec))


@pytest.fixture(scope="session")
def shipped_bundle(made: Made) -> Path:
    """The fp32 bundle of the model that comes with the project; it can answer."""
    return made.once("bundle/shipped", lambda path: export("tiny", path))


ENGINES: dict[str, dict[str, Any]] = {
    "cpu": {},
    "cuda": {"provider": "cuda"},
    "cuda-launched": {"provider": "cuda", "decoder": "launched"},
    "cuda-graphs": {"provider": "cuda", "decoder": "graphs", "vision": "graph"},
}


@pytest.fixture(params=["cpu", *(pytest.param(name, marks=pytest.mark.gpu) for name in ENGINES if name != "cpu")])
def load(request: pytest.FixtureRequest) -> Callable[..., VideoLLM]:
    """VideoLLM.load on every engine that can be had: what holds on the CPU must hold there."""
    missing = {"cpu": "", "cuda-graphs": no_cuda_graphs()}.get(request.param, no_gpu())
    if missing:
        pytest.skip(missing)
    return partial(VideoLLM.load, **ENGINES[request.param])


@pytest.fixture
def llm(tiny_bundle: Path) -> VideoLLM:
    return VideoLLM.load(tiny_bundle, kv_capacity=512, prefill_chunk=32)


@pytest.fixture(scope="session")
def model(made: Made) -> Any:
    """The same weights in transformers, fp32, eager attention; by the hub's names, which every release of it reads."""
    from transformers import LlavaOnevisionForConditionalGeneration

    seed = lively.SEED
    hub = made.once("checkpoint/hub", lambda path: random_model.make(lively.SHAPE, path, seed=seed, layout="hub"))
    loaded: Any = LlavaOnevisionForConditionalGeneration.from_pretrained(
        hub, dtype="float32", attn_implementation="eager"
    )
    return loaded.eval()


@pytest.fixture(params=["emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Device:
    """A GPU emulated on the CPU, and the first real one where there is one."""
    if request.param == "emulated":
        return EmulatedDevice()
    if no_gpu():
        pytest.skip(no_gpu())
    return real_device()
