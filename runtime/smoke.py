"""A short run through every graph of a bundle, to see that it works on this machine."""

from __future__ import annotations

from os import PathLike
from typing import Any

import numpy as np

from dycoke_edge import contract
from dycoke_edge.config import Compression, Provider, Sampling
from dycoke_edge.errors import EngineError
from dycoke_edge.parity import Parity, worst_of
from dycoke_edge.runtime.pipeline import Reply, VideoLLM
from dycoke_edge.runtime.trt.parity import measure

FRAMES, TOKENS = 4, 4


def smoke_run(bundle: str | PathLike[str], provider: Provider = "cpu", **options: Any) -> tuple[Reply, list[Parity]]:
    """Answer a question about a made-up clip with every merge ratio of the bundle and by coverage; returns the last
    reply, and how far vision and merge are from the CPU's on another provider. EngineError if that is more than the
    export allows. `options` are fields of EngineSpec."""
    llm = VideoLLM.load(bundle, provider, kv_capacity=FRAMES * 1024, **options)
    results = [] if provider == "cpu" else _against_cpu(llm)
    random = np.random.default_rng(0)
    video = random.integers(0, 256, (FRAMES, 64, 64, 3), dtype=np.uint8)
    sampling = Sampling(max_new_tokens=TOKENS, stop_token_ids=())
    ratios = (0.0, *llm.bundle.manifest.merge_ratios)
    for compression in (*(Compression(merge_ratio=ratio) for ratio in ratios), Compression()):
        reply = llm.generate("?", video, compression=compression, sampling=sampling)
        assert reply.stats.new_tokens == TOKENS
    return reply, results


def _against_cpu(llm: VideoLLM) -> list[Parity]:
    """The export checks fp16 graphs in fp32, for a CPU has no other arithmetic; this checks what the GPU does."""
    bundle, results = llm.bundle, list[Parity]()
    for graph in contract.graphs(bundle.model, bundle.manifest.merge_ratios):
        if not graph.name.startswith("decoder"):
            results += measure(bundle, graph, bundle.graph_path(graph.name), llm.engine, FRAMES)
    worst = worst_of(results)
    if worst is not None:
        raise EngineError(
            f"{worst.graph}: {worst.output} on {llm.engine.provider} differs from the CPU by {worst.relative:.2g} "
            f"relative, more than {worst.tolerance:g}; use --provider cpu, and please report this GPU"
        )
    return results
