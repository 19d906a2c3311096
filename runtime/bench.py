"""How fast a bundle is on this machine, stage by stage, without and with compression in turn. Prints nothing.

Every stage is the runtime's own code on any engine: what is measured is what an application gets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dycoke_edge.bundle import open_bundle
from dycoke_edge.config import BENCH_MODES, BenchSpec, Clip, Compression, EngineSpec, Sampling
from dycoke_edge.dycoke import count_merged
from dycoke_edge.errors import UsageError
from dycoke_edge.runtime import visual
from dycoke_edge.runtime.bench_result import Result, active, facts
from dycoke_edge.runtime.board import reset_peak, status_bytes
from dycoke_edge.runtime.engine import AnyArray, OnDevice, device_of, open_engine
from dycoke_edge.runtime.loop import Decoder, Prompt
from dycoke_edge.runtime.pipeline import VideoLLM
from dycoke_edge.runtime.power import PowerMeter, total
from dycoke_edge.runtime.stats import Stats, why_not
from dycoke_edge.runtime.synthetic import moving_patch
from dycoke_edge.runtime.traffic import CountedEngine
from dycoke_edge.runtime.video import open_visual


@dataclass(frozen=True)
class Case:
    """One thing that is run a round, and the stages that it measures."""

    modes: tuple[str, ...]
    compression: str | None
    run: Callable[[dict[str, Result]], None]

    def results(self) -> dict[str, Result]:
        """A fresh result for every stage."""
        return {mode: Result(mode, self.compression) for mode in self.modes}


class Bench:
    """A loaded bundle, the frames and the question. UsageError, InputError or BundleError before any work."""

    def __init__(
        self,
        bundle: Path,
        spec: BenchSpec,
        compression: Compression,
        engine: EngineSpec,
        video: Path | None = None,
        meter: PowerMeter | None = None,
    ) -> None:
        opened = open_bundle(bundle)
        self.spec, self._meter, self.video = spec, meter, video
        inner = open_engine(opened, engine)
        self._device = inner if isinstance(inner, OnDevice) else None
        self._engine = CountedEngine(inner, opened)
        self.llm = VideoLLM(opened, self._engine, engine)
        self._settings = {"off": Compression.off(), "on": compression}
        if not compression.merges and compression.prune_ratio == 0:
            del self._settings["on"]
        opened.merge_graph(compression.merge_ratio)
        self._sampling = Sampling(max_new_tokens=spec.new_tokens, stop_token_ids=())
        self.question, self.prompt_tokens = question(self.llm, spec.prompt_tokens)
        self._frames = self._read()
        self._tokens: AnyArray | None = None
        # what peak_host_memory_bytes is; where the peak cannot be reset, it is that of all that ran before, too
        self.host_metric = "vm_hwm_of_stage" if reset_peak() else "vm_hwm_of_process"

    @property
    def on_host(self) -> bool:
        """The engine computes in the memory that a read on the CPU measures."""
        return self._device is None

    @property
    def bandwidth(self) -> float | None:
        """Bytes a second that the GPU's memory can be read at, as its driver has it; None where it does not say."""
        device = device_of(self.llm.engine)
        return device.bandwidth if device else None

    def run(self, on_progress: Callable[[str, float], None] = lambda what, share: None) -> list[Result]:
        """Measure; `on_progress` hears what runs next and the share that is done."""
        groups, rounds, done = self._cases(), self.spec.warmup + self.spec.rounds, 0
        results: list[Result] = []
        count = rounds * sum(map(len, groups))
        for cases in groups:
            kept = [case.results() for case in cases]
            for number in range(rounds):
                # the order turns with every round, so that no setting always runs on what the other left
                for case, found in list(zip(cases, kept, strict=True))[:: -1 if number % 2 else 1]:
                    name = " ".join(filter(None, ("+".join(case.modes), case.compression)))
                    on_progress(name + (" (warm-up)" if number < self.spec.warmup else ""), done / count)
                    case.run(case.results() if number < self.spec.warmup else found)
                    done += 1
            results += [result for found in kept for result in found.values()]
        return sorted(results, key=lambda result: BENCH_MODES.index(result.mode))

    def _cases(self) -> list[list[Case]]:
        """Cases in groups: those of a group alternate."""
        wanted, groups = self.spec.stages, list[list[Case]]()
        if "vision" in wanted:
            groups.append([Case(("vision",), None, self._vision)])
        if "merge" in wanted and "on" in self._settings:
            groups.append([Case(("merge",), "on", self._merge)])
        language = tuple(mode for mode in ("prefill", "decode") if mode in wanted)
        for modes, run in ((language, self._language), (("e2e",) if "e2e" in wanted else (), self._whole)):
            if modes:
                groups.append([Case(modes, name, self._under(run, name)) for name in self._settings])
        return groups

    def _under(
        self, run: Callable[[dict[str, Result], Compression], None], name: str
    ) -> Callable[[dict[str, Result]], None]:
        return lambda results: run(results, self._settings[name])

    def _vision(self, results: dict[str, Result]) -> None:
        self._make_room()
        self._engine.load("vision")
        with self._measured(results["vision"]) as seconds:
            self._tokens = self._encode()
        frames, result = len(self._frames), results["vision"]
        result.add(vision_latency=seconds[0], frames_per_second=frames / seconds[0])
        result.facts = {"frames": frames, "visual_tokens_in": frames * self.llm.bundle.model.tokens_per_frame}

    def _merge(self, results: dict[str, Result]) -> None:
        tokens, result = self._encoded(), results["merge"]
        with self._measured(result) as seconds:
            kept = visual.merge(self.llm.bundle, self._engine, tokens, self._settings["on"]).tokens
        result.add(merge_latency=seconds[0])
        result.facts = {
            "frames": len(tokens),
            "visual_tokens_in": tokens.shape[0] * tokens.shape[1],
            "visual_tokens_kept": len(kept),
        }

    def _language(self, results: dict[str, Result], compression: Compression) -> None:
        """Prefill, and decode if that is wanted, of frames encoded before."""
        prompt, stats = self._prompt(compression)
        if not self.llm.spec.stays:
            self._engine.unload("vision")
        self.llm.layers.load()
        steps = Decoder(self.llm.layers, self.llm.kv).decode(prompt, compression, self._sampling)
        rows = prompt.num_visual + prompt.num_text
        prefill = results.get("prefill", Result("prefill", None))
        with self._measured(prefill) as seconds:
            stats.count(next(steps))
        prefill.add(prefill_latency=seconds[0], prefill_throughput=rows / seconds[0])
        prefill.facts = facts(stats, rows)
        if "decode" in results:
            self._decode(results["decode"], steps, stats, rows)

    def _decode(self, result: Result, steps: Iterator[Any], stats: Stats, rows: int) -> None:
        times = list[float]()
        with self._measured(result):
            times.append(perf_counter())
            for step in steps:
                times.append(perf_counter())
                stats.count(step)
        for before, after in pairwise(times):
            result.add(inter_token_latency=after - before)
        count = len(times) - 1
        result.bytes_moved /= count
        result.add(output_token_throughput=count / (times[-1] - times[0]))
        result.add(kv_compaction_latency=stats.kv_compaction_latency)
        result.facts = facts(stats, rows) | active(stats)

    def _whole(self, results: dict[str, Result], compression: Compression) -> None:
        """A request as an application makes it: from the video, read and resized, to the last token."""
        result, first, stats = results["e2e"], 0.0, Stats()
        video, clip = self.video or self._frames, Clip(num_frames=self.spec.num_frames)
        pieces = self.llm.stream(self.question, video, None, compression, self._sampling, clip)
        with self._measured(result) as seconds:
            began = perf_counter()
            for piece in pieces:
                first, stats = first or perf_counter() - began, piece.stats
        result.add(
            request_latency=seconds[0],
            time_to_first_token=first,
            output_token_throughput=stats.new_tokens / seconds[0],
            frames_per_second=stats.frames / seconds[0],
            video_latency=stats.video_latency,
            vision_latency=stats.vision_latency,
            merge_latency=stats.merge_latency,
            prefill_latency=stats.prefill_latency,
            kv_compaction_latency=stats.kv_compaction_latency,
        )
        for latency in stats.inter_token_latencies:
            result.add(inter_token_latency=latency)
        if result.watts and result.watts[-1]:
            result.add(joules_per_request=total(result.watts[-1])[0] * seconds[0])
        result.facts = facts(stats, stats.visual_tokens_kept + stats.text_tokens) | active(stats)

    @contextmanager
    def _measured(self, result: Result) -> Iterator[list[float]]:
        """Time, memory, bytes and power of what runs inside; the list holds the seconds afterwards."""
        self._engine.synchronize()  # what was asked for before may still be running
        seconds = list[float]()
        reset_peak()
        if self._device:
            self._device.take_peak_bytes()
        self._take_bytes()
        began = perf_counter()
        yield seconds
        self._engine.synchronize()
        seconds.append(perf_counter() - began)
        result.bytes_moved = self._take_bytes()
        result.host_bytes = max(result.host_bytes, status_bytes("VmHWM"))
        if self._device:
            result.device_bytes = max(result.device_bytes or 0, self._device.take_peak_bytes())
        if self._meter:
            result.watts.append(self._meter.mean(began))

    def _take_bytes(self) -> int:
        return self._engine.take() + self.llm.layers.take_bytes()

    def _make_room(self) -> None:
        """As the runtime does: unless they stay, vision and decoder are never in memory together."""
        if not self.llm.spec.stays:
            self.llm.layers.unload()

    def _encode(self) -> AnyArray:
        llm = self.llm
        return visual.encode(llm.bundle, self._engine, self._frames, llm.spec.frames_at_a_time)

    def _encoded(self) -> AnyArray:
        """Visual tokens [F, N, E] of the frames, encoded once."""
        if self._tokens is None:
            self._make_room()
            self._tokens = self._encode()
        return self._tokens

    def _prompt(self, compression: Compression) -> tuple[Prompt, Stats]:
        tokens, (prefix, suffix) = self._encoded(), self.llm.text.encode(self.question, "video")
        stats = Stats(
            frames=len(tokens), text_tokens=len(prefix) + len(suffix), why_not=why_not(len(tokens), compression)
        )
        prompt, _ = self.llm.assemble(prefix, suffix, tokens, compression, stats)
        return prompt, stats

    def _read(self) -> NDArray[np.uint8]:
        """The frames uint8 [F, R, R, 3], after checking that so many fit."""
        size = self.llm.bundle.model.image_size
        if self.video is None:
            self._check_fits(self.spec.num_frames)
            return moving_patch(self.spec.num_frames, size)

        def reading(done: int, frames: int) -> None:
            if done == 0:
                self._check_fits(frames)

        return open_visual(self.video, Clip(num_frames=self.spec.num_frames), size, reading).pixels

    def _check_fits(self, frames: int) -> None:
        """Without compression the most is needed."""
        if not {"prefill", "decode", "e2e"} & set(self.spec.stages):
            return
        model, capacity = self.llm.bundle.model, self.llm.spec.kv_capacity
        text = _count(self.llm, self.question) + 1 + self.spec.new_tokens
        rows = count_merged(frames, model.tokens_per_frame, 0.0) + text
        if rows > min(model.max_positions, capacity):
            fit = max(0, (min(model.max_positions, capacity) - text) // model.tokens_per_frame)
            remedy = f"--num-frames {fit}" if fit else "fewer --new-tokens or --prompt-tokens"
            if rows <= model.max_positions:
                remedy = f"--kv-capacity {rows} or {remedy}"
            raise UsageError(
                f"num_frames={frames} (--num-frames) without compression, --prompt-tokens {self.spec.prompt_tokens} "
                f"and --new-tokens {self.spec.new_tokens} need {rows} rows; the KV buffer has {capacity} and the model "
                f"{model.max_positions} positions; use {remedy}"
            )


def question(llm: VideoLLM, tokens: int) -> tuple[str, int]:
    """A text of so many tokens, or of as few less as the tokenizer allows, and how many it has."""
    text = "a"  # one token to every tokenizer that has bytes
    around = _count(llm, text) - 1
    for more in (" a", "?"):
        have = _count(llm, text)
        text += more * ((tokens + around - have) // max(1, _count(llm, text + more) - have))
    return text, _count(llm, text) - around


def _count(llm: VideoLLM, text: str) -> int:
    return sum(map(len, llm.text.encode(text, "video")))
