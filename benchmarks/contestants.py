"""The sides of a CPU benchmark, each in a process of its own so that its peak memory is its own.

A worker loads its model, prints a JSON line, and answers each line it reads with one run's figures: seconds for vision,
prefill, time to first token and each further token, and peak resident bytes so far.
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from benchmarks.environment import status_bytes
from dycoke_edge.runtime.synthetic import moving_patch

PROMPT = "Describe what happens in this video."
Run = Callable[[], dict[str, Any]]


@dataclass(frozen=True)
class Job:
    """One side: what runs and with which settings."""

    name: str
    model: Path  # a Hugging Face directory for transformers, a bundle for ours
    frames: int
    new_tokens: int
    threads: int
    merge_ratio: float | None = None  # None: transformers
    prune_ratio: float = 0.0
    resident: bool = False


class Worker:
    """A running side, seen from the driver."""

    def __init__(self, job: Job) -> None:
        self.job = job
        arguments = json.dumps({**job.__dict__, "model": str(job.model)})
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.contestants", arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._read()

    def run(self) -> dict[str, Any]:
        """One answer; returns its figures."""
        assert self._process.stdin
        self._process.stdin.write("run\n")
        self._process.stdin.flush()
        return self._read()

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.job.name} ended with {self._process.wait()}")
        data: dict[str, Any] = json.loads(line)
        return data


def ours(job: Job) -> Run:
    """This project, on ONNX Runtime."""
    from dycoke_edge import Compression, Sampling, VideoLLM

    llm = VideoLLM.load(job.model, threads=job.threads, resident=job.resident)
    compression = Compression(merge_ratio=job.merge_ratio or 0.0, prune_ratio=job.prune_ratio)
    sampling = Sampling(max_new_tokens=job.new_tokens, stop_token_ids=())
    size = llm.bundle.model.image_size
    video = moving_patch(job.frames, size)

    def run() -> dict[str, Any]:
        reply = llm.generate(PROMPT, video, compression=compression, sampling=sampling)
        stats = reply.stats
        return {
            "vision": stats.vision_latency,
            "prefill": stats.prefill_latency,
            "first_token": stats.time_to_first_token,
            "inter_token": stats.inter_token_latencies,
            "visual_tokens": stats.visual_tokens_kept,
            "active": stats.mean_active_rows,
            "refreshes": stats.refreshes,
        }

    return run


def theirs(job: Job) -> Run:
    """transformers: SDPA, its own generate."""
    import torch
    from transformers import AutoTokenizer, LlavaOnevisionForConditionalGeneration
    from transformers.generation.streamers import BaseStreamer

    torch.set_num_threads(job.threads)
    model: Any = LlavaOnevisionForConditionalGeneration.from_pretrained(
        job.model, dtype=torch.float32, attn_implementation="sdpa"
    )
    tokenizer: Any = AutoTokenizer.from_pretrained(job.model)
    size = model.config.vision_config.image_size
    pixels = (torch.from_numpy(moving_patch(job.frames, size)).permute(0, 3, 1, 2) / 255 - 0.5) / 0.5
    content = [{"type": "video"}, {"type": "text", "text": PROMPT}]
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    patches = size // model.config.vision_config.patch_size
    count = job.frames * (-(-patches // 2)) ** 2
    ids = tokenizer(chat.replace("<video>", "<video>" * (count + 1)), return_tensors="pt").input_ids
    seconds: dict[str, float] = {}
    encode = model.model.get_video_features

    @functools.wraps(encode)  # generate reads its signature
    def timed(*args: Any, **kwargs: Any) -> Any:
        began = perf_counter()
        result = encode(*args, **kwargs)
        seconds["vision"] = perf_counter() - began
        return result

    model.model.get_video_features = timed

    class Clock(BaseStreamer):
        def __init__(self) -> None:
            self.times: list[float] = []

        def put(self, value: Any) -> None:
            self.times.append(perf_counter())

        def end(self) -> None: ...

    def run() -> dict[str, Any]:
        clock, began = Clock(), perf_counter()
        with torch.no_grad():
            model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                pixel_values_videos=pixels[None],
                max_new_tokens=job.new_tokens,
                min_new_tokens=job.new_tokens,
                do_sample=False,
                streamer=clock,
            )
        first = clock.times[1] - began  # the streamer is handed the prompt first
        return {
            "vision": seconds["vision"],
            "prefill": first - seconds["vision"],
            "first_token": first,
            "inter_token": np.diff(clock.times[1:]).tolist(),
            "visual_tokens": count,
            "active": count,
            "refreshes": 0,
        }

    return run


def main() -> None:
    data = json.loads(sys.argv[1])
    job = Job(**{**data, "model": Path(data["model"])})
    run = theirs(job) if job.merge_ratio is None else ours(job)
    print("{}", flush=True)
    for _ in sys.stdin:
        print(json.dumps({**run(), "peak_bytes": status_bytes("VmHWM")}), flush=True)


if __name__ == "__main__":
    main()
