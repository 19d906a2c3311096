"""This project, as a program uses it: `VideoLLM` on the provider and decoder that are asked for."""

from __future__ import annotations

from typing import Any

from benchmarks.rivals.contestant import PROMPT, Answer, Job, Side, engine_of, stopwatch
from dycoke_edge import Sampling, VideoLLM
from dycoke_edge.bundle import open_bundle
from dycoke_edge.dycoke import count_kept
from dycoke_edge.runtime import visual
from dycoke_edge.runtime.synthetic import moving_patch

TEXT_ROWS = 128  # room for the question and its chat template
BUCKET = 128


class Make:
    """One loaded bundle. The KV buffer is as long as the case needs, for every side's cache is."""

    def __init__(self, job: Job, side: Side) -> None:
        assert side.compression is not None
        self.job, self.compression = job, side.compression
        model = open_bundle_model(job.bundle)
        rows = count_kept(job.frames, model.tokens_per_frame, self.compression)
        capacity = -(-(rows + TEXT_ROWS + job.new_tokens) // BUCKET) * BUCKET
        options: dict[str, Any] = engine_of(job.name, job.device)
        self.llm = VideoLLM.load(job.bundle, kv_capacity=capacity, **options)
        self.video = moving_patch(job.frames, model.image_size)

    def vision(self) -> None:
        """Encode the frames, as an answer does; `VideoLLM.encode` would bring the tokens to the host."""
        visual.encode(self.llm.bundle, self.llm.engine, self.video, self.llm.spec.frames_at_a_time)
        self.wait()

    def answer(self, new_tokens: int) -> Answer:
        """`stream`: an id counts when the caller has its piece."""
        answer, clock = Answer(), stopwatch()
        sampling = Sampling(max_new_tokens=new_tokens, stop_token_ids=())
        stats = None
        for piece in self.llm.stream(PROMPT, self.video, compression=self.compression, sampling=sampling):
            answer.ids.append(piece.token)
            answer.times.append(clock())
            stats = piece.stats
        assert stats is not None
        answer.rows, answer.visual = stats.text_tokens + stats.visual_tokens_kept, stats.visual_tokens_kept
        answer.active, answer.refreshes = stats.mean_active_rows, stats.refreshes
        return answer

    def wait(self) -> None:
        """Until the device has done what it was given."""
        device = getattr(self.llm.engine, "device", None)
        if device is not None:
            device.synchronize()


def open_bundle_model(bundle: str) -> Any:
    """The dimensions a bundle's manifest gives."""
    from pathlib import Path

    return open_bundle(Path(bundle)).model
