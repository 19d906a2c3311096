"""transformers with a static cache and a compiled step: CUDA graphs, the id never leaving the device.

This is faster than `generate(cache_implementation="static")`, whose own work on the host it leaves out, and the
strongest form of it: the host never waits for a token, and a token counts from when the device had it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import StaticCache

from benchmarks.rivals.contestant import Answer, Job, Side, stopwatch
from benchmarks.rivals.torch_side import TorchSide


class Make(TorchSide):
    """Eager prefill, compiled decode (on the CPU nothing is compiled, to keep a dry run short)."""

    def __init__(self, job: Job, side: Side) -> None:
        super().__init__(job, side)
        self.rows = self.ids().shape[1]
        self.cache: Any = StaticCache(config=self.text, max_cache_len=self.rows + job.new_tokens)
        on_gpu = self.device.type == "cuda"
        self.step: Any = torch.compile(self._step, mode="reduce-overhead", fullgraph=True) if on_gpu else self._step

    def _step(self, token: Tensor, position: Tensor) -> Tensor:
        """token, position [1, 1] -> the next token [1, 1]."""
        hidden = self.hidden(self.cache, input_ids=token, position_ids=position)
        following: Tensor = self.model.lm_head(hidden).argmax(-1)
        return following

    @torch.no_grad()
    def answer(self, new_tokens: int) -> Answer:
        """Prefill, then one launch a token."""
        clock = stopwatch()
        self.cache.reset()
        x = self.embeds(self.tokens().flatten(0, 1))
        position = torch.arange(x.shape[1], device=self.device)[None]
        hidden = self.hidden(self.cache, inputs_embeds=x, position_ids=position)
        token, place = self.model.lm_head(hidden[:, -1:]).argmax(-1), position[:, -1:] + 1
        self.wait()
        found, marks = [token], Marks(self.device, clock)
        for _ in range(new_tokens - 1):
            if self.device.type == "cuda":
                torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
            token = self.step(token, place).clone()  # its memory is the graph's, and used again by the next step
            place = place + 1
            found.append(token)
            marks.add()
        self.wait()
        ids = torch.cat(found).flatten().tolist()
        return Answer(ids, marks.seconds(), self.rows, self.visual, float(self.visual))


class Marks:
    """When the device came to certain places: CUDA events, the host's clock on a CPU."""

    def __init__(self, device: torch.device, clock: Any) -> None:
        self.clock, self.first = clock, clock()
        self.on_gpu, self.marks = device.type == "cuda", list[Any]()
        self.add()

    def add(self) -> None:
        """Note this place."""
        if not self.on_gpu:
            self.marks.append(self.clock())
            return
        make: Any = torch.cuda.Event
        event = make(enable_timing=True)
        event.record()
        self.marks.append(event)

    def seconds(self) -> list[float]:
        """Seconds of each place on the clock; the device must have passed them all."""
        if not self.on_gpu:
            return list(self.marks)
        return [self.first + self.marks[0].elapsed_time(mark) / 1e3 for mark in self.marks]
