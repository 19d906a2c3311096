"""A live video answers as the whole clip would, for ever, in bounded memory, and disturbs nobody."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from dycoke_edge import Compression, EngineError, LiveSpec, LiveVideo, Message, Sampling, UsageError, VideoLLM
from dycoke_edge.bundle import sealed
from dycoke_edge.dycoke import count_merged, merge_indices, stands_for
from dycoke_edge.runtime.engine import AnyArray
from dycoke_edge.runtime.live_window import ANCHOR
from dycoke_edge.runtime.loop import Prompt
from tests import reference
from tests.test_parity import frames
from tests.test_runtime import Recorder

Array = NDArray[Any]
N = 16  # visual tokens a frame of the tiny model
SHORT = Sampling(max_new_tokens=24, stop_token_ids=())
OFTEN = Compression(merge_ratio=0.5, prune_ratio=0.7, refresh_threshold=0.95)
PLAIN = LiveSpec(
    memory_frames=16, gate_threshold=None, scene_cut=None, max_question_tokens=64, max_answer_tokens=24
)  # nothing that the offline path has not
COMPRESSIONS = {
    "off": Compression.off(),
    "merge": Compression(mode="paper", prune_ratio=0.0),
    "merge and prune": OFTEN,
    "positions keep": Compression(mode="paper", refresh_threshold=0.95, positions="keep"),
    "coverage": Compression(budget=0.5),
    "coverage attended": Compression(budget=0.3, keep="attention", prune_ratio=0.7, positions="reassign"),
}


def ids(live: LiveVideo, prompt: str = "What?", sampling: Sampling = SHORT) -> list[int]:
    return [piece.token for piece in live.ask(prompt, sampling)]


def push_all(live: LiveVideo, video: NDArray[np.uint8]) -> None:
    for number, frame in enumerate(video):
        live.push(frame, float(number))


# the same answers as offline


@pytest.mark.parametrize("count", [1, 4, 9, 16])
@pytest.mark.parametrize("name", COMPRESSIONS)
def test_a_streamed_clip_gives_the_ids_of_the_whole_clip(llm: VideoLLM, name: str, count: int) -> None:
    want = llm.generate("What?", video=frames(count), compression=COMPRESSIONS[name], sampling=SHORT)
    live = llm.live(COMPRESSIONS[name], PLAIN)
    push_all(live, frames(count))
    for _ in range(2):  # a question leaves nothing behind
        got = llm.reply(live.ask("What?", SHORT))
        assert got.token_ids == want.token_ids and got.text == want.text
    assert len(set(want.token_ids)) > 4
    for name in (
        "frames",
        "why_not",
        "merge_applied",
        "keep_applied",
        "visual_tokens_in",
        "visual_tokens_kept",
        "text_tokens",
        "refreshes",
        "mean_active_rows",
    ):
        assert getattr(got.stats, name) == getattr(want.stats, name)


def test_questions_in_between_change_nothing(llm: VideoLLM) -> None:
    want = llm.generate("What?", video=frames(9), compression=OFTEN, sampling=SHORT).token_ids
    live = llm.live(OFTEN, PLAIN)
    for number, frame in enumerate(frames(9)):
        live.push(frame)
        if number % 2:
            ids(live, f"And frame {number}?")
        else:
            live.score("Is there a square?")
    assert ids(live) == want


def test_frames_of_any_size_are_scaled_as_a_clip_is(llm: VideoLLM) -> None:
    large = np.random.default_rng(0).integers(0, 256, (5, 150, 220, 3), np.uint8)
    live = llm.live(OFTEN, PLAIN)
    push_all(live, large)
    assert ids(live) == llm.generate("What?", video=large, compression=OFTEN, sampling=SHORT).token_ids


def test_tokens_encoded_once_serve_many_settings(llm: VideoLLM) -> None:
    tokens = llm.encode(frames(9))
    for compression in COMPRESSIONS.values():
        live = llm.live(compression, PLAIN)
        for frame in tokens:
            live.push_tokens(frame)
        want = llm.generate("What?", video=frames(9), compression=compression, sampling=SHORT).token_ids
        assert ids(live) == want


def test_resident_weights_give_the_same_ids(tiny_bundle: Path, llm: VideoLLM) -> None:
    answers = []
    for model in (llm, VideoLLM.load(tiny_bundle, kv_capacity=512, resident=True)):
        live = model.live(OFTEN, PLAIN)
        push_all(live, frames(9))
        answers.append(ids(live))
    assert answers[0] == answers[1]


def test_score_is_the_first_token_of_the_answer(llm: VideoLLM) -> None:
    live = llm.live(OFTEN, PLAIN)
    push_all(live, frames(9))
    got = live.score("What?")
    prefix, suffix = llm.text.encode("What?", "video")
    suffix = np.append(llm.bundle.manifest.newline_id, suffix)
    tokens = torch.from_numpy(llm.encode(frames(9)))
    kept = tokens.flatten(0, 1)[reference.merge(tokens, 0.5, "paper")].numpy()
    llm._decoder.prefill(Prompt(prefix, suffix, kept, np.arange(len(kept), dtype=np.int32), len(kept)), 1)
    chances = np.exp(llm._decoder.logits[0].astype(np.float64))
    yes, no = (sum(chances[_first_id(llm, word)] for word in words) for words in (("yes", "YES"), ("no", "NO")))
    assert dict(got) == pytest.approx({"yes": yes / (yes + no), "no": no / (yes + no)}, rel=1e-4)
    assert got.mass == pytest.approx((yes + no) / chances.sum(), rel=1e-4) and 0 < got.mass < 0.9
    assert live.kv.num_text == len(prefix)


def _first_id(llm: VideoLLM, word: str) -> int:
    return int(llm.text._tokenizer.encode(word, add_special_tokens=False).ids[0])


@pytest.mark.parametrize("answers", [("yes",), ("yes", "Yes"), ("yes", " "), ()])
def test_answers_that_begin_alike_are_refused(llm: VideoLLM, answers: tuple[str, ...]) -> None:
    live = llm.live(OFTEN, PLAIN)
    live.push(frames(1)[0])
    with pytest.raises(UsageError, match="first token"):
        live.score("What?", answers)


@pytest.mark.parametrize("memory", [16, 6, 3])
@pytest.mark.parametrize("ratio", [0.5, 0.9, 1.0])
def test_tokens_weigh_what_they_do_in_the_whole_clip(llm: VideoLLM, ratio: float, memory: int) -> None:
    """Of what merge dropped so far; where an older frame went, what it stood for went too."""
    live = llm.live(Compression(merge_ratio=ratio, weigh=True), replace(PLAIN, memory_frames=memory))
    for number, frame in enumerate(tokens := llm.encode(frames(16))):
        live.push_tokens(frame)
        seen, window = tokens[: number + 1], min(4, memory)
        parts = [seen[at : at + window] for at in range(0, number + 1, window)]
        whole = [stands_for(merge_indices(part, ratio), len(part), N) for part in parts]
        assert live.kv.counts.tolist() == [np.concatenate(whole)[-live.kv.num_visual :].tolist()] * 2
        if number % 4 == 2:
            ids(live)
    live.clear()
    live.push_tokens(tokens[0])
    assert live.kv.counts.tolist() == [[1] * N] * 2 and (live.kv.bias(live.kv.shallow) == 0).all()


# for ever


class Streaming(reference.Decoder):
    """The torch decoder with keys as they were before RoPE: each is turned afresh to where its row stands now."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.raw = list(self.keys)
        self.at = torch.empty(0, dtype=torch.long)
        self.unrotated = torch.empty(0)

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        self.unrotated = x  # of the key, which comes after the query
        return super().rotate(x, positions)

    def layer(self, index: int, x: Tensor, positions: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
        self.keys[index] = super().rotate(self.raw[index], self.at)
        out = super().layer(index, x, positions, visible)
        self.raw[index] = torch.cat((self.raw[index], self.unrotated))
        return out

    def feed(self, x: Tensor, start: int) -> Tensor:
        """Tokens [T, E] from position `start` on; returns the last one's logits."""
        positions = start + torch.arange(len(x))
        visible = torch.ones(len(x), len(self.at) + len(x), dtype=torch.bool).tril(len(self.at))
        for index in range(len(self.raw)):
            x, _ = self.layer(index, x, positions, visible)
        self.at = torch.cat((self.at, positions))
        return self.logits(x)

    def drop(self, rows: slice) -> None:
        """Forget rows."""
        stay = torch.ones(len(self.at), dtype=torch.bool)
        stay[rows] = False
        self.at = self.at[stay]
        self.raw, self.values = ([rows[stay] for rows in both] for both in (self.raw, self.values))


class Replay:
    """What a live video does, in plain words: whole-frame lists, keys computed afresh, `limit` positions."""

    def __init__(
        self, model: Any, llm: VideoLLM, spec: LiveSpec, ratio: float, limit: int, weigh: bool = False
    ) -> None:
        self.decoder, self.spec, self.ratio, self.weigh = Streaming(model), spec, ratio, weigh
        self.embed = model.model.language_model.embed_tokens.weight
        self.newline = reference.newline(model)
        self.text, self.prefix = llm.text, llm.text.encode("?", "video")[0]
        self.limit = limit - spec.max_question_tokens - spec.max_answer_tokens
        self.position, self.rebases = len(self.prefix), 0
        self.sizes = list[int]()
        self.window = list[Tensor]()
        self.counted = list[
            list[list[int]]
        ]()  # of the window's frames, for every place the count of what stands for it
        self.counts = list[list[int]]()  # of all rows in memory
        self.decoder.feed(self.embed[self.prefix], 0)

    def push(self, tokens: Tensor) -> None:
        self.window = [*self.window, tokens] if len(self.window) < 4 else [tokens]
        flat = reference.merge(torch.stack(self.window), self.ratio, "paper")
        places = flat[flat >= N * (len(self.window) - 1)] % N
        kept = tokens[places]
        self.count(places.tolist())
        start = len(self.prefix)
        if len(self.sizes) == self.spec.memory_frames:
            gone = self.sizes.pop(0)
            self.decoder.drop(slice(start, start + gone))
            del self.counts[:gone]
        if self.position + len(kept) > self.limit:
            offset = int(self.decoder.at[start]) - start
            self.decoder.at[start:] -= offset
            self.position -= offset
            self.rebases += 1
        if self.weigh:
            weights = torch.tensor([count for (count,) in self.counts])
            self.decoder.bias = torch.cat((torch.zeros(start), weights.log()))
        self.decoder.feed(kept, self.position)
        self.position += len(kept)
        self.sizes.append(len(kept))

    def count(self, kept: list[int]) -> None:
        """Each place of the newest frame, at its own token if it was kept, else where it is for the frame before."""
        number = len(self.window) - 1
        self.counted = self.counted[:number]
        before = self.counted[(0, 0, 0, 2)[number]] if number else []
        self.counted.append([[0] if place in kept else before[place] for place in range(N)])
        self.counts += [self.counted[-1][place] for place in kept]
        for one in self.counted[-1]:
            one[0] += 1

    def ask(self, prompt: str, count: int) -> tuple[Array, list[int], list[float]]:
        """The first token's logits, greedy ids and by how much each led."""
        trace, rows = reference.Trace(num_visual=0), len(self.decoder.at)
        suffix = torch.cat((self.newline[None], self.embed[self.text.encode(prompt, "video")[1]]))
        logits, position = self.decoder.feed(suffix, self.position), self.position + len(suffix)
        first: Array = logits.numpy()
        for _ in range(count - 1):
            logits = self.decoder.feed(self.embed[[reference.pick(logits, trace)]], position)
            position += 1
        reference.pick(logits, trace)
        self.decoder.drop(slice(rows, None))
        return first, trace.ids, trace.margins


@pytest.fixture
def limited(tiny_bundle: Path, tmp_path: Path) -> Callable[[int], VideoLLM]:
    """The tiny model with a given limit of positions."""

    def load(positions: int) -> VideoLLM:
        path = tmp_path / f"limit-{positions}"
        shutil.copytree(tiny_bundle, path, copy_function=lambda a, b: Path(b).symlink_to(a))
        manifest = json.loads((tiny_bundle / "dycoke_edge.json").read_text())
        manifest["model"]["max_positions"] = positions
        (path / "dycoke_edge.json").unlink()
        (path / "dycoke_edge.json").write_text(sealed(manifest))
        return VideoLLM.load(path, kv_capacity=512, prefill_chunk=32)

    return load


@pytest.mark.parametrize(("ratio", "weigh"), [(0.0, False), (0.7, False), (0.7, True)])
@torch.no_grad()
def test_far_past_the_models_positions_it_is_as_if_computed_afresh(
    limited: Callable[[int], VideoLLM], model: Any, ratio: float, weigh: bool
) -> None:
    limit, spec = 280, replace(PLAIN, memory_frames=8)
    llm = limited(limit)
    live = llm.live(Compression(merge_ratio=ratio, prune_ratio=0.0, weigh=weigh), spec)
    replay = Replay(model, llm, spec, ratio, limit, weigh)
    tokens, checked = llm.encode(frames(16)), 0
    for number in range(200):
        frame = tokens[number * 7 % 16]
        live.push_tokens(frame)
        replay.push(torch.from_numpy(frame))
        assert live._decoder.position == replay.position
        assert replay.position + spec.max_question_tokens + spec.max_answer_tokens <= limit
        if number % 20 == 19:
            logits, want, margins = replay.ask("What?", 12)
            assert np.abs(_logits(live) - logits).max() < 1e-4 * np.abs(logits).max()
            clear = next((at for at, margin in enumerate(margins) if margin < 1e-3), len(want))
            assert ids(live)[:clear] == want[:clear]
            checked += clear
    assert live.stats.rebases == replay.rebases >= 5
    assert live.stats.tokens_kept > 4 * limit and checked > 60


@pytest.mark.parametrize("positions", ["reassign", "keep"])
def test_half_precision_runs_past_the_limit_too(half_bundle: Path, positions: Any) -> None:
    """Against the same stream whose limit is never reached; the prefix is left out, to which re-basing moves frames."""
    streams = []
    for limit in (400, 32768):
        llm = VideoLLM.load(half_bundle, kv_capacity=512)
        llm.bundle.manifest.model = llm.bundle.model.model_copy(update={"max_positions": limit})
        encode = llm.text.encode
        llm.text.encode = lambda p, v, e=encode: (e(p, v)[0][:0], e(p, v)[1])  # type: ignore
        live = llm.live(Compression(merge_ratio=0.5, positions=positions), replace(PLAIN, memory_frames=12))
        streams.append(live)
    tokens = VideoLLM.load(half_bundle).encode(frames(16))
    worst = 0.0
    for number in range(160):
        for live in streams:
            live.push_tokens(tokens[number * 5 % 16])
        if number % 8 == 7:
            short, long = (_logits(live) for live in streams)
            worst = max(worst, float(np.abs(short - long).max() / np.abs(long).max()))
    assert streams[0].stats.rebases > 5 > streams[1].stats.rebases == 0
    assert worst < 1e-3  # a twentieth of what fp16 may differ from fp32 without any re-basing, see test_parity


def _logits(live: LiveVideo) -> Array:
    live._decoder.read(live._question("What?"))
    logits: Array = live._decoder.logits[0].copy()
    return logits


# bounded memory


def test_the_oldest_frames_go_and_nothing_grows(llm: VideoLLM) -> None:
    live = llm.live(OFTEN, replace(PLAIN, memory_frames=6))
    sizes = set[tuple[int, int]]()
    for number in range(60):
        pushed = live.push(frames(16)[number % 16], float(number))
        assert pushed.evicted_frames == (number >= 6)
        assert live.num_frames == min(number + 1, 6)
        assert live.span == (max(0.0, number - 5.0), float(number))
        assert live.kv.num_visual <= count_merged(6, N, 0.5)
        if number % 4 == 3 and number > 6:
            sizes.add((live.kv.num_visual, live.nbytes))
    assert len(sizes) == 1
    stats = live.stats
    assert (stats.frames, stats.encoded, stats.evicted_frames) == (60, 60, 54)
    assert stats.tokens_in == 60 * N and stats.tokens_kept == count_merged(60, N, 0.5)
    assert stats.tokens_kept - stats.evicted_tokens == live.kv.num_visual


@pytest.mark.parametrize("memory", [1, 2, 3, 5])
def test_small_memories_keep_the_frame_that_others_are_compared_with(llm: VideoLLM, memory: int) -> None:
    live = llm.live(OFTEN, replace(PLAIN, memory_frames=memory))
    window = min(4, memory)
    for number in range(12):
        pushed = live.push(frames(16)[number])
        assert pushed.tokens_kept == (N if number % window == 0 else N // 2)
    assert live.num_frames == memory and len(ids(live)) == 24


@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_every_ratio_streams(llm: VideoLLM, ratio: float) -> None:
    live = llm.live(Compression(merge_ratio=ratio), replace(PLAIN, memory_frames=6))
    for number in range(20):
        kept = live.push(frames(16)[number % 16]).tokens_kept
        assert kept == (0 if ratio and number % 4 else N)
    assert live.num_frames == 6 and len(ids(live)) == 24


def test_scene_cuts_take_rows_from_the_oldest_frames(llm: VideoLLM) -> None:
    spec = replace(PLAIN, memory_frames=16, scene_cut=1.0)  # every frame is a cut
    live = VideoLLM(llm.bundle, llm.engine, replace(llm.spec, kv_capacity=254)).live(OFTEN, spec)
    for frame in frames(16):
        assert live.push(frame).tokens_kept == N
    assert 6 <= live.num_frames < 16
    assert live.kv.num_visual == live.num_frames * N <= live.kv.origin
    assert len(ids(live)) == 24


def test_frames_older_than_a_window_of_seconds_are_forgotten(llm: VideoLLM) -> None:
    live = llm.live(OFTEN, replace(PLAIN, gate_threshold=4.0))
    push_all(live, frames(9)[:6])  # a window of four, and two of the next
    assert live.forget_before(0.0) == 0
    assert live.forget_before(3.0) == 3 and live.span == (3.0, 5.0)
    assert live.push(frames(9)[6]).tokens_kept == N // 2  # its window's first frame, at 4 s, is there
    assert live.forget_before(5.0) == 2 and live.num_frames == 2
    assert live.push(frames(9)[7], 7.0).tokens_kept == N  # now it is not
    assert live.push(frames(9)[7], 20.0).gated
    assert live.forget_before(19.0) == 1  # frame 6 has no time and frames after one do not overtake it
    assert live.stats.evicted_frames == 6 and live.num_frames == 2


def test_a_still_scene_is_remembered_as_long_as_it_is_seen(llm: VideoLLM) -> None:
    live = llm.live(OFTEN, replace(PLAIN, gate_threshold=4.0))
    for second in range(100):
        live.push(frames(1)[0], float(second))
        assert live.forget_before(second - 8.0) == 0
    assert live.span == (0.0, 99.0) and live.num_frames == 1
    assert live.forget_before(100.0) == 1 and live.kv.num_visual == 0
    assert not live.push(frames(1)[0], 101.0).gated


def test_clear_gives_everything_back(llm: VideoLLM) -> None:
    live = llm.live(OFTEN, PLAIN)
    push_all(live, frames(16)[7:])
    ids(live)
    live.clear()
    assert (live.num_frames, live.span, live.nbytes) == (0, (None, None), 0)
    push_all(live, frames(9))
    assert ids(live) == llm.generate("What?", video=frames(9), compression=OFTEN, sampling=SHORT).token_ids


def test_a_question_computes_its_own_tokens_only(llm: VideoLLM) -> None:
    """What makes the time to the first token independent of how much was seen."""
    live, counts = llm.live(OFTEN, replace(PLAIN, memory_frames=8)), list[list[tuple[str, int]]]()
    for number in range(80):
        live.push(frames(16)[number % 16])
        if number in (7, 15, 79):
            recorder = Recorder(llm)
            ids(live)
            counts.append([(graph, len(given["cos"])) for graph, given, _ in recorder.calls])
            llm.engine.run = recorder._run  # type: ignore[method-assign]
    assert counts[0] == counts[1] == counts[2]
    question = 1 + len(llm.text.encode("What?", "video")[1])
    assert sum(count for graph, count in counts[0] if graph == "decoder_deep") == question + 23


# answers that do not come to their end


@pytest.mark.parametrize("pieces", [0, 1, 5])
def test_an_answer_closed_half_way_leaves_nothing(llm: VideoLLM, pieces: int) -> None:
    live = llm.live(OFTEN, PLAIN)
    push_all(live, frames(9)[:5])
    answer = live.ask("Something else?", SHORT)
    for _ in range(pieces):
        next(answer)
    answer.close()
    assert live.kv.num_text == len(live._prefix) and live.kv.num_active == live.kv.num_visual
    push_all(live, frames(9)[5:])
    assert ids(live) == llm.generate("What?", video=frames(9), compression=OFTEN, sampling=SHORT).token_ids


@pytest.mark.parametrize("what", ["push", "ask", "score", "clear"])
def test_an_answer_that_is_overtaken_says_so(llm: VideoLLM, what: str) -> None:
    live = llm.live(OFTEN, PLAIN)
    push_all(live, frames(9)[:8])
    answer = live.ask("Something else?", SHORT)
    next(answer)
    if what == "push":
        live.push(frames(9)[8])
    elif what == "ask":
        ids(live)
    elif what == "score":
        live.score("What?")
    else:
        live.clear()
    with pytest.raises(UsageError, match="newer request or frame"):
        next(answer)
    if what == "push":
        assert ids(live) == llm.generate("What?", video=frames(9), compression=OFTEN, sampling=SHORT).token_ids


def test_an_engine_that_fails_in_a_frame_does_not_leave_half_of_it(llm: VideoLLM) -> None:
    live, run = llm.live(OFTEN, PLAIN), llm.engine.run
    push_all(live, frames(9)[:3])

    def fail(graph: str, inputs: Mapping[str, AnyArray], outputs: Mapping[str, AnyArray]) -> None:
        if graph == "decoder_deep":
            raise EngineError("out of memory")
        run(graph, inputs, outputs)

    llm.engine.run = fail  # type: ignore[method-assign]
    with pytest.raises(EngineError):
        live.push(frames(9)[3])
    llm.engine.run = run  # type: ignore[method-assign]
    assert live.num_frames == live.kv.num_visual == 0
    push_all(live, frames(9))
    assert ids(live) == llm.generate("What?", video=frames(9), compression=OFTEN, sampling=SHORT).token_ids


# several


def test_cameras_and_requests_on_one_model_do_not_disturb_each_other(llm: VideoLLM) -> None:
    videos = [frames(16)[:9], frames(16)[5:14], frames(9)[::-1]]
    settings = [OFTEN, COMPRESSIONS["off"], COMPRESSIONS["positions keep"]]
    alone = [
        llm.generate("What?", video=v, compression=c, sampling=SHORT).token_ids
        for v, c in zip(videos, settings, strict=True)
    ]
    lives = [llm.live(c, PLAIN) for c in settings]
    for number in range(9):
        for live, video in zip(lives, videos, strict=True):
            live.push(video[number])
        if number % 4 == 1:
            llm.generate("And this?", video=frames(4), sampling=SHORT)
    answers = [live.ask("What?", SHORT) for live in lives]
    turns = [[next(answer).token for answer in answers] for _ in range(24)]  # a token each in turn
    assert [list(column) for column in zip(*turns, strict=True)] == alone


def test_graphs_stay_loaded_while_there_is_a_live_video(llm: VideoLLM) -> None:
    sessions: dict[str, Any] = llm.engine._sessions  # type: ignore[attr-defined]
    live = llm.live(OFTEN, PLAIN)
    before = dict(sessions)
    assert set(before) == {"vision", "decoder_shallow", "decoder_deep"}
    live.push(frames(1)[0])
    llm.generate("What?", video=frames(4), sampling=SHORT)
    live.push(frames(1)[0])
    ids(live)
    assert {name: sessions[name] for name in before} == before
    del live
    llm.generate("What?", video=frames(4), sampling=SHORT)
    assert "vision" not in sessions


# windows and cuts


def test_a_window_starts_early_at_a_scene_cut(llm: VideoLLM) -> None:
    """Two scenes, told apart by a threshold between what is measured inside a scene and across."""
    video = np.concatenate([frames(2), 255 - frames(4)])
    spec = replace(PLAIN, scene_cut=None)
    live = llm.live(OFTEN, spec)
    measured = [live.push(frame).similarity for frame in video]
    assert measured[0] is None and measured[1] is not None and measured[2] is not None
    assert measured[2] < measured[1] and live.stats.cuts == 0
    live = llm.live(OFTEN, replace(spec, scene_cut=(measured[1] + measured[2]) / 2))
    pushed = [live.push(frame) for frame in video]
    assert [p.scene_cut for p in pushed] == [False, False, True, False, False, False]
    assert [p.tokens_kept for p in pushed] == [N, N // 2, N, N // 2, N // 2, N // 2]
    assert pushed[2].similarity == measured[2] and live.stats.cuts == 1
    assert live.stats.similarity == pushed[-1].similarity
    known = [p.similarity for p in pushed if p.similarity is not None]
    assert live.stats.similarity_mean == pytest.approx(np.mean(known))


def test_similarity_is_the_mean_cosine_with_the_anchor(llm: VideoLLM) -> None:
    tokens = torch.from_numpy(llm.encode(frames(4)))
    live = llm.live(OFTEN, PLAIN)
    for number in range(4):
        pushed = live.push_tokens(tokens[number].numpy())
        if number:
            want = torch.nn.functional.cosine_similarity(tokens[ANCHOR[number]], tokens[number], dim=-1).mean()
            assert pushed.similarity == pytest.approx(float(want), abs=1e-5)


def test_after_a_cut_a_frame_is_compared_with_nothing(llm: VideoLLM) -> None:
    live = llm.live(OFTEN, replace(PLAIN, gate_threshold=4.0))
    frame = frames(1)[0]
    assert not live.push(frame).gated and live.push(frame).gated
    live.cut()
    pushed = live.push(frame)
    assert (pushed.gated, pushed.tokens_kept, pushed.similarity) == (False, N, None)
    assert live.num_frames == 2  # what came before the cut is still in memory


def test_the_gate_spares_the_encoder_and_counts_it(llm: VideoLLM) -> None:
    still, recorder = frames(1)[0], Recorder(llm)
    live = llm.live(OFTEN, replace(PLAIN, gate_threshold=4.0))
    pushed = [live.push(still, float(number)) for number in range(20)]
    moved = still.copy()
    moved[40:52, 40:52] = 255 - moved[40:52, 40:52]
    pushed.append(live.push(moved, 20.0))
    assert [p.gated for p in pushed] == [False] + [True] * 19 + [False]
    assert [p.tokens_in for p in pushed] == [N] * 21
    assert sum(name == "vision" for name, _, _ in recorder.calls) == 2
    stats = live.stats
    assert (stats.frames, stats.encoded, stats.gated, live.num_frames) == (21, 2, 19, 2)
    assert (stats.tokens_in, stats.tokens_gated, stats.tokens_kept) == (21 * N, 19 * N, N + N // 2)
    assert live.span == (0.0, 20.0)
    assert stats.seconds["gate"] > 0 and stats.as_dict()["seconds_saved"] == stats.seconds_saved > 0


def test_without_the_gate_every_frame_is_encoded(llm: VideoLLM) -> None:
    for off in (None, 0.0):
        live = llm.live(OFTEN, replace(PLAIN, gate_threshold=off))
        for _ in range(3):
            assert not live.push(frames(1)[0]).gated
        assert live.stats.seconds["gate"] == 0


# what cannot be


@pytest.mark.parametrize(
    ("compression", "word"),
    [(Compression(mode="official"), "--mode paper"), (Compression(free_parked=True), "for good")],
)
def test_settings_that_cannot_stream_are_refused(llm: VideoLLM, compression: Compression, word: str) -> None:
    with pytest.raises(UsageError, match=word):
        llm.live(compression, PLAIN)


def test_a_ratio_that_the_bundle_lacks_is_refused(llm: VideoLLM) -> None:
    with pytest.raises(UsageError, match="--merge-ratio"):
        llm.live(Compression(merge_ratio=0.42), PLAIN)


def test_the_capacity_asked_for_is_enough(tiny_bundle: Path) -> None:
    with pytest.raises(UsageError, match=r"--kv-capacity \d+") as caught:
        VideoLLM.load(tiny_bundle, kv_capacity=64).live(OFTEN, PLAIN)
    text = str(caught.value)
    assert "\n" not in text and "--memory-frames" in text
    needed = int(text.split("--kv-capacity ")[1].split()[0])
    with pytest.raises(UsageError):
        VideoLLM.load(tiny_bundle, kv_capacity=needed - 1).live(OFTEN, PLAIN)
    live = VideoLLM.load(tiny_bundle, kv_capacity=needed).live(OFTEN, PLAIN)
    push_all(live, np.concatenate([frames(16)] * 2))
    assert live.num_frames == 16 and len(ids(live)) == 24


def test_the_kv_buffer_is_no_larger_than_frames_can_fill(llm: VideoLLM) -> None:
    live = llm.live(OFTEN, replace(PLAIN, memory_frames=4))
    assert live.kv.capacity == 4 * N + len(live._prefix) + 64 + 24 < llm.spec.kv_capacity


def test_a_memory_longer_than_the_models_positions_is_refused(limited: Callable[[int], VideoLLM]) -> None:
    with pytest.raises(UsageError, match=r"need \d+ positions, the model has 200") as caught:
        limited(200).live(OFTEN, PLAIN)
    needed = int(str(caught.value).split("need ")[1].split()[0])
    live = limited(needed).live(OFTEN, PLAIN)
    for number in range(64):
        live.push(frames(16)[number % 16])
    assert live.stats.rebases and len(ids(live)) == 24


def test_no_question_before_the_first_frame(llm: VideoLLM) -> None:
    live = llm.live(OFTEN, PLAIN)
    for question in (lambda: ids(live), lambda: live.score("What?")):
        with pytest.raises(UsageError, match="no frame"):
            question()


def test_a_question_or_answer_without_room_is_refused(llm: VideoLLM) -> None:
    live = llm.live(OFTEN, PLAIN)
    push_all(live, frames(9))
    with pytest.raises(UsageError, match=r"--max-question-tokens (\d+)") as caught:
        ids(live, "word " * 40)
    needed = int(str(caught.value).rsplit(" ", 1)[1])
    larger = llm.live(OFTEN, replace(PLAIN, max_question_tokens=needed))
    larger.push(frames(1)[0])
    assert len(ids(larger, "word " * 40)) == 24
    with pytest.raises(UsageError, match="--max-answer-tokens 25"):
        ids(live, sampling=Sampling(max_new_tokens=25))
    assert ids(live) == llm.generate("What?", video=frames(9), compression=OFTEN, sampling=SHORT).token_ids


def test_a_conversation_about_a_live_video_is_that_about_the_clip(llm: VideoLLM) -> None:
    live = llm.live(OFTEN, replace(PLAIN, max_question_tokens=96))
    for frame in frames(9):
        live.push(frame)
    first, answer = Message("user", "What?"), Message("assistant", "A square.")
    for said in ([first, answer, Message("user", "And then?")], [replace(first, visual=True), answer, first]):
        got = [piece.token for piece in live.ask(said, SHORT)]
        assert got == llm.generate(said, video=frames(9), compression=OFTEN, sampling=SHORT).token_ids
    assert live.score([first, answer, Message("user", "Sure?")]) != live.score("Sure?")
    assert ids(live) == llm.generate("What?", video=frames(9), compression=OFTEN, sampling=SHORT).token_ids


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ([Message("system", "Be brief."), Message("user", "What?")], "messages[0] of the system comes before the live"),
        (
            [Message("user", "Hi"), Message("assistant", "Hello"), Message("user", "What?", visual=True)],
            "messages[0] of the user comes before the live video",
        ),
        ([Message("user", "Hi"), Message("user", "<video>?")], "messages: text before the live video"),
        ([Message("user", "What?"), Message("assistant", "x" * 300), Message("user", "?")], "--max-question-tokens 3"),
    ],
)
def test_what_a_conversation_about_a_live_video_must_not_be(llm: VideoLLM, said: list[Message], why: str) -> None:
    live = llm.live(OFTEN, PLAIN)
    live.push(frames(1)[0])
    rows = live.kv.live_nbytes
    with pytest.raises(UsageError) as error:
        list(live.ask(said, SHORT))
    assert why in str(error.value) and live.kv.live_nbytes == rows


@pytest.mark.parametrize("prompt", ["What <video>?", "Is <image> there?", "Is it? " * 100, " "])
def test_what_a_live_video_cannot_be_asked_is_known_without_one(llm: VideoLLM, prompt: str) -> None:
    with pytest.raises(UsageError):
        llm.check_live(prompt)
    with pytest.raises(UsageError):
        llm.watch("test://?seconds=1", prompt)  # at once, not when the first window is there
    live = llm.live(OFTEN, PLAIN)
    push_all(live, frames(2))
    with pytest.raises(UsageError):
        live.score(prompt)


def test_what_a_live_video_can_be_asked_is_not_refused(llm: VideoLLM) -> None:
    live = llm.live(OFTEN, replace(PLAIN, max_question_tokens=40))
    push_all(live, frames(2))
    for length in range(1, 60):
        prompt = "a" * length
        try:
            llm.check_live(prompt, ("yes", "no"), live.spec)
        except UsageError:
            assert length > 10
            with pytest.raises(UsageError, match="tokens with the chat template"):
                live.score(prompt)
        else:
            assert live.score(prompt).mass > 0
    with pytest.raises(UsageError, match="first token"):
        llm.check_live("What?", ("yes", "Yes"))


def test_a_question_that_fails_leaves_the_frames_as_they_were(llm: VideoLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    live = llm.live(OFTEN, PLAIN)
    push_all(live, frames(5))
    want, rows = live.score("What?"), live.kv.num_text
    prefill = llm.layers.prefill

    def half(*arguments: Any) -> None:
        prefill(*arguments)
        raise EngineError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(llm.layers, "prefill", half)
        with pytest.raises(EngineError):
            live.score("And this?")
    assert live.kv.num_text == rows and live.score("What?") == want


def test_a_question_that_places_the_video_is_refused(llm: VideoLLM) -> None:
    live = llm.live(OFTEN, PLAIN)
    live.push(frames(1)[0])
    with pytest.raises(UsageError, match="leave <video> or <image> out"):
        ids(live, "Look here: <video> and there.")


@pytest.mark.parametrize("frame", [np.zeros((100, 100), np.uint8), np.zeros((0, 9, 3), np.uint8), np.zeros((9, 9, 3))])
def test_a_frame_of_another_form_is_refused(llm: VideoLLM, frame: Array) -> None:
    with pytest.raises(UsageError, match=r"uint8 \[H, W, 3\]"):
        llm.live(OFTEN, PLAIN).push(frame)


def test_tokens_of_another_form_are_refused(llm: VideoLLM) -> None:
    live, tokens = llm.live(OFTEN, PLAIN), llm.encode(frames(2))
    with pytest.raises(UsageError, match="one frame"):
        live.push_tokens(tokens)
    live.push_tokens(tokens[0])
    tokens[0] = 0  # the caller's own from here on
    live.push_tokens(tokens[1])
    want = llm.generate("What?", video=frames(2), compression=OFTEN, sampling=SHORT).token_ids
    assert ids(live) == want


# any order of calls


@pytest.mark.parametrize("seed", range(6))
def test_any_order_of_calls_keeps_the_books(limited: Callable[[int], VideoLLM], seed: int) -> None:
    random, llm = np.random.default_rng(seed), limited(330)
    spec = replace(PLAIN, memory_frames=int(random.integers(1, 9)), gate_threshold=4.0, scene_cut=0.9)
    ratio, weigh = float(random.choice([0.0, 0.5, 0.9])), bool(seed % 2)
    live = llm.live(Compression(merge_ratio=ratio, refresh_threshold=0.95, weigh=weigh), spec)
    open_answers = []
    for _ in range(120):
        what = random.choice(
            ["push", "push", "push", "ask", "leave", "score", "cut", "clear"], p=[0.2] * 4 + [0.05] * 4
        )
        if what == "push":
            live.push(frames(16)[random.integers(16)], float(random.normal()))
        elif what == "cut":
            live.cut()
        elif what == "clear":
            live.clear()
        elif live.num_frames and what == "leave":
            open_answers.append(live.ask("What?", SHORT))
            next(open_answers[-1])
        elif live.num_frames and what == "ask":
            assert len(ids(live)) == 24
        elif live.num_frames:
            assert sum(live.score("What?").values()) == pytest.approx(1)
        kv, decoder = live.kv, live._decoder
        assert live.num_frames <= spec.memory_frames
        assert kv.num_visual == sum(frame.rows for frame in live._frames)
        assert decoder.position <= llm.bundle.model.max_positions
        assert live.stats.frames == live.stats.gated + live.stats.encoded
        assert len(live._window) <= live.num_frames or not live._window
        assert kv.num_visual <= kv.counts[0].sum() <= live.num_frames * N and (
            not live.num_frames or kv.counts.min() > 0
        )
