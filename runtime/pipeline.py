"""VideoLLM: a bundle that answers questions about videos, images and text."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import replace
from os import PathLike
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import numpy as np
from numpy.typing import NDArray

from dycoke_edge.bundle import Bundle, open_bundle
from dycoke_edge.config import Clip, Compression, EngineSpec, LiveSpec, Provider, Sampling, split
from dycoke_edge.config_camera import Camera
from dycoke_edge.dycoke import count_kept
from dycoke_edge.errors import KVOverflow, UsageError
from dycoke_edge.runtime import visual
from dycoke_edge.runtime.conversation import Asked
from dycoke_edge.runtime.decoding import open_layers
from dycoke_edge.runtime.engine import AnyArray, Engine, open_engine
from dycoke_edge.runtime.exclusive import Buffer, Exclusive
from dycoke_edge.runtime.explain import Seen
from dycoke_edge.runtime.given import Frames, Picture, as_clip, as_picture, scaled
from dycoke_edge.runtime.live import LiveVideo
from dycoke_edge.runtime.live_question import LiveQuestions
from dycoke_edge.runtime.loop import Decoder, Prompt
from dycoke_edge.runtime.marks import Marks
from dycoke_edge.runtime.reply import Piece, Reply, of_one_bundle, pieces
from dycoke_edge.runtime.stats import Stats, untiled, why_not
from dycoke_edge.runtime.text import Text
from dycoke_edge.runtime.video import open_visual, read_image

if TYPE_CHECKING:
    from dycoke_edge.runtime.camera.answers import WatchResult

Source = str | PathLike[str] | Picture | Frames
Progress = Callable[[str, int, int], None]  # stage, done, total
__all__ = ["LiveVideo", "Piece", "Reply", "Source", "VideoLLM"]


class VideoLLM:
    """One loaded model. Answers one request at a time; nothing of a request outlives it.

    `live` begins a video that is still arriving, or one that many questions are asked about.

    Any thread may call it: one computes at a time. An answer that is read piece by piece makes other threads wait until
    its last, and in its own thread ends with a UsageError when another is begun. Who waits for one that lies half read
    gets a BusyError after ten seconds. A process that was forked after `load` gets an EngineError.
    """

    def __init__(self, bundle: Bundle, engine: Engine, spec: EngineSpec) -> None:
        self.bundle = bundle
        self.engine = engine
        self.spec = spec
        self.text = Text(bundle)
        self.layers = open_layers(bundle, engine, spec)
        self.kv = self.layers.new_kv(spec.kv_capacity)
        self.exclusive = Exclusive()
        self.buffer = Buffer(self.exclusive)
        self._decoder = Decoder(self.layers, self.kv, self.exclusive)
        self._lives: WeakSet[LiveVideo] = WeakSet()
        bundle.check_same()  # nor while all this was loaded

    @classmethod
    def load(cls, bundle: str | PathLike[str], provider: Provider = "cpu", **options: Any) -> VideoLLM:
        """Open a bundle folder. `options` are the fields of EngineSpec, e.g. kv_capacity=4096."""
        spec = EngineSpec(**({"provider": provider} | split("VideoLLM.load", options, EngineSpec)[0]))
        opened = open_bundle(Path(bundle))
        return cls(opened, open_engine(opened, spec), spec)

    def generate(
        self,
        prompt: Asked,
        video: Source | None = None,
        image: Source | None = None,
        compression: Compression = Compression(),  # noqa: B008 - frozen
        sampling: Sampling = Sampling(),  # noqa: B008
        clip: Clip = Clip(),  # noqa: B008
        **options: Any,
    ) -> Reply:
        """Answer a prompt, or the last of several messages: `Message`s, or dicts of "role" and "content".

        `video` is a path, uint8 [F, H, W, 3], or a list of frames; `image` a path, and like a frame uint8 [H, W, 3] or
        a PIL image. One of them in the whole conversation, with the message marked `visual` or the user's first. An
        image is seen as one frame, not cut into tiles as the model's own processor does: small things in it are lost.
        `options` are fields of Compression, Sampling and Clip, and go before theirs: merge_ratio=0.5, fps=2.
        """
        return self.reply(self.stream(prompt, video, image, compression, sampling, clip, **options))

    def reply(self, pieces: Iterable[Piece]) -> Reply:
        """Join the pieces of a stream."""
        come = list(pieces)
        tokens = [piece.token for piece in come]
        finish = come[-1].finish_reason
        assert finish is not None, "the last piece says why it is the last"
        return Reply(self.text.decode(tokens), tokens, finish, come[-1].stats)

    def stream(
        self,
        prompt: Asked,
        video: Source | None = None,
        image: Source | None = None,
        compression: Compression = Compression(),  # noqa: B008
        sampling: Sampling = Sampling(),  # noqa: B008
        clip: Clip = Clip(),  # noqa: B008
        on_progress: Progress = lambda stage, done, total: None,
        on_seen: Callable[[Seen], None] | None = None,
        **options: Any,
    ) -> Iterator[Piece]:
        """Answer a prompt piece by piece, as `generate` does whole. Nothing is read or computed before the first piece
        is asked for. `on_seen` hears once of the frames and of which of their tokens entered the decoder: when the
        first token is there, before its piece, so that nothing waits for it."""
        of_compression, of_sampling, of_clip = split("VideoLLM.generate", options, Compression, Sampling, Clip)
        compression = compression.but(**of_compression)
        sampling = replace(sampling, **of_sampling)
        clip = replace(clip, **of_clip)
        answer = self._stream(prompt, video, image, compression, sampling, clip, on_progress, on_seen)
        return self.buffer.reading(of_one_bundle(self.bundle, answer))

    def _stream(
        self,
        prompt: Asked,
        video: Source | None,
        image: Source | None,
        compression: Compression,
        sampling: Sampling,
        clip: Clip,
        on_progress: Progress,
        on_seen: Callable[[Seen], None] | None,
    ) -> Generator[Piece, None, None]:
        stats = Stats()
        compression = compression if image is None else compression.of_picture()
        prefix, suffix = self.text.encode(prompt, _kind(video, image))
        sampling, num_text = self._stops(sampling), len(prefix) + len(suffix)

        def reading(done: int, total: int) -> None:
            if done == 0:  # before a frame is decoded and memory taken for it
                self._check_fits(num_text, total, compression, sampling)
            else:
                on_progress("reading", done, total)

        began = perf_counter()
        frames = self._frames(video, image, clip, reading)
        stats.video_latency = perf_counter() - began
        stats.text_tokens, stats.frames = num_text, len(frames)
        stats.why_not = why_not(len(frames), compression)
        if image is not None:
            stats.why_not.append(untiled(self.bundle.model.tokens_per_frame))
        began = perf_counter()
        if not len(frames):
            yield from self._answer(Prompt(prefix, suffix), compression, sampling, stats, began)
            return
        marks = Marks(self.engine)
        marks.mark()
        tokens = self._encode(frames, on_progress)
        marks.mark()
        assembled, kept = self.assemble(prefix, suffix, tokens, compression, stats)
        marks.mark()

        def on_first() -> None:
            stats.vision_latency, stats.merge_latency = marks.seconds()
            if on_seen is not None:
                on_seen(Seen(frames, np.asarray(kept)))

        yield from self._answer(assembled, compression, sampling, stats, began, on_first)

    def live(
        self,
        compression: Compression = Compression(),  # noqa: B008
        spec: LiveSpec = LiveSpec(),  # noqa: B008
        **options: Any,
    ) -> LiveVideo:
        """A video that is pushed frame by frame and asked at any time. UsageError if memory cannot hold it. `options`
        are fields of Compression and LiveSpec, and go before theirs: memory_frames=16.

        As long as there is one, vision and decoder both stay in memory.
        """
        of_compression, of_spec = split("VideoLLM.live", options, Compression, LiveSpec)
        with self.exclusive:
            live = LiveVideo(self, compression.but(**of_compression), replace(spec, **of_spec))
            self.bundle.check_same()
            self._lives.add(live)
        return live

    def check_live(
        self,
        prompt: Asked,
        answers: tuple[str, ...] = (),
        spec: LiveSpec = LiveSpec(),  # noqa: B008
    ) -> None:
        """UsageError for a prompt that a live video could not be asked, or not be scored by `answers`. Needs no video,
        computes nothing, may be called from any thread."""
        LiveQuestions(self.bundle, self.text, spec).check(prompt, answers)

    def watch(
        self,
        uri: str,
        prompt: str | None = None,
        compression: Compression = Compression(),  # noqa: B008
        **options: Any,
    ) -> Iterator[WatchResult]:
        """A result a window of a camera or file, for ever or until the file ends: `for result in llm.watch(uri, "What
        happens?"): ...`. `options` are fields of Camera (window_s, every_s, fps, rules and so on) and of Compression.

        SourceError when the stream cannot be opened; once it was, it is opened anew for ever.
        """
        from dycoke_edge.runtime.camera.watch import watch  # it imports this module

        of_camera, of_compression = split("VideoLLM.watch", options, Camera, Compression)
        camera = Camera(**({"id": "camera"} | of_camera | {"uri": uri, "prompt": prompt}))
        return watch(self, camera, compression.but(**of_compression))

    def encode(self, video: Source, clip: Clip = Clip()) -> NDArray[Any]:  # noqa: B008
        """Visual tokens [F, N, E] of a video, before merge: what `LiveVideo.push_tokens` takes."""
        frames = self._frames(video, None, clip, lambda done, total: None)
        with self.exclusive:
            self.bundle.check_same()
            tokens = np.asarray(self._encode(frames, lambda stage, done, total: None))
            self.bundle.check_same()
            return tokens

    def _frames(
        self, video: Source | None, image: Source | None, clip: Clip, reading: Callable[[int, int], None]
    ) -> NDArray[np.uint8]:
        """uint8 [F, R, R, 3], F = 0 for text only; `reading` hears of (0, F) before anything is decoded."""
        size = self.bundle.model.image_size
        if isinstance(video, (str, PathLike)):
            return open_visual(video, clip, size, reading).pixels
        if video is not None:
            frames = as_clip(video)
            reading(0, len(frames))
            return scaled(frames, size, clip.max_pixels)
        reading(0, int(image is not None))
        if image is None:
            return np.empty((0, size, size, 3), np.uint8)
        if isinstance(image, (str, PathLike)):
            return read_image(image, size, clip.max_pixels).pixels
        return scaled([as_picture(image)], size)

    def _check_fits(self, num_text: int, num_frames: int, compression: Compression, sampling: Sampling) -> None:
        """Refuse before the expensive part what cannot fit the KV buffer or the model's positions."""
        model = self.bundle.model
        if num_frames and compression.merge_ratio:
            self.bundle.merge_graph(compression.merge_ratio)
        visual_rows = num_frames and count_kept(num_frames, model.tokens_per_frame, compression)
        text_rows = num_text + bool(num_frames) + sampling.max_new_tokens
        span = num_frames * model.tokens_per_frame if compression.positions == "keep" else visual_rows
        if span + text_rows > model.max_positions:
            less = ", or --positions reassign" if span > visual_rows else ""
            raise UsageError(
                f"{num_frames} frames, {num_text} tokens of --prompt and --max-new-tokens "
                f"{sampling.max_new_tokens} need {span + text_rows} positions, the model has "
                f"{model.max_positions}; use fewer of them{less}"
            )
        if visual_rows + text_rows > self.spec.kv_capacity:
            raise KVOverflow(visual_rows + text_rows, self.spec.kv_capacity)

    def _encode(self, frames: NDArray[np.uint8], on_progress: Progress) -> AnyArray:
        """Visual tokens [F, N, E]. Unless they stay or the video is live, vision and decoder are never in memory
        together. A GPU may not be done when this returns."""
        in_turn = not (self.spec.stays or self._lives)
        if in_turn:
            self.layers.unload()
        tokens = visual.encode(
            self.bundle,
            self.engine,
            frames,
            self.spec.frames_at_a_time,
            lambda done, total: on_progress("vision", done, total),
        )
        if in_turn:
            self.engine.unload("vision")
        return tokens

    def assemble(
        self,
        prefix: NDArray[np.int64],
        suffix: NDArray[np.int64],
        tokens: AnyArray,
        compression: Compression,
        stats: Stats,
    ) -> tuple[Prompt, AnyArray]:
        """Merge the frames and put the prompt together; the newline after a video is text. Also the places of the
        tokens kept, int32 [M]. A GPU may not be done when this returns."""
        merged = visual.merge(self.bundle, self.engine, tokens, compression)
        kept, index, counts = merged.tokens, merged.index, merged.counts
        stats.visual_tokens_in, stats.visual_tokens_kept = tokens.shape[0] * tokens.shape[1], len(kept)
        stats.text_tokens += 1
        stats.merge_applied = len(kept) < stats.visual_tokens_in
        suffix = np.concatenate([[self.bundle.manifest.newline_id], suffix]).astype(np.int64)
        if compression.positions == "keep":
            return Prompt(prefix, suffix, kept, index, stats.visual_tokens_in, counts), index
        return Prompt(prefix, suffix, kept, np.arange(len(kept), dtype=np.int32), len(kept), counts), index

    def _answer(
        self,
        prompt: Prompt,
        compression: Compression,
        sampling: Sampling,
        stats: Stats,
        began: float,
        on_first: Callable[[], None] = lambda: None,
    ) -> Iterator[Piece]:
        steps = self._decoder.decode(prompt, compression, sampling)
        yield from pieces(steps, self.text.stream(), self.kv, stats, began, on_first)
        if stats.new_tokens == 1 and prompt.num_visual and compression.prune_ratio:
            stats.why_not.append("keep works on decode steps, and the answer was one token")

    def _stops(self, sampling: Sampling) -> Sampling:
        if sampling.stop_token_ids is None:
            return replace(sampling, stop_token_ids=self.bundle.manifest.stop_token_ids)
        return sampling


def _kind(video: Source | None, image: Source | None) -> str | None:
    if video is not None and image is not None:
        raise UsageError("--video and --image were both given; give one of them")
    return "video" if video is not None else "image" if image is not None else None
