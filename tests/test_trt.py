"""TensorRT end to end against a made-up `tensorrt`: every version's names, every way to fail, all with real numbers."""

from __future__ import annotations

import inspect
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from dycoke_edge import Compression, Sampling, VideoLLM, contract
from dycoke_edge.bundle import MANIFEST as BUNDLE_MANIFEST
from dycoke_edge.bundle import Bundle, open_bundle, sealed
from dycoke_edge.config import BuildSpec, EngineSpec
from dycoke_edge.errors import DycokeEdgeError, EngineError, UsageError
from dycoke_edge.parity import Parity
from dycoke_edge.runtime import ort_cuda
from dycoke_edge.runtime.engine import OrtCpuEngine
from dycoke_edge.runtime.gpu.device import DeviceArray
from dycoke_edge.runtime.synthetic import moving_patch
from dycoke_edge.runtime.trt import opened, plan, room, versions
from dycoke_edge.runtime.trt.build import Built, build
from dycoke_edge.runtime.trt.compile import Job, Made, Progress, compile_graph
from dycoke_edge.runtime.trt.engine import TrtEngine
from dycoke_edge.runtime.trt.journal import Journal
from dycoke_edge.runtime.trt.phases import Phases
from dycoke_edge.runtime.trt.profiles import profiles
from tests import fake_tensorrt
from tests.commands import ROOT, files, here
from tests.emulator import EmulatedDevice

VERSIONS = ("8.6.0", "10.0.1", "10.3.0", "10.16.1.11", "11.4.0.106")
SMALL = BuildSpec(vision_batch=4, kv_capacity=512, prefill_chunk=32, usual_rows=64)
ALL = BuildSpec(("vision", "merge", "decoder"), 4, 512, 32, 64)
FLAGS = ("--vision-batch", 4, "--kv-capacity", 512, "--prefill-chunk", 32)
Install = Callable[..., versions.Versions]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Install]:
    """Put a TensorRT on sys.path, for this process and its children."""
    numbers = itertools.count()

    def do(version: str = "10.3.0", fault: str = "") -> versions.Versions:
        forget()
        monkeypatch.syspath_prepend(fake_tensorrt.write(tmp_path / f"site{next(numbers)}", version, fault))
        return versions.load()

    yield do
    forget()


def forget() -> None:
    sys.modules.pop("tensorrt", None)
    versions.load.cache_clear()


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> EmulatedDevice:
    """The GPU that every open_device gives."""
    one = EmulatedDevice(total_bytes=8 << 30)
    for module in (ort_cuda, opened):
        monkeypatch.setattr(module, "open_device", lambda: one)
    return one


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Bundle:
    """A copy that engines are built into, with one merge ratio."""
    copy = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    manifest = json.loads((copy / BUNDLE_MANIFEST).read_text())
    (copy / BUNDLE_MANIFEST).write_text(sealed(manifest | {"merge_ratios": [0.7]}))
    return open_bundle(copy)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Build in this process: starting another one takes a second."""

    def here(job: Job, time_limit: float, progress: Progress) -> Made:
        return compile_graph(versions.load(), job, progress)

    monkeypatch.setattr("dycoke_edge.runtime.trt.build.compile_apart", here)


@pytest.fixture
def half(half_bundle: Path, tmp_path: Path) -> Bundle:
    return open_bundle(shutil.copytree(half_bundle, tmp_path / "half"))


def content(built: Built, graph: str) -> dict[str, Any]:
    """What the made-up TensorRT wrote into a plan."""
    raw = (built.path / built.engines.plans[graph].file).read_bytes()
    told: dict[str, Any] = json.loads(raw.removeprefix(fake_tensorrt.MAGIC))
    return told


# The made-up TensorRT


def real_names() -> dict[str, set[str]]:
    """ "class.name" -> versions that have it."""
    lines = [line.split() for line in (ROOT / "tests/tensorrt_api.txt").read_text().splitlines()]
    return {name: set(have) for name, *have in lines if name != "#"}


@pytest.mark.parametrize("version", VERSIONS)
def test_the_fake_has_only_names_of_the_version_it_stands_for(install: Install, version: str) -> None:
    module, real, seen = install(version).module, real_names(), 0
    for kind in (value for value in vars(module).values() if inspect.isclass(value)):
        for name in (name for name in dir(kind) if not name.startswith("_")):
            if name in dir(int) or name in ("name", "value"):
                continue  # of IntEnum
            have = real.get(f"{kind.__name__}.{name}", set())
            assert have & {"all", version}, f"TensorRT {version} has no {kind.__name__}.{name}"
            seen += 1
    assert seen > 60


# Building, on every version


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("version", VERSIONS)
def test_every_graph_is_built_and_answers_as_on_the_cpu(
    install: Install, device: EmulatedDevice, bundle: Bundle, version: str
) -> None:
    found, shares = list[Parity](), list[tuple[str, float]]()
    built = build(bundle, ALL, device, install(version), lambda what, share: shares.append((what, share)), found.append)
    names = [graph.name for graph in contract.graphs(bundle.model, bundle.manifest.merge_ratios)]
    assert built.new == tuple(names) and not built.kept
    assert {one.graph for one in found} == set(names) and all(one.ok for one in found)
    assert [share for _, share in shares] == sorted(share for _, share in shares) and shares[-1] == ("done", 1.0)
    assert built.path == bundle.path / "engines" / f"{version}-sm87"
    assert sorted(p.name for p in bundle.path.glob("engines/*")) == [built.path.name]

    for name in names:
        told = content(built, name)
        assert "TF32" not in told["flags"] and told["cudnn"] is False
        assert told["typed"] == (version != "8.6.0")
    one_token, chunk = content(built, "decoder_deep")["profiles"]
    assert one_token["hidden"][0] == one_token["hidden"][2] == [1, bundle.model.hidden_size]
    assert chunk["hidden"][2][0] == 32 and chunk[f"k_{bundle.model.split_layer}"][2][0] == 512
    assert chunk["mask"] == [[1, 2], [32, 96], [32, 544]]

    video, sampling = moving_patch(9, 100), Sampling(max_new_tokens=12, stop_token_ids=())
    ask = ("What happens?", video, None, Compression(merge_ratio=0.7), sampling)
    options: dict[str, Any] = {"kv_capacity": 512, "prefill_chunk": 32, "vision_batch": 4}
    want = VideoLLM.load(bundle.path, **options).generate(*ask)
    got = VideoLLM.load(bundle.path, "tensorrt", decoder="graphs", **options).generate(*ask)
    assert got.token_ids == want.token_ids


@pytest.mark.usefixtures("quick")
def test_vision_and_merge_by_plans_and_the_decoder_by_own_kernels(
    install: Install, device: EmulatedDevice, bundle: Bundle
) -> None:
    build(bundle, SMALL, device, install())
    ask = ("What happens?", moving_patch(9, 100), None, Compression(), Sampling(max_new_tokens=8, stop_token_ids=()))
    options: dict[str, Any] = {"kv_capacity": 512, "prefill_chunk": 32, "vision_batch": 4}
    want = VideoLLM.load(bundle.path, **options).generate(*ask)
    launches = device.launches
    got = VideoLLM.load(bundle.path, "tensorrt", **options).generate(*ask)
    assert got.token_ids == want.token_ids and device.launches > launches
    assert got.stats.visual_tokens_kept == want.stats.visual_tokens_kept < want.stats.visual_tokens_in


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("casts", ("", "identities"))
def test_a_weakly_typed_network_keeps_exactly_the_fp32_islands(
    install: Install, device: EmulatedDevice, half: Bundle, casts: str
) -> None:
    built = build(half, ALL, device, install("8.6.0", casts))
    for name, entry in built.engines.plans.items():
        told, source = content(built, name), plan.sources(half, name)[0]
        assert (entry.fp32_layers == 0) == (name == "vision")  # whose islands are norms
        assert set(told["flags"]) == {"FP16", "OBEY_PRECISION_CONSTRAINTS"}
        assert sorted(told["fp32"]) == sorted(islands(source)) and entry.fp32_layers == len(told["fp32"])
    assert islands(plan.sources(half, "decoder_shallow")[0])


def islands(path: Path) -> list[str]:
    """Nodes of an fp16 graph that compute something in fp32 by the graph itself: no constants, norms, moves."""
    untold = ("Cast", "Concat", "Gather", "Identity", "LayerNormalization", "Reshape", "Shape", "Slice", "Transpose")
    graph = onnx.shape_inference.infer_shapes(onnx.load(path, load_external_data=False)).graph
    kinds = {v.name: v.type.tensor_type.elem_type for v in (*graph.value_info, *graph.input, *graph.output)}
    constant = {tensor.name for tensor in graph.initializer}
    found = []
    for node in graph.node:
        if all(name in constant for name in node.input if name):
            constant |= set(node.output)
        elif node.op_type not in untold and any(kinds[name] == TensorProto.FLOAT for name in node.output):
            found.append(node.name)
    return found


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("version", ("10.3.0", "11.4.0.106"))
def test_a_strongly_typed_network_gets_no_flags(
    install: Install, device: EmulatedDevice, half: Bundle, version: str
) -> None:
    built = build(half, SMALL, device, install(version))
    assert content(built, "vision")["flags"] == [] and built.engines.plans["vision"].fp32_layers == 0
    assert built.engines.precision == "fp16"


@pytest.mark.usefixtures("quick")
def test_vision_is_built_from_the_form_for_tensorrt_or_the_portable_one(
    install: Install, device: EmulatedDevice, bundle: Bundle
) -> None:
    form = bundle.path / "onnx/vision_trt.onnx"
    if not form.is_file():
        pytest.skip("no form for TensorRT is exported yet")
    built = build(bundle, BuildSpec(("vision",), 4), device, install())
    assert content(built, "vision")["onnx"] == str(form) and not built.portable
    assert set(built.engines.plans["vision"].onnx) == {"onnx/vision_trt.onnx", "onnx/vision.onnx.data"}
    trim(bundle, "onnx/vision_trt.onnx")
    built = build(open_bundle(bundle.path), BuildSpec(("vision",), 4), device, install())
    assert built.portable == ("vision",) and built.new == ("vision",)


def trim(bundle: Bundle, name: str) -> None:
    """Make it a bundle without a file."""
    manifest = json.loads((bundle.path / BUNDLE_MANIFEST).read_text())
    del manifest["files"][name]
    (bundle.path / BUNDLE_MANIFEST).write_text(sealed(manifest))
    bundle.remember()


@pytest.mark.usefixtures("quick")
def test_what_fits_is_kept_and_what_changed_is_built_again(
    install: Install, device: EmulatedDevice, bundle: Bundle
) -> None:
    trt, vision = install(), BuildSpec(("vision",), 4)
    first = build(bundle, vision, device, trt)
    cache = (first.path / "timing.cache").read_text()
    both = build(bundle, SMALL, device, trt)
    assert both.kept == ("vision",) and both.new == ("merge_070",) and (first.path / "timing.cache").read_text() > cache
    assert build(bundle, SMALL, device, trt).new == ()
    assert build(bundle, BuildSpec(("vision",), 2), device, trt).new == ("vision",)
    assert build(bundle, BuildSpec(("vision",), 2, force=True), device, trt).new == ("vision",)
    assert build(bundle, BuildSpec(("vision",), 2, level=1), device, trt).new == ("vision",)
    assert len(list(first.path.glob("vision-*.plan"))) == 1, "the old plan is removed"
    assert sorted(plan.read(first.path).plans) == ["merge_070", "vision"]


@pytest.mark.usefixtures("quick")
def test_options_reach_the_builder(install: Install, device: EmulatedDevice, bundle: Bundle) -> None:
    built = build(bundle, BuildSpec(("merge",), 4, workspace=64, level=5), device, install())
    told = content(built, "merge_070")
    assert (told["workspace"], told["level"]) == (64 << 20, 5)


# Running


def settings(kv_capacity: int, prefill_chunk: int, vision_batch: int) -> EngineSpec:
    return EngineSpec(
        "tensorrt", "graphs", kv_capacity=kv_capacity, prefill_chunk=prefill_chunk, vision_batch=vision_batch
    )


@pytest.fixture
def engine(install: Install, device: EmulatedDevice, bundle: Bundle, quick: None) -> TrtEngine:
    build(bundle, ALL, device, install("10.16.1.11"))
    return opened.open_trt(bundle, settings(512, 32, 4))


def test_arrays_are_bound_in_place_where_they_can_be(engine: TrtEngine, device: EmulatedDevice, bundle: Bundle) -> None:
    pixels = np.random.default_rng(0).random((3, 3, bundle.model.image_size, bundle.model.image_size), np.float32)
    shape = (3, bundle.model.tokens_per_frame, bundle.model.hidden_size)
    want = np.empty(shape, np.float32)
    OrtCpuEngine(bundle, EngineSpec()).run("vision", {"pixels": pixels}, {"tokens": want})
    inside, out = DeviceArray.of(device, pixels), engine.empty(shape, np.float32)
    engine.run("vision", {"pixels": inside}, {"tokens": out})
    held = device.bytes_in_use
    assert np.array_equal(out.numpy(), want), "bound by address"
    on_host = np.empty(shape, np.float32)
    engine.run("vision", {"pixels": pixels}, {"tokens": on_host})
    assert np.array_equal(on_host, want) and device.bytes_in_use > held, "staged"
    shifted = DeviceArray.empty(device, (pixels.size + 1,), np.float32)[1:].reshape(pixels.shape)
    shifted[...] = pixels
    crooked = DeviceArray.empty(device, (want.size + 1,), np.float32)[1:].reshape(shape)
    engine.run("vision", {"pixels": shifted}, {"tokens": crooked})
    assert np.array_equal(crooked.numpy(), want), "not at a multiple of 256 bytes"
    assert engine.take_peak_bytes() >= device.bytes_in_use


def test_memory_is_given_back(engine: TrtEngine, device: EmulatedDevice, bundle: Bundle) -> None:
    start = device.bytes_in_use
    pixels = np.zeros((1, 3, bundle.model.image_size, bundle.model.image_size), np.float32)
    tokens = np.empty((1, bundle.model.tokens_per_frame, bundle.model.hidden_size), np.float32)
    for _ in range(3):
        engine.run("vision", {"pixels": pixels}, {"tokens": tokens})
        engine.load("merge_070")
        assert device.bytes_in_use > start
        engine.unload("vision")
        engine.unload("merge_070")
        assert device.bytes_in_use == start
    engine.unload("vision")


def test_a_shape_beyond_the_plan_is_refused(engine: TrtEngine, bundle: Bundle) -> None:
    pixels = np.zeros((5, 3, bundle.model.image_size, bundle.model.image_size), np.float32)
    tokens = np.empty((5, bundle.model.tokens_per_frame, bundle.model.hidden_size), np.float32)
    with pytest.raises(EngineError, match=r"built for pixels from \[1, .* to \[4, .*not \[5, .*run: dycoke-edge build"):
        engine.run("vision", {"pixels": pixels}, {"tokens": tokens})


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (
            settings(512, 32, 5),
            "--vision-batch 4 or run: .* --vision-batch 5",
        ),
        (
            settings(600, 32, 4),
            "--kv-capacity 512 or run: .*decoder --kv-capacity 600",
        ),
        (
            settings(512, 64, 4),
            "--prefill-chunk 32 or run: .* --prefill-chunk 64",
        ),
    ],
)
def test_settings_beyond_the_plans_are_refused_at_once(
    engine: TrtEngine, bundle: Bundle, spec: EngineSpec, words: str
) -> None:
    with pytest.raises(EngineError, match=words):
        opened.open_trt(bundle, spec)


@pytest.mark.usefixtures("quick")
def test_decoder_plans_are_needed_for_decoder_graphs_only(
    install: Install, device: EmulatedDevice, bundle: Bundle
) -> None:
    build(bundle, SMALL, device, install())
    opened.open_trt(bundle, EngineSpec("tensorrt", "captured", vision_batch=4))
    with pytest.raises(EngineError, match=r"no plan of decoder_shallow; run: .* --graphs vision merge decoder"):
        opened.open_trt(bundle, EngineSpec("tensorrt", "graphs", vision_batch=4))


# What cannot be used


SPEC = EngineSpec("tensorrt", vision_batch=4)


def refusal(bundle: Bundle, spec: EngineSpec = SPEC) -> str:
    """The one line with which the engine does not open or run."""
    with pytest.raises(EngineError) as caught:
        engine = opened.open_trt(open_bundle(bundle.path), spec)
        for graph in opened.needed(bundle, spec):
            engine.load(graph)
    text = str(caught.value)
    assert f"run: dycoke-edge build {bundle.path}" in text and "\n" not in text
    return text


@pytest.mark.usefixtures("quick")
def test_plans_that_cannot_be_used_are_refused_with_the_command(
    install: Install, device: EmulatedDevice, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    trt = install("10.3.0")
    assert "has no TensorRT plans, this machine is 10.3.0-sm87" in refusal(bundle)
    built = build(bundle, SMALL, device, trt)
    file = built.path / built.engines.plans["vision"].file
    whole = file.read_bytes()

    file.write_bytes(whole[:-1] + b"?")
    assert "damaged" in refusal(bundle)
    file.write_bytes(whole[:-1])
    assert "bytes, not" in refusal(bundle)
    file.unlink()
    assert "is missing" in refusal(bundle)
    file.write_bytes(whole)
    opened.open_trt(bundle, SPEC).load("vision")

    monkeypatch.setattr(device, "name", "another")
    assert "were built on emulated with TensorRT 10.3.0, this is another" in refusal(bundle)
    monkeypatch.setattr(device, "compute_capability", (9, 0))
    assert "has plans for 10.3.0-sm87, this machine is 10.3.0-sm90" in refusal(bundle)
    monkeypatch.undo()
    monkeypatch.setattr(opened, "open_device", lambda: device)

    manifest = json.loads((bundle.path / BUNDLE_MANIFEST).read_text())
    manifest["files"]["onnx/vision.onnx.data"]["sha256"] = "0" * 64
    (bundle.path / BUNDLE_MANIFEST).write_text(sealed(manifest))
    bundle.remember()
    assert "was built from another vision.onnx" in refusal(bundle)
    (built.path / "manifest.json").write_text("{")
    assert "manifest.json cannot be read" in refusal(bundle)


@pytest.mark.usefixtures("quick")
def test_plans_of_another_tensorrt_are_not_seen(install: Install, device: EmulatedDevice, bundle: Bundle) -> None:
    build(bundle, SMALL, device, install("8.6.0"))
    install("10.3.0")
    assert "has plans for 8.6.0-sm87, this machine is 10.3.0-sm87" in refusal(bundle)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("load memory", "could not load .*out of memory; the GPU has no memory left"),
        ("context", "could not make a context"),
        ("no gpu", "TensorRT 10.3.0 makes no runtime: CUDA initialization failure.*; there is no GPU"),
        ("execute", "TensorRT failed in vision, could not run it"),
    ],
)
def test_failures_of_running(install: Install, device: EmulatedDevice, bundle: Bundle, fault: str, words: str) -> None:
    build(bundle, SMALL, device, install())
    install(fault=fault)
    pixels = np.zeros((1, 3, bundle.model.image_size, bundle.model.image_size), np.float32)
    tokens = np.empty((1, bundle.model.tokens_per_frame, bundle.model.hidden_size), np.float32)
    held = device.bytes_in_use
    engine = opened.open_trt(bundle, SPEC)
    with pytest.raises(EngineError, match=words):
        engine.run("vision", {"pixels": pixels}, {"tokens": tokens})
    engine.close()
    assert device.bytes_in_use == held


# Builds that fail leave the bundle as it was


QUICK_FAULTS = [
    ("parse", "cannot read .*vision.*: .*No importer registered for op: Add; export again"),
    ("memory", r"cannot build vision: .*out of memory; the GPU has no memory left"),
    ("wrong", "vision: tokens of the TensorRT plan differs from onnxruntime by 1 relative"),
    ("no gpu", "makes no builder: CUDA initialization failure"),
]
FAULTS_OF_A_PROCESS = [
    ("memory", r"cannot build vision: .*out of memory; the GPU has no memory left"),
    ("crash", "crashed while it built vision .signal 6"),
    ("killed", "was killed, most likely because memory ran out"),
]


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("version", ("8.6.0", "11.4.0.106"))
@pytest.mark.parametrize(("fault", "words"), QUICK_FAULTS)
def test_failures_of_building(
    install: Install, device: EmulatedDevice, bundle: Bundle, version: str, fault: str, words: str
) -> None:
    fails(bundle, device, install(version, fault), words)


@pytest.mark.parametrize(("fault", "words"), FAULTS_OF_A_PROCESS)
def test_failures_of_the_process_that_builds(
    install: Install, device: EmulatedDevice, bundle: Bundle, fault: str, words: str
) -> None:
    fails(bundle, device, install("8.6.0", fault), words)


def fails(bundle: Bundle, device: EmulatedDevice, trt: versions.Versions, words: str) -> None:
    """The build ends with an error and leaves nothing."""
    before, held = files(bundle.path), device.bytes_in_use
    with pytest.raises(EngineError, match=words):
        build(bundle, SMALL, device, trt)
    assert files(bundle.path) == before and device.bytes_in_use == held


def test_a_build_that_takes_too_long_is_stopped(install: Install, device: EmulatedDevice, bundle: Bundle) -> None:
    before = files(bundle.path)
    with pytest.raises(EngineError, match=r"longer than 2 s .--time-limit"):
        build(bundle, BuildSpec(("vision",), time_limit=2), device, install("8.6.0", "hang"))
    assert files(bundle.path) == before


@pytest.mark.usefixtures("quick")
def test_the_old_plans_stay_when_a_new_build_fails(install: Install, device: EmulatedDevice, bundle: Bundle) -> None:
    build(bundle, SMALL, device, install())
    before = files(bundle.path)
    with pytest.raises(EngineError):
        build(bundle, BuildSpec(("vision",), 4, force=True), device, install(fault="wrong"))
    assert files(bundle.path) == before
    install()
    opened.open_trt(bundle, SPEC).load("vision")


@pytest.mark.usefixtures("quick")
def test_two_builds_at_once(install: Install, device: EmulatedDevice, bundle: Bundle) -> None:
    trt, refused = install(), list[str]()

    def second(what: str, share: float) -> None:
        if not refused:
            with pytest.raises(UsageError) as caught:
                build(bundle, SMALL, device, trt)
            refused.append(str(caught.value))

    build(bundle, BuildSpec(("merge",), 4), device, trt, second)
    assert "another build is writing" in refused[0]


BUILD = """
import sys
from types import SimpleNamespace
from dycoke_edge.cli import main
from dycoke_edge.parity import Parity
from dycoke_edge.runtime import ort_cuda
device = SimpleNamespace(name="emulated", compute_capability=(8, 7), driver_version=12020, free_bytes=8 << 30)
device.close = lambda: None
ort_cuda.open_device = lambda: device
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize("number", (signal.SIGKILL, signal.SIGINT, signal.SIGTERM))
def test_a_killed_build_leaves_the_bundle_and_no_process(
    install: Install, device: EmulatedDevice, bundle: Bundle, number: int, tmp_path: Path
) -> None:
    before, site = files(bundle.path), fake_tensorrt.write(tmp_path / "hanging", "8.6.0", "hang")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), str(ROOT)])}
    command = [sys.executable, "-c", BUILD, "build", str(bundle.path)]
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        deadline = time.monotonic() + 60
        while not (child := children.read_text().split()) and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.5)
        process.send_signal(number)
        process.wait(20)
    while Path(f"/proc/{child[0]}/stat").exists() and _runs(child[0]) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _runs(child[0]), "the child ends with its parent"
    if number != signal.SIGKILL:
        assert process.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143}[signal.Signals(number)]
        assert files(bundle.path) == before
    assert {k: v for k, v in files(bundle.path).items() if "engines" not in k} == before
    built = build(bundle, BuildSpec(("vision",), 4), device, install("8.6.0"))
    assert [path.name for path in (bundle.path / "engines").iterdir()] == [built.path.name], "the next one cleans up"


def _runs(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


# Commands


def test_commands(install: Install, device: EmulatedDevice, bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    install("11.4.0.106")
    dry = here(capsys, "build", bundle.path, *FLAGS, "--dry-run", "--json")
    told = json.loads(dry.out)
    assert dry.code == 0 and told["build_fits"] and told["tensorrt"] == "11.4.0.106" and told["gpu"] == "emulated"
    assert not (bundle.path / "engines").exists()
    table = here(capsys, "build", bundle.path, *FLAGS, "--dry-run")
    assert "build_needs.gpu_bytes" in table.out and "MiB" in table.out

    done = here(capsys, "build", bundle.path, *FLAGS, "--json")
    told = json.loads(done.out)
    assert done.code == 0 and told["ok"] and told["built"][0] == "vision" and "merge_070" in told["plans"]
    assert told["decoder"] == "own CUDA kernels" and "argmax" in done.err
    told = json.loads(here(capsys, "inspect", bundle.path, "--json").out)["engines"]
    assert [(one["tensorrt"], one["gpu"], one["stale"]) for one in told] == [("11.4.0.106", "emulated", [])]
    assert "merge_070" in told[0]["graphs"]
    assert "engines.1.gpu" in here(capsys, "inspect", bundle.path).out

    assert json.loads(here(capsys, "verify", bundle.path).out)["plans"] == 2
    damaged = next((bundle.path / "engines").rglob("vision-*.plan"))
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    assert "is damaged" in here(capsys, "verify", bundle.path).complaint
    damaged.unlink()
    assert json.loads(here(capsys, "inspect", bundle.path, "--json").out)["engines"][0]["stale"] == ["vision"]


def test_a_build_that_does_not_fit_is_refused(
    install: Install, device: EmulatedDevice, bundle: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    install()
    device.total_bytes = 100 << 20
    outcome = here(capsys, "build", bundle.path, "--dry-run", "--json")
    assert outcome.code == 4 and not json.loads(outcome.out)["build_fits"]
    assert "of GPU memory are needed, 100 MiB are free" in outcome.err
    assert "does not fit" in here(capsys, "build", bundle.path).complaint
    assert not (bundle.path / "engines").exists()


def test_room_on_a_board_where_cpu_and_gpu_share_memory() -> None:
    need = room.Need(host=3 << 30, gpu=6 << 30, disk=1 << 30)
    assert room.lacking(need, room.Have(host=8 << 30, gpu=8 << 30, disk=2 << 30, shared=False)) is None
    assert "CPU and GPU together" in str(room.lacking(need, room.Have(8 << 30, 8 << 30, 2 << 30, True)))
    assert "of disk" in str(room.lacking(need, room.Have(64 << 30, 64 << 30, 1 << 20, True)))
    assert "of memory" in str(room.lacking(need, room.Have(1 << 30, 64 << 30, 2 << 30, False)))


def test_without_tensorrt_or_with_one_that_is_too_old_or_broken(
    bundle: Bundle,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    install: Install,
) -> None:
    forget()
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    assert "TensorRT is not installed" in here(capsys, "build", bundle.path).complaint
    told = json.loads(here(capsys, "build", bundle.path, "--dry-run", "--json").out)
    assert "not installed" in told["missing"] and told["build_fits"] is None
    with pytest.raises(EngineError, match="not installed"):
        VideoLLM.load(bundle.path, "tensorrt")
    monkeypatch.undo()
    (tmp_path / "old").mkdir()
    monkeypatch.syspath_prepend(fake_tensorrt.write(tmp_path / "old", "8.5.2"))
    forget()
    with pytest.raises(EngineError, match=r"8\.5\.2 is too old"):
        versions.load()
    (tmp_path / "old/tensorrt.py").write_text("raise OSError('libnvinfer.so.8: cannot open shared object file')")
    forget()
    with pytest.raises(EngineError, match=r"cannot be loaded .libnvinfer"):
        versions.load()


@pytest.mark.parametrize("option", (("--graphs", "all"), ("--vision-batch", 0), ("--level", 6), ("--time-limit", 0)))
def test_bad_options(tiny_bundle: Path, capsys: pytest.CaptureFixture[str], option: tuple[Any, ...]) -> None:
    outcome = here(capsys, "build", tiny_bundle, *option)
    assert outcome.code == 2 and str(option[0]) in outcome.complaint


# Small things


def test_progress_is_a_share_of_phases_in_phases() -> None:
    phases, seen = Phases(), list[float]()
    phases.start("all", None, 2)
    for step in range(2):
        phases.start("part", "all", 4)
        for inner in range(4):
            phases.step("part", inner)
            seen.append(phases.share)
        phases.finish("part")
        phases.step("all", step)
        seen.append(phases.share)
    assert seen == pytest.approx([0.125, 0.25, 0.375, 0.5, 0.5, 0.625, 0.75, 0.875, 1.0, 1.0])
    phases.start("again", None, 10)
    assert phases.share == 1.0


def test_a_journal_explains_in_one_line() -> None:
    journal = Journal()
    assert journal.explain("it failed", "do this") == "it failed: it gives no reason; do this"
    threads = [threading.Thread(target=journal.add, args=("WARNING", f"w{i}")) for i in range(300)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    journal.add(
        "ERROR", "2: [virtualMemoryBuffer.cpp::resizePhysical::140] Error Code 2: OutOfMemory (Requested\nsize)"
    )
    text = journal.explain("it failed", "do this")
    assert text.startswith("it failed: OutOfMemory (Requested size); the GPU has no memory left") and "\n" not in text
    assert len(journal.warnings) == 200
    journal.clear()
    assert not journal.errors and not journal.warnings


def test_profiles_cover_what_the_runtime_binds(tiny_bundle: Path) -> None:
    model = open_bundle(tiny_bundle).model
    merge = contract.merge(model, 0.7)
    assert [p["frame"][0][0] for p in profiles(merge, SMALL)] == [1]
    usual = profiles(contract.decoder_deep(model), BuildSpec(kv_capacity=8, usual_rows=64))[0]["mask"]
    assert usual == ((1, 2), (1, 9), (1, 9))


def test_every_error_is_of_this_package() -> None:
    assert issubclass(EngineError, DycokeEdgeError)
