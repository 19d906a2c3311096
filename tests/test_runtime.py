"""The runtime as an app sees it: what is bound, what is reported, what is left behind."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from dycoke_edge import Clip, Compression, EngineSpec, KVOverflow, Sampling, UsageError, VideoLLM
from dycoke_edge.bundle import open_bundle
from dycoke_edge.config import BuildSpec
from dycoke_edge.dycoke import merge_indices
from dycoke_edge.runtime import visual
from dycoke_edge.runtime.engine import AnyArray
from tests.test_parity import frames

CLIP = "examples/clip.mp4"
Array = NDArray[Any]
SHORT = Sampling(max_new_tokens=24, stop_token_ids=())
OFTEN = Compression(merge_ratio=0.5, prune_ratio=0.7, refresh_threshold=0.95)


class Recorder:
    """Stands before an engine and keeps what each call was given."""

    def __init__(self, llm: VideoLLM) -> None:
        self.calls: list[tuple[str, dict[str, Any], dict[str, Any]]] = []
        self._run = llm.engine.run
        llm.engine.run = self.run  # type: ignore[method-assign]

    def run(self, graph: str, inputs: Mapping[str, AnyArray], outputs: Mapping[str, AnyArray]) -> None:
        self.calls.append((graph, dict(inputs), dict(outputs)))
        self._run(graph, inputs, outputs)

    def steps(self, graph: str) -> list[tuple[dict[str, Array], dict[str, Array]]]:
        """Calls that computed one token."""
        return [(i, o) for name, i, o in self.calls if name == graph and len(i["cos"]) == 1]


def test_cached_rows_are_slices_of_the_slab_and_new_rows_are_written_in_place(llm: VideoLLM) -> None:
    recorder = Recorder(llm)
    llm.generate("What?", video=frames(9), compression=OFTEN, sampling=SHORT)
    slab, start = llm.kv.slab, llm.kv.slab.ctypes.data
    deep = llm.bundle.model.split_layer
    for graph, layer in (("decoder_shallow", 0), ("decoder_deep", deep)):
        for inputs, outputs in recorder.steps(graph):
            cached, new = inputs[f"k_{layer}"], outputs[f"new_k_{layer}"]
            plane = start + 2 * layer * slab.strides[0]
            assert plane <= cached.ctypes.data < plane + slab.strides[0]
            assert new.ctypes.data == cached.ctypes.data + cached.nbytes  # the row after the last one


def test_no_graph_is_given_an_empty_cache(llm: VideoLLM) -> None:
    recorder = Recorder(llm)
    llm.generate("What?", video=frames(4), compression=Compression(merge_ratio=0.7), sampling=SHORT)
    bound = [array for _, inputs, _ in recorder.calls for name, array in inputs.items() if name[:2] in ("k_", "v_")]
    assert bound and min(len(array) for array in bound) == 1
    assert all(
        not inputs["mask"][:, 1:].any() or len(inputs["cos"]) > 1 for _, inputs, _ in recorder.calls if "mask" in inputs
    )


def test_counts_equal_those_of_the_arrays(llm: VideoLLM) -> None:
    recorder = Recorder(llm)
    reply = llm.generate("What?", video=frames(9), compression=OFTEN, sampling=SHORT)
    stats, deep = reply.stats, llm.bundle.model.split_layer
    tokens = [o["tokens"] for name, _, o in recorder.calls if name == "vision"]
    assert stats.visual_tokens_in == sum(t.shape[0] * t.shape[1] for t in tokens) == 9 * 16
    index = merge_indices(np.concatenate(tokens), 0.5)
    assert stats.visual_tokens_kept == len(index)
    text = [stats.text_tokens + n for n in range(len(reply.token_ids) - 1)]
    steps = recorder.steps("decoder_deep")[-len(text) :]
    active = [len(i[f"k_{deep}"]) - rows for (i, _), rows in zip(steps, text, strict=True)]
    assert stats.mean_active_rows == np.mean(active)
    assert set(active) == {int(len(index) * (1 - 0.7))}
    seen = [
        len(i["k_0"]) - rows for (i, _), rows in zip(recorder.steps("decoder_shallow")[-len(text) :], text, strict=True)
    ]
    assert set(seen) == {len(index)}
    assert stats.refreshes > 3 and stats.keep_applied and stats.merge_applied and not stats.why_not
    assert stats.kv_bytes == (len(index) + text[-1] + 1) * llm.bundle.model.kv_bytes_per_token


def test_two_requests_in_a_row_give_what_each_gives_alone(tiny_bundle: Path) -> None:
    requests: list[dict[str, Any]] = [
        {"prompt": "What?", "video": frames(9), "compression": OFTEN},
        {"prompt": "And this?", "image": frames(1)[0], "compression": Compression(free_parked=True)},
        {"prompt": "Only text."},
        {"prompt": "What?", "video": frames(16), "compression": Compression(merge_ratio=0.9, positions="keep")},
        {"prompt": "Why?", "video": frames(9), "compression": Compression(mode="official")},
    ]
    alone = [VideoLLM.load(tiny_bundle, kv_capacity=512).generate(**r, sampling=SHORT).token_ids for r in requests]
    llm = VideoLLM.load(tiny_bundle, kv_capacity=512)
    for order in (range(len(requests)), reversed(range(len(requests)))):
        for number in order:
            assert llm.generate(**requests[number], sampling=SHORT).token_ids == alone[number]


def test_an_abandoned_stream_leaves_nothing_behind(llm: VideoLLM) -> None:
    want = llm.generate("What?", video=frames(9), compression=OFTEN, sampling=SHORT).token_ids
    stream = llm.stream("Something else", video=frames(4), sampling=SHORT)
    for _ in range(5):
        next(stream)
    del stream
    assert llm.generate("What?", video=frames(9), compression=OFTEN, sampling=SHORT).token_ids == want


def test_a_stream_overtaken_by_another_request_says_so(llm: VideoLLM) -> None:
    stream = llm.stream("What?", video=frames(4), sampling=SHORT)
    next(stream)
    llm.generate("And this?", sampling=SHORT)
    with pytest.raises(UsageError, match="newer request"):
        next(stream)


def test_stream_and_generate_agree(llm: VideoLLM) -> None:
    reply = llm.generate("What?", video=CLIP, clip=Clip(num_frames=8), sampling=SHORT)
    pieces = list(llm.stream("What?", video=CLIP, clip=Clip(num_frames=8), sampling=SHORT))
    assert [piece.token for piece in pieces] == reply.token_ids
    assert reply.text.startswith("".join(piece.text for piece in pieces))
    assert reply.finish_reason == "length"


def test_resident_and_mapped_weights_give_the_same_tokens(tiny_bundle: Path, llm: VideoLLM) -> None:
    resident = VideoLLM.load(tiny_bundle, kv_capacity=512, resident=True)
    for _ in range(2):
        a, b = (m.generate("What?", video=frames(9), compression=OFTEN, sampling=SHORT) for m in (llm, resident))
        assert a.token_ids == b.token_ids


@pytest.mark.parametrize("batch", [2, 3, 16])
def test_frames_encoded_together_give_the_same_tokens(tiny_bundle: Path, llm: VideoLLM, batch: int) -> None:
    other = VideoLLM.load(tiny_bundle, kv_capacity=512, vision_batch=batch)
    a, b = (m.generate("What?", video=frames(9), compression=OFTEN, sampling=SHORT) for m in (llm, other))
    assert a.token_ids == b.token_ids


def test_a_stop_token_ends_the_answer(llm: VideoLLM) -> None:
    plain = llm.generate("What?", video=frames(4), sampling=SHORT).token_ids
    stop = plain[6]
    sampling = Sampling(max_new_tokens=24, stop_token_ids=(stop,))
    reply = llm.generate("What?", video=frames(4), sampling=sampling)
    assert reply.token_ids == plain[: plain.index(stop) + 1]
    assert reply.finish_reason == "stop"


def test_the_same_seed_draws_the_same_answer(llm: VideoLLM) -> None:
    def draw(seed: int) -> list[int]:
        sampling = Sampling(max_new_tokens=24, temperature=1.5, top_p=0.9, seed=seed, stop_token_ids=())
        return llm.generate("What?", video=frames(4), sampling=sampling).token_ids

    assert draw(1) == draw(1) != draw(2)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({}, "text only"),
        ({"image": frames(1)[0]}, "one frame"),
        ({"video": frames(4), "compression": Compression(merge_ratio=0.0)}, "merge_ratio is 0"),
        ({"video": frames(4), "compression": Compression(prune_ratio=0.0)}, "prune_ratio is 0"),
        ({"video": frames(4), "sampling": Sampling(max_new_tokens=1)}, "one token"),
    ],
)
def test_a_reply_says_why_compression_did_not_apply(llm: VideoLLM, arguments: dict[str, Any], word: str) -> None:
    stats = llm.generate("What?", **{"sampling": SHORT, **arguments}).stats
    assert any(word in reason for reason in stats.why_not)


def test_compression_off_applies_nothing(llm: VideoLLM) -> None:
    stats = llm.generate("What?", video=frames(9), compression=Compression.off(), sampling=SHORT).stats
    assert not stats.compression_applied and len(stats.why_not) == 2
    assert stats.visual_tokens_kept == stats.visual_tokens_in == stats.mean_active_rows


def test_weights_are_for_what_was_merged(llm: VideoLLM) -> None:
    for weighs, ratio in ((False, 0.0), (True, 0.7)):
        plain, weighed = (Compression(merge_ratio=ratio, weigh=weigh) for weigh in (False, True))
        ids = [llm.generate("What?", frames(9), compression=one, sampling=SHORT).token_ids for one in (plain, weighed)]
        assert llm.kv.weighed == weighs == (ids[0] != ids[1])


@pytest.mark.parametrize("ratio", [0.0, 0.3, 1.0])
def test_every_ratio_runs(llm: VideoLLM, ratio: float) -> None:
    stats = llm.generate("What?", video=frames(5), compression=Compression(merge_ratio=ratio), sampling=SHORT).stats
    assert stats.visual_tokens_kept == 2 * 16 + 3 * int((1 - ratio) * 16)


def test_freed_rows_count_no_more(llm: VideoLLM) -> None:
    kept, freed = (
        llm.generate(
            "What?",
            video=frames(9),
            compression=Compression(merge_ratio=0.5, prune_ratio=0.7, free_parked=free),
            sampling=SHORT,
        ).stats
        for free in (False, True)
    )
    model = llm.bundle.model
    parked = kept.visual_tokens_kept - int(kept.mean_active_rows)
    row = model.kv_bytes_per_token // model.num_layers
    assert kept.kv_bytes - freed.kv_bytes == parked * row * (model.num_layers - model.split_layer)
    assert freed.refreshes == 1


def test_the_capacity_asked_for_is_enough(tiny_bundle: Path) -> None:
    small = VideoLLM.load(tiny_bundle, kv_capacity=64)
    with pytest.raises(KVOverflow) as caught:
        small.generate("What?", video=frames(9), sampling=SHORT)
    enough = VideoLLM.load(tiny_bundle, kv_capacity=caught.value.needed)
    assert len(enough.generate("What?", video=frames(9), sampling=SHORT).token_ids) == 24
    assert len(small.generate("Hi", sampling=SHORT).token_ids) == 24  # the small one still works


def test_another_provider_is_an_error() -> None:
    with pytest.raises(UsageError, match="--provider"):
        EngineSpec(provider="cuda9")  # type: ignore[arg-type]


def test_what_decodes() -> None:
    assert EngineSpec().decoding == "graphs" and EngineSpec(decoder="graphs").decoding == "graphs"
    for provider in ("cuda", "tensorrt"):
        assert EngineSpec(provider=provider).decoding == "captured"
        assert EngineSpec(provider=provider, decoder="launched").decoding == "launched"
    for decoder in ("captured", "launched"):
        with pytest.raises(UsageError, match=f"{decoder}.*--decoder.*--provider cuda.*--decoder graphs"):
            EngineSpec(decoder=decoder)


def test_frames_at_a_time() -> None:
    assert EngineSpec().frames_at_a_time == 1 and EngineSpec(provider="cuda").frames_at_a_time == 8
    assert EngineSpec(vision_batch=3).frames_at_a_time == EngineSpec("cuda", vision_batch=3).frames_at_a_time == 3
    with pytest.raises(UsageError, match=r"vision_batch=1.5.*whole"):
        EngineSpec(vision_batch=1.5)  # type: ignore[arg-type]


def test_tokens_at_a_time() -> None:
    specs = EngineSpec(), EngineSpec("cuda"), EngineSpec("tensorrt", "graphs"), EngineSpec("cuda", prefill_chunk=7)
    assert [spec.tokens_at_a_time for spec in specs] == [256, 4096, 2048, 7]
    assert EngineSpec("tensorrt", "graphs").tokens_at_a_time == BuildSpec().prefill_chunk  # no plan takes more


def test_a_half_precision_bundle_answers(half_bundle: Path) -> None:
    half = VideoLLM.load(half_bundle, kv_capacity=512)
    stats = half.generate("What?", video=frames(9), compression=OFTEN, sampling=SHORT).stats
    assert stats.new_tokens == 24 and stats.merge_applied and stats.keep_applied
    assert half.kv.slab.dtype == np.float16


def test_official_merge_refuses_short_clips_before_encoding(llm: VideoLLM) -> None:
    recorder = Recorder(llm)
    with pytest.raises(UsageError, match="--mode"):
        llm.generate("What?", video=frames(4), compression=Compression(mode="official"))
    assert not recorder.calls


def test_official_merge_keeps_the_official_order(llm: VideoLLM) -> None:
    tokens = np.asarray(visual.encode(llm.bundle, llm.engine, frames(9), 4))
    merged = visual.merge(llm.bundle, llm.engine, tokens, Compression(mode="official"))
    kept, index = merged.tokens, merged.index
    assert (np.diff(index) < 0).any()
    assert np.array_equal(kept, tokens.reshape(-1, tokens.shape[-1])[index])


def test_the_embedding_table_is_mapped(tiny_bundle: Path) -> None:
    table = open_bundle(tiny_bundle).embed_tokens()
    assert isinstance(table.base, np.memmap) and not table.flags.writeable


PREFILL = """
import sys, threading
import numpy as np
from dycoke_edge import VideoLLM
from dycoke_edge.runtime.loop import Prompt

def peak(rows):
    llm = VideoLLM.load(sys.argv[1], kv_capacity=rows + 8)
    ids = np.arange(rows) % 250
    llm._decoder.prefill(Prompt(ids, ids[:0]), 1)

rows = int(sys.argv[2])
peak(rows)
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(int(status["VmHWM"].split()[0]) * 1024)
"""


@pytest.mark.slow
def test_peak_memory_of_prefill_grows_by_the_kv_alone(tiny_bundle: Path) -> None:
    """Scores take H * T * (S + T) floats; unbounded chunks would add 100 MB from 4,096 to 16,384 rows here."""

    def peak(rows: int) -> int:
        command = [sys.executable, "-c", PREFILL, str(tiny_bundle), str(rows)]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    small, large = 4096, 16384
    kv = (large - small) * open_bundle(tiny_bundle).model.kv_bytes_per_token
    assert peak(large) - peak(small) < kv + 24 * 2**20


@pytest.mark.slow
def test_memory_stays_flat_over_many_requests(llm: VideoLLM) -> None:
    def resident() -> int:
        text = Path("/proc/self/statm").read_text().split()[1]
        return int(text) * 4096

    def ask(times: int) -> None:
        for _ in range(times):
            llm.generate("What?", video=frames(9), compression=OFTEN, sampling=SHORT)

    ask(10)
    before = resident()
    ask(40)
    assert resident() - before < 4 * 2**20
