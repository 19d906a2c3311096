"""The decoder as CUDA kernels gives what the decoder's graphs give: tokens, kept sets, rows, to the last exchange."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from dycoke_edge import BundleError, Compression, EngineError, Sampling, VideoLLM
from dycoke_edge.config import LiveSpec
from dycoke_edge.runtime import layers as graph_layers
from dycoke_edge.runtime.gpu import layers as kernel_layers
from dycoke_edge.runtime.gpu import stored, weights
from dycoke_edge.runtime.gpu.device import Device, DeviceArray
from dycoke_edge.runtime.gpu.layers import KernelLayers
from dycoke_edge.runtime.gpu.prefill import Prefill
from dycoke_edge.runtime.kv import KVBuffer
from dycoke_edge.runtime.live import LiveVideo
from dycoke_edge.runtime.loop import NO_VISUAL, Decoder
from dycoke_edge.runtime.sampling import Sampler
from dycoke_edge.runtime.step import Step
from tests import lively
from tests.emulator import EmulatedDevice
from tests.gpu import no_cuda_graphs, no_gpu
from tests.test_parity import answer, frames

CHUNK, ROWS, TOKENS = 32, 512, 24


def kernels(bundle: Path, device: Device, captured: bool = True, chunk: int = CHUNK) -> VideoLLM:
    """The same VideoLLM with the decoder on a device."""
    llm = VideoLLM.load(bundle, kv_capacity=ROWS, prefill_chunk=chunk)
    llm.layers = KernelLayers(llm.bundle, device, chunk, captured)
    llm.kv = llm.layers.new_kv(ROWS)
    llm._decoder = Decoder(llm.layers, llm.kv)
    return llm


def facts(step: Step) -> tuple[int, int, bool, int]:
    return step.token, step.active, step.refreshed, step.returned


@pytest.mark.parametrize(
    "name", ["merge-0.7-often", "positions-keep-often", "weighed", "weighed-often", "official", "free-parked"]
)
def test_answers_are_those_of_the_graphs(tiny_bundle: Path, llm: VideoLLM, device: Device, name: str) -> None:
    case, own = lively.CASES[name], kernels(tiny_bundle, device)
    want, got = answer(llm, case, TOKENS)[0], answer(own, case, TOKENS)[0]
    assert [facts(step) for step in got] == [facts(step) for step in want]
    assert name == "free-parked" or sum(step.returned for step in want) > 0
    count = llm.kv.num_visual
    np.testing.assert_array_equal(own.kv.slot[:count], llm.kv.slot[:count])


@pytest.mark.parametrize(
    ("name", "chunk"),
    [*(("positions-keep-often", chunk) for chunk in (1, 7, 64, 512)), ("weighed", 64), ("weighed", 512)],
)
def test_frames_and_question_share_passes(
    tiny_bundle: Path, device: Device, monkeypatch: pytest.MonkeyPatch, name: str, chunk: int
) -> None:
    """As few as the scratch memory allows, whether the question fits the last one or is cut."""
    case, run, passes = lively.CASES[name], Prefill.run, list[tuple[int, int]]()

    def noted(self: Prefill, kv: KVBuffer, visual: Any, text: Any, positions: Any) -> None:
        passes.append((len(visual), len(text)))
        run(self, kv, visual, text, positions)

    monkeypatch.setattr(Prefill, "run", noted)
    want = answer(VideoLLM.load(tiny_bundle, kv_capacity=ROWS, prefill_chunk=chunk), case, 6)[0]
    got, prompt = answer(kernels(tiny_bundle, device, chunk=chunk), case, 6)
    assert [facts(step) for step in got] == [facts(step) for step in want]
    begun = -(-len(prompt.prefix) // chunk)
    assert len(passes) == begun - (-(prompt.num_visual + len(prompt.suffix)) // chunk)
    assert [sum(side) for side in zip(*passes[begun:], strict=True)] == [prompt.num_visual, len(prompt.suffix)]
    assert any(visual and text for visual, text in passes) or chunk == 1


def test_a_pass_that_fails_leaves_the_next_request_right(
    tiny_bundle: Path, llm: VideoLLM, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, finish, left = kernels(tiny_bundle, device), Prefill._finish, [-1]
    spec = LiveSpec(4, 0.0, max_question_tokens=64, max_answer_tokens=8)
    asked = Sampling(max_new_tokens=6, stop_token_ids=())

    def ids(made: VideoLLM) -> list[int]:
        return made.generate("What?", frames(9), sampling=asked).token_ids

    def said(live: LiveVideo) -> list[int]:
        return [piece.token for piece in live.ask("And? " * 8, asked)]

    lives = [made.live(spec=spec) for made in (llm, own)]
    for live in lives:
        live.push(frames(1)[0])
    calls = [(partial(ids, own), ids(llm)), (partial(said, lives[1]), said(lives[0]))]

    def failing(self: Prefill, layer: Any, part: Any) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise EngineError("in between")
        finish(self, layer, part)

    monkeypatch.setattr(Prefill, "_finish", failing)
    count = own.bundle.model.num_layers
    for call, right in calls:
        for fails in (2, count + 1, 2 * count):  # in the first pass, between the first two, at the end of the second
            left[0] = fails
            with pytest.raises(EngineError, match="in between"):
                call()
            assert call() == right


def test_a_captured_step_is_one_launch_and_changes_nothing(tiny_bundle: Path) -> None:
    case, device = lively.CASES["merge-0.7-often"], EmulatedDevice()
    captured, launched = kernels(tiny_bundle, device), kernels(tiny_bundle, device, captured=False)
    want = answer(launched, case, TOKENS)[0]
    answer(captured, case, 2)
    before = device.launches
    answer(captured, case, 2)
    prefill, before = device.launches - before, device.launches
    assert answer(captured, case, TOKENS)[0] == want
    assert device.launches - before == prefill + TOKENS - 2


@pytest.mark.parametrize("name", ["merge-0.7-often", "weighed-often"])
def test_the_order_of_threads_does_not_matter(tiny_bundle: Path, name: str) -> None:
    case = lively.CASES[name]
    want = answer(kernels(tiny_bundle, EmulatedDevice()), case, 6)[0]
    for order in (1, 5):
        assert answer(kernels(tiny_bundle, EmulatedDevice(order=order)), case, 6)[0] == want


def test_weights_of_one_answer_are_not_those_of_the_next(tiny_bundle: Path, llm: VideoLLM, device: Device) -> None:
    own, before = kernels(tiny_bundle, device), llm.kv.nbytes
    for name in ("merge-0.7-often", "weighed-often", "merge-0.7-often", "weighed"):
        assert own.kv.nbytes == before
        case = lively.CASES[name]
        want = [facts(step) for step in answer(llm, case, 12)[0]]
        assert [facts(step) for step in answer(own, case, 12)[0]] == want, name
        before += 2 * 4 * ROWS * (name == "weighed-often")  # made once, when it is needed


def test_text_alone_and_a_question_of_one_token(tiny_bundle: Path, llm: VideoLLM, device: Device) -> None:
    short = Sampling(max_new_tokens=8, stop_token_ids=())
    one = replace(short, max_new_tokens=1)
    want, got = (
        (
            made.generate("Say something.", sampling=short).token_ids,
            made.generate("?", frames(4), sampling=one).token_ids,
        )
        for made in (llm, kernels(tiny_bundle, device))
    )
    assert got == want


def test_drawn_tokens_are_the_same(tiny_bundle: Path, llm: VideoLLM, device: Device) -> None:
    drawn = Sampling(max_new_tokens=8, temperature=0.8, top_p=0.9, seed=3, stop_token_ids=())
    own = kernels(tiny_bundle, device).generate("What?", frames(4), sampling=drawn)
    assert own.token_ids == llm.generate("What?", frames(4), sampling=drawn).token_ids


def test_a_stop_token_ends_an_answer_that_the_gpu_is_ahead_of(tiny_bundle: Path, llm: VideoLLM, device: Device) -> None:
    own, free = kernels(tiny_bundle, device), Sampling(max_new_tokens=12, stop_token_ids=())
    want = llm.generate("What?", frames(4), sampling=free).token_ids
    stop = replace(free, stop_token_ids=(want[5],))
    end = want.index(want[5]) + 1
    for _ in range(2):  # the second answer finds nothing left of the first
        assert own.generate("What?", frames(4), sampling=stop).token_ids == want[:end]
    assert own.generate("What?", frames(4), sampling=free).token_ids == want


def live_tokens(llm: VideoLLM, weigh: bool) -> Iterator[list[int]]:
    """Questions about a video that outgrows its memory, with an answer left half-way."""
    asked, room = Sampling(max_new_tokens=6, stop_token_ids=()), {"max_question_tokens": 40, "max_answer_tokens": 8}
    live = llm.live(Compression(mode="paper", refresh_threshold=0.99, weigh=weigh), LiveSpec(6, 0.0, **room))
    other = llm.live(Compression.off(), LiveSpec(2, 0.0, **room))
    for number, frame in enumerate(frames(12)):
        live.push(frame)
        if number % 4 == 3:
            left = live.ask("Who?", asked)
            yield [next(left).token, next(left).token]
            other.push(frame)
            pairs = zip(live.ask("What?", asked), other.ask("And here?", asked), strict=True)
            yield [token for pair in pairs for token in (pair[0].token, pair[1].token)]


@pytest.mark.parametrize("weigh", [False, True])
def test_live_videos_evict_and_take_turns(tiny_bundle: Path, llm: VideoLLM, device: Device, weigh: bool) -> None:
    assert list(live_tokens(kernels(tiny_bundle, device), weigh)) == list(live_tokens(llm, weigh))


def test_positions_are_moved_back(tiny_bundle: Path, llm: VideoLLM, device: Device) -> None:
    found = []
    for made in (llm, kernels(tiny_bundle, device)):
        decoder = Decoder(made.layers, made.layers.new_kv(128))
        decoder.begin(np.arange(5), 40)
        tokens = made.bundle.embed_tokens()[np.arange(60) % 250]
        decoder.see(tokens, np.arange(60, dtype=np.int32), 60)
        decoder.forget(20, 20)
        assert decoder.rebase() == 20
        decoder.read(np.arange(7))
        found.append(decoder.logits[0])
    np.testing.assert_allclose(found[1], found[0], atol=2e-4)


def test_half_precision(half_bundle: Path, device: Device) -> None:
    """fp16 kernels follow the fp16 graphs within the rounding of fp16, and give the same tokens where it is clear."""
    host, own = VideoLLM.load(half_bundle, kv_capacity=256), kernels(half_bundle, device)
    ids = np.arange(40) % 250
    for llm in (host, own):
        llm._decoder.begin(ids, 60)
    a, b = host._decoder.logits[0], own._decoder.logits[0]
    assert np.abs(a - b).max() < 0.02 * np.abs(a).max()
    for token in range(4):  # and so does a step over what was cached
        for llm in (host, own):
            llm._decoder.layers.prefill(llm.kv, NO_VISUAL, np.array([token]), np.array([40 + token]))
        a, b = host._decoder.logits[0], own._decoder.logits[0]
        assert np.abs(a - b).max() < 0.02 * np.abs(a).max()


class Watched(Sampler):
    """Notes the logits it draws from; draws the best, or what it is told."""

    def __init__(self, seen: list[NDArray[np.float32]], told: list[int] | None = None) -> None:
        super().__init__(Sampling())
        self.seen, self.told = seen, iter(told or [])

    def __call__(self, logits: NDArray[np.float32]) -> int:
        self.seen.append(logits.copy())
        return next(self.told, super().__call__(logits))


def test_half_precision_picks_the_same_where_it_is_clear(
    half_bundle: Path, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Step by step, on the host's tokens: logits within fp16's error, and the same best one where the second is
    further away than that."""
    count = 12 if isinstance(device, EmulatedDevice) else 128
    drawn = Sampling(max_new_tokens=count, temperature=1.0, stop_token_ids=())
    asked: dict[str, Any] = {"video": frames(9), "compression": Compression(merge_ratio=0.5), "sampling": drawn}
    want, got = list[NDArray[np.float32]](), list[NDArray[np.float32]]()
    monkeypatch.setattr(graph_layers, "Sampler", lambda sampling: Watched(want))
    ids = VideoLLM.load(half_bundle, kv_capacity=ROWS).generate("What?", **asked).token_ids
    monkeypatch.setattr(kernel_layers, "Sampler", lambda sampling: Watched(got, ids))
    assert kernels(half_bundle, device).generate("What?", **asked).token_ids == ids
    for a, b in zip(want, got, strict=True):
        error = np.abs(a - b).max()
        assert error < 0.02 * np.abs(a).max()
        best = np.sort(a)[-2:]
        assert a.argmax() == b.argmax() or best[1] - best[0] < 2 * error


@pytest.mark.gpu
@pytest.mark.skipif(bool(no_gpu()), reason=no_gpu())
def test_captured_launched_and_the_cpu_agree_for_128_tokens(tiny_bundle: Path, llm: VideoLLM) -> None:
    long = Sampling(max_new_tokens=128, stop_token_ids=())
    want = llm.generate("What?", frames(9), sampling=long).token_ids
    for decoder in ("captured", "launched", *(() if no_cuda_graphs() else ("graphs",))):
        own = VideoLLM.load(tiny_bundle, "cuda", decoder=decoder, kv_capacity=ROWS)
        assert own.generate("What?", frames(9), sampling=long).token_ids == want, decoder


def test_logits_that_are_not_finite_are_an_error(tiny_bundle: Path, device: Device) -> None:
    own = kernels(tiny_bundle, device)
    assert isinstance(own.layers, KernelLayers)
    norm = own.layers.weights.norm
    norm[...] = np.full(norm.shape, np.nan, norm.dtype)
    with pytest.raises(EngineError, match="verify"):
        own.generate("What?")


def test_weights_are_turned_in_pieces(tiny_bundle: Path, device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = kernels(tiny_bundle, device).layers
    monkeypatch.setattr(stored, "STAGE_BYTES", 5000)
    pieces = kernels(tiny_bundle, device).layers
    assert isinstance(whole, KernelLayers) and isinstance(pieces, KernelLayers)
    for name in ("qkv", "out", "gate_up", "down"):
        a, b = (getattr(made.weights.layers[2], name) for made in (whole, pieces))
        assert isinstance(a, DeviceArray)
        np.testing.assert_array_equal(a.numpy(), b.numpy())


def test_a_model_that_the_kernels_are_not_made_for(
    tiny_bundle: Path, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "HEAD_DIMS", (64,))
    with pytest.raises(EngineError, match=r"head_dim 32; use --decoder graphs"):
        kernels(tiny_bundle, device)


def test_a_bundle_without_a_weight_table(tiny_bundle: Path, device: Device) -> None:
    llm = VideoLLM.load(tiny_bundle)
    llm.bundle.manifest.files.pop("onnx/decoder_weights.json")
    with pytest.raises(BundleError, match=r"decoder_weights\.json, which a GPU's kernels need; export again"):
        KernelLayers(llm.bundle, device, CHUNK, captured=True)
