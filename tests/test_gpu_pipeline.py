"""A whole VideoLLM on a GPU, emulated: vision by ONNX Runtime, merge, prefill and decoding by our kernels."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dycoke_edge import Compression, Message, Sampling, VideoLLM
from dycoke_edge.bundle import Bundle, open_bundle
from dycoke_edge.config import BenchSpec, Decoding, EngineSpec, LiveSpec
from dycoke_edge.runtime import bench
from dycoke_edge.runtime.explain import Seen
from dycoke_edge.runtime.gpu.device import Device
from dycoke_edge.runtime.gpu.engine import KernelEngine
from dycoke_edge.runtime.gpu.layers import KernelLayers
from dycoke_edge.runtime.gpu.records import Records
from dycoke_edge.runtime.layers import GraphLayers
from tests.emulator import EmulatedDevice
from tests.test_ort_cuda import OnHost
from tests.test_parity import frames

SPEC = EngineSpec("cuda", kv_capacity=512, prefill_chunk=32, vision_batch=4)
SHORT = Sampling(max_new_tokens=10, stop_token_ids=())


def emulated(bundle: Path, decoder: Decoding | None = None) -> VideoLLM:
    opened, spec = open_bundle(bundle), replace(SPEC, decoder=decoder)
    return VideoLLM(opened, OnHost(opened, spec, EmulatedDevice()), spec)


@pytest.mark.parametrize("decoder", [None, "launched", "graphs"])
def test_a_video_is_answered_as_on_the_cpu(tiny_bundle: Path, llm: VideoLLM, decoder: Decoding | None) -> None:
    own = emulated(tiny_bundle, decoder)
    assert isinstance(own.layers, GraphLayers if decoder == "graphs" else KernelLayers)
    for compression in (Compression.off(), Compression(mode="paper", positions="keep"), Compression()):
        settings: dict[str, Any] = {"video": frames(9), "compression": compression, "sampling": SHORT}
        got, want = own.generate("What?", **settings), llm.generate("What?", **settings)
        assert got.token_ids == want.token_ids
        for name in ("visual_tokens_kept", "mean_active_rows", "refreshes", "kv_bytes"):
            assert getattr(got.stats, name) == getattr(want.stats, name), name
        weights = 2 * 4 * own.kv.capacity * own.kv.weighed  # a GPU holds them beside the rows
        assert got.stats.kv_bytes_reserved == want.stats.kv_bytes_reserved + weights
        assert got.stats.kv_compaction_latency is None or decoder == "graphs"


@pytest.mark.parametrize(
    "compression",
    [Compression(mode="paper"), Compression.off(), Compression(mode="paper", positions="keep"), Compression()],
)
def test_nothing_waits_before_the_first_token(
    tiny_bundle: Path, llm: VideoLLM, monkeypatch: pytest.MonkeyPatch, compression: Compression
) -> None:
    """What `on_seen` hears, and the set that keep by coverage leaves active, are fetched after the token."""
    opened, device, wait, waits = open_bundle(tiny_bundle), EmulatedDevice(), Records.wait, list[int]()
    own = VideoLLM(opened, KernelEngine(opened, SPEC, device), SPEC)
    settings: dict[str, Any] = {"video": frames(6), "compression": compression, "sampling": SHORT}

    def noted(self: Records, number: int) -> Any:
        waits.append(device.waits)
        return wait(self, number)

    monkeypatch.setattr(Records, "wait", noted)
    got, want = list[Seen](), list[Seen]()
    for listener in (None, got.append):
        begun = device.waits
        pieces = list(own.stream("What?", on_seen=listener, **settings))
        assert waits[0] == begun
        fetched = listener is not None and compression.merges
        # the token, the clock, the places, and for keep by coverage what was counted
        assert waits[1] - waits[0] == 2 + fetched + (compression.covered_ratio > 0)
        waits.clear()
    stats = pieces[-1].stats
    ids = [piece.token for piece in llm.stream("What?", on_seen=want.append, **settings)]
    assert [piece.token for piece in pieces] == ids
    assert isinstance(got[0].kept, np.ndarray) and np.array_equal(got[0].kept, want[0].kept)
    assert len(got) == len(want) == 1
    parts = stats.vision_latency, stats.merge_latency, stats.prefill_latency
    assert min(parts) > 0 and sum(parts) == pytest.approx(stats.time_to_first_token)


def test_one_request_after_another(tiny_bundle: Path, llm: VideoLLM, device: Device) -> None:
    """Memory and pinned memory are used again while the GPU may still read what an earlier stage left there."""
    opened = open_bundle(tiny_bundle)
    own = VideoLLM(opened, KernelEngine(opened, SPEC, device), SPEC)
    said = [("system", "Be brief."), ("user", "What?"), ("assistant", "A square."), ("user", "And then?")]
    talk = [Message(role, text, number == 3) for number, (role, text) in enumerate(said)]  # type: ignore[arg-type]
    requests: list[dict[str, Any]] = [
        {"prompt": "What?", "video": frames(7), "compression": Compression(merge_ratio=0.5)},
        {"prompt": "And? " * 9, "video": frames(4), "compression": Compression.off()},
        {"prompt": "Which?", "image": frames(5)[4]},
        {"prompt": "Say something."},
        {"prompt": talk, "video": frames(5), "compression": Compression(positions="keep")},
    ]
    for _ in range(2):
        for request in requests:
            got, want = (made.generate(sampling=SHORT, **request) for made in (own, llm))
            assert got.token_ids == want.token_ids
            assert (got.stats.vision_latency > 0) == (got.stats.frames > 0)


def test_a_live_video_is_answered_as_on_the_cpu(tiny_bundle: Path, llm: VideoLLM) -> None:
    found = []
    for made in (emulated(tiny_bundle), llm):
        live = made.live(Compression(), LiveSpec(4, 0.0, max_question_tokens=40, max_answer_tokens=12))
        for number, frame in enumerate(frames(7)):
            live.push(frame, float(number))
        ids = [piece.token for piece in live.ask("What?", SHORT)]
        found.append((ids, live.num_frames, live.num_tokens, round(live.score("Is it?")["yes"], 4)))
    assert found[0] == found[1]


def test_bench_counts_what_kernels_move(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def opened(bundle: Bundle, spec: EngineSpec) -> OnHost:
        return OnHost(bundle, spec, EmulatedDevice())

    monkeypatch.setattr(bench, "open_engine", opened)
    job = bench.Bench(tiny_bundle, BenchSpec(num_frames=4, new_tokens=3, rounds=1, warmup=0), Compression(), SPEC)
    results = {(result.mode, result.compression): result for result in job.run()}
    layers = job.llm.layers
    assert isinstance(layers, KernelLayers)
    off, on = results["decode", "off"], results["decode", "on"]
    assert layers.weights.nbytes < on.bytes_moved < off.bytes_moved < 1.2 * layers.weights.nbytes
    assert off.device_bytes and off.device_bytes > layers.weights.nbytes
    assert "kv_compaction_latency" not in off.samples
    assert not job.on_host and job.bandwidth == 1e9  # the emulated device's
