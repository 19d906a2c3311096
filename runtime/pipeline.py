"""VideoLLM: a bundle that answers questions about videos, images and text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from dycoke_edge.bundle import Bundle, open_bundle
from dycoke_edge.config import Clip, Compression, EngineSpec, Provider, Sampling
from dycoke_edge.dycoke import count_merged
from dycoke_edge.errors import KVOverflow, UsageError
from dycoke_edge.runtime import visual
from dycoke_edge.runtime.engine import Engine, open_engine
from dycoke_edge.runtime.kv import KVBuffer
from dycoke_edge.runtime.loop import Decoder, Prompt, Step
from dycoke_edge.runtime.stats import Stats
from dycoke_edge.runtime.text import Text
from dycoke_edge.runtime.video import Frames, read_image, read_video, resize

Source = str | PathLike[str] | NDArray[np.uint8]
Progress = Callable[[str, int, int], None]  # stage, done, total
FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Reply:
    """A whole answer. `token_ids` leave the stop token out; `finish_reason` is "stop" if there was one."""

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    stats: Stats

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "text": self.text,
            "token_ids": self.token_ids,
            "finish_reason": self.finish_reason,
            "stats": self.stats.as_dict(),
        }


@dataclass(frozen=True)
class Piece:
    """A part of an answer: the text that `token` completes (empty inside a character), and the running stats."""

    text: str
    token: int
    stats: Stats


class VideoLLM:
    """One loaded model. Answers one request at a time; nothing of a request outlives it."""

    def __init__(self, bundle: Bundle, engine: Engine, spec: EngineSpec) -> None:
        self.bundle = bundle
        self.engine = engine
        self.spec = spec
        self.text = Text(bundle)
        self.kv = KVBuffer(bundle.model, spec.kv_capacity)
        self._decoder = Decoder(bundle.model, engine, bundle.embed_tokens(), self.kv, spec.prefill_chunk)

    @classmethod
    def load(cls, bundle: str | PathLike[str], provider: Provider = "cpu", **options: Any) -> VideoLLM:
        """Open a bundle folder. `options` are the fields of EngineSpec, e.g. kv_capacity=4096."""
        try:
            spec = EngineSpec(provider=provider, **options)
        except TypeError as error:
            raise UsageError(f"VideoLLM.load: {error}; options are the fields of EngineSpec") from None
        opened = open_bundle(Path(bundle))
        return cls(opened, open_engine(opened, spec), spec)

    def generate(
        self,
        prompt: str,
        video: Source | None = None,
        image: Source | None = None,
        compression: Compression = Compression(),  # noqa: B008 - frozen
        sampling: Sampling = Sampling(),  # noqa: B008
        clip: Clip = Clip(),  # noqa: B008
    ) -> Reply:
        """Answer a prompt. `video` is a path or uint8 [F, H, W, 3], `image` a path or uint8 [H, W, 3]."""
        return self.reply(self.stream(prompt, video, image, compression, sampling, clip), sampling)

    def reply(self, pieces: Iterable[Piece], sampling: Sampling) -> Reply:
        """Join the pieces of a stream."""
        tokens, stats = list[int](), Stats()
        for piece in pieces:
            tokens.append(piece.token)
            stats = piece.stats
        finish: FinishReason = "length" if len(tokens) == sampling.max_new_tokens else "stop"
        return Reply(self.text.decode(tokens), tokens, finish, stats)

    def stream(
        self,
        prompt: str,
        video: Source | None = None,
        image: Source | None = None,
        compression: Compression = Compression(),  # noqa: B008
        sampling: Sampling = Sampling(),  # noqa: B008
        clip: Clip = Clip(),  # noqa: B008
        on_progress: Progress = lambda stage, done, total: None,
    ) -> Iterator[Piece]:
        """Answer a prompt piece by piece. Nothing is read or computed before the first piece is asked for."""
        stats = Stats(kv_bytes_reserved=self.kv.nbytes)
        kind = _kind(video, image)
        prefix, suffix = self.text.encode(prompt, kind)
        began = perf_counter()
        frames = self._frames(video, image, clip)
        stats.video_latency = perf_counter() - began
        sampling = self._stops(sampling)
        self._check_fits(len(prefix) + len(suffix), frames, compression, sampling)
        began = perf_counter()
        assembled = self._assemble(prefix, suffix, frames, compression, stats, on_progress)
        yield from self._answer(assembled, compression, sampling, stats, began)

    def _answer(
        self, prompt: Prompt, compression: Compression, sampling: Sampling, stats: Stats, began: float
    ) -> Iterator[Piece]:
        text, active, last = self.text.stream(), list[int](), began
        before = perf_counter()
        for step in self._decoder.decode(prompt, compression, sampling):
            now = perf_counter()
            if stats.new_tokens == 0:
                stats.prefill_latency, stats.time_to_first_token = now - before, now - began
            else:
                stats.inter_token_latencies.append(now - last)
                active.append(step.active)
            self._count(stats, step, active)
            yield Piece(text.push(step.token), step.token, stats)
            last = perf_counter()

    def _count(self, stats: Stats, step: Step, active: list[int]) -> None:
        stats.new_tokens += 1
        stats.refreshes += step.refreshed
        stats.keep_applied |= step.active < stats.visual_tokens_kept
        stats.kv_compaction_latency += step.compaction
        stats.mean_active_rows = float(np.mean(active)) if active else float(step.active)
        stats.kv_bytes = self.kv.live_nbytes

    def _frames(self, video: Source | None, image: Source | None, clip: Clip) -> Frames | None:
        size = self.bundle.model.image_size
        if isinstance(video, np.ndarray):
            return Frames(resize(_as_frames(video, "video", 4), size), np.arange(len(video), dtype=np.float64))
        if isinstance(image, np.ndarray):
            return Frames(resize(_as_frames(image, "image", 3)[None], size), np.zeros(1))
        if video is not None:
            return read_video(video, clip, size)
        return None if image is None else read_image(image, size)

    def _stops(self, sampling: Sampling) -> Sampling:
        if sampling.stop_token_ids is None:
            return replace(sampling, stop_token_ids=self.bundle.manifest.stop_token_ids)
        return sampling

    def _check_fits(self, num_text: int, frames: Frames | None, compression: Compression, sampling: Sampling) -> None:
        """Refuse before the expensive part what cannot fit the KV buffer or the model's positions."""
        model = self.bundle.model
        num_frames = 0 if frames is None else len(frames.pixels)
        if num_frames and compression.merge_ratio:
            self.bundle.merge_graph(compression.merge_ratio)
        visual_rows = count_merged(num_frames, model.tokens_per_frame, compression.merge_ratio)
        text_rows = num_text + bool(num_frames) + sampling.max_new_tokens
        if visual_rows + text_rows > self.spec.kv_capacity:
            raise KVOverflow(visual_rows + text_rows, self.spec.kv_capacity)
        span = num_frames * model.tokens_per_frame if compression.positions == "keep" else visual_rows
        if span + text_rows > model.max_positions:
            raise UsageError(
                f"num_frames={num_frames} (--num-frames) needs {span + text_rows} positions, the model has "
                f"{model.max_positions}; use fewer frames or --positions reassign"
            )

    def _assemble(
        self,
        prefix: NDArray[np.int64],
        suffix: NDArray[np.int64],
        frames: Frames | None,
        compression: Compression,
        stats: Stats,
        on_progress: Progress,
    ) -> Prompt:
        """Encode and merge the frames and put the prompt together; the newline after a video is text."""
        stats.text_tokens = len(prefix) + len(suffix)
        stats.why_not = _why_not(frames, compression)
        if frames is None:
            return Prompt(prefix, suffix)
        began = perf_counter()
        tokens = visual.encode(
            self.bundle,
            self.engine,
            frames.pixels,
            self.spec.vision_batch,
            lambda done, total: on_progress("vision", done, total),
        )
        if not self.spec.keep_vision:
            self.engine.unload("vision")
        encoded = perf_counter()
        kept, index = visual.merge(self.bundle, self.engine, tokens, compression)
        stats.vision_latency, stats.merge_latency = encoded - began, perf_counter() - encoded
        stats.frames, stats.visual_tokens_in = len(tokens), tokens.shape[0] * tokens.shape[1]
        stats.visual_tokens_kept, stats.text_tokens = len(kept), stats.text_tokens + 1
        stats.merge_applied = len(kept) < stats.visual_tokens_in
        suffix = np.concatenate([[self.bundle.manifest.newline_id], suffix]).astype(np.int64)
        if compression.positions == "keep":
            return Prompt(prefix, suffix, kept, index, stats.visual_tokens_in)
        return Prompt(prefix, suffix, kept, np.arange(len(kept), dtype=np.int32), len(kept))


def _kind(video: Source | None, image: Source | None) -> str | None:
    if video is not None and image is not None:
        raise UsageError("--video and --image were both given; give one of them")
    return "video" if video is not None else "image" if image is not None else None


def _as_frames(array: NDArray[Any], name: str, dims: int) -> NDArray[np.uint8]:
    want = "[F, H, W, 3]" if dims == 4 else "[H, W, 3]"
    if array.dtype != np.uint8 or array.ndim != dims or array.shape[-1] != 3 or 0 in array.shape:
        raise UsageError(f"{name} has {array.dtype} {list(array.shape)}; give uint8 {want} with at least one pixel")
    return array


def _why_not(frames: Frames | None, compression: Compression) -> list[str]:
    """Where compression does not apply to this request, in words."""
    if frames is None:
        return ["no video: text only"]
    reasons = []
    if compression.merge_ratio == 0:
        reasons.append("merge is off: merge_ratio is 0")
    elif len(frames.pixels) == 1:
        reasons.append("nothing to merge: one frame")
    if compression.prune_ratio == 0:
        reasons.append("keep is off: prune_ratio is 0")
    return reasons
