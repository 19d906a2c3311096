"""transformers as one uses it: SDPA and its own `generate`, a token at a time to the host."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.rivals.contestant import Answer, stopwatch
from benchmarks.rivals.torch_side import TorchSide


class Make(TorchSide):
    """Dynamic cache, eager kernels."""

    @torch.no_grad()
    def answer(self, new_tokens: int) -> Answer:
        """`generate` with a streamer, which hears of each id when it is on the host."""
        from transformers.generation.streamers import BaseStreamer

        answer, clock, ids = Answer(), stopwatch(), self.ids()

        class Clock(BaseStreamer):
            def put(self, value: Any) -> None:
                if value.numel() == 1:  # the prompt comes first
                    answer.ids.append(int(value))
                    answer.times.append(clock())

            def end(self) -> None: ...

        self.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values_videos=self.pixels(),
            max_new_tokens=new_tokens,
            do_sample=False,
            streamer=Clock(),
        )
        answer.rows, answer.visual, answer.active = ids.shape[1], self.visual, float(self.visual)
        return answer
