"""A short run through every graph of a bundle, to see that it works on this machine."""

from __future__ import annotations

from os import PathLike

import numpy as np

from dycoke_edge.config import Compression, Sampling
from dycoke_edge.runtime.pipeline import Reply, VideoLLM

FRAMES, TOKENS = 4, 4


def smoke_run(bundle: str | PathLike[str]) -> Reply:
    """Answer a question about a made-up clip with every merge ratio of the bundle; returns the last reply."""
    llm = VideoLLM.load(bundle, kv_capacity=FRAMES * 1024)
    random = np.random.default_rng(0)
    video = random.integers(0, 256, (FRAMES, 64, 64, 3), dtype=np.uint8)
    sampling = Sampling(max_new_tokens=TOKENS, stop_token_ids=())
    for ratio in (0.0, *llm.bundle.manifest.merge_ratios):
        reply = llm.generate("?", video, compression=Compression(merge_ratio=ratio), sampling=sampling)
        assert reply.stats.new_tokens == TOKENS
    return reply
