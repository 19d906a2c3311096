"""DyCoke as its released code runs it (KD-TAO/DyCoke, commit dd74634), on today's transformers, for comparison only.

Merge drops tokens by cosine and leaves them in order of similarity. Prefill is SDPA over what is left. In a decode step
every layer appends to its cache with `cat` and computes attention written out, since the code asks every layer for its
weights; the attention of layer L-1 is compared with the step before, which waits for the device; where it turned, the
kept indices come to the host as a list, and every deep layer uploads that list and gathers K, and again for V. Where it
did not turn, the whole cache is used. Left out are the released code's slips that would change the answer (its place of
the visual tokens is off by one), so that ids can be compared with the runtime's mode "official".
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import DynamicCache
from transformers.models.qwen2.modeling_qwen2 import apply_rotary_pos_emb, repeat_kv

from benchmarks.rivals.contestant import Answer, Job, Side, stopwatch
from benchmarks.rivals.torch_side import TorchSide

Cached = list[Tensor]  # a layer's K or V each, [1, G, S, D]


class Make(TorchSide):
    """State of one answer: the cache, the attention of the step before, the kept set of this step."""

    def __init__(self, job: Job, side: Side) -> None:
        super().__init__(job, side)
        assert side.compression is not None
        self.options = side.compression
        self.keys, self.values = Cached(), Cached()
        self.previous: Tensor | None = None
        self.kept: list[int] | None = None

    @torch.no_grad()
    def answer(self, new_tokens: int) -> Answer:
        """Prefill, then a loop that knows every token on the host."""
        clock, answer = stopwatch(), Answer()
        visual = merge(self.tokens(), self.options.merge_ratio)
        x = self.embeds(visual)
        answer.rows, answer.visual = x.shape[1], len(visual)
        cache: Any = DynamicCache(config=self.text)
        hidden = self.hidden(cache, inputs_embeds=x)[:, -1:]
        self.keys = [layer.keys for layer in cache.layers]
        self.values = [layer.values for layer in cache.layers]
        self.previous = None
        span = slice(len(self.prefix), len(self.prefix) + len(visual))
        for count in range(new_tokens):
            token = self.model.lm_head(hidden).argmax(-1)
            answer.ids.append(int(token))
            answer.times.append(clock())
            if count + 1 < new_tokens:
                hidden = self.step(token, x.shape[1] + count, span)
                answer.refreshes += self.kept is not None
                seen = int(len(visual) * (1 - self.options.prune_ratio)) if self.kept else len(visual)
                answer.active += seen / (new_tokens - 1)
        return answer

    def step(self, token: Tensor, position: int, span: slice) -> Tensor:
        """token [1, 1] -> hidden [1, 1, E] after the last norm."""
        x = self.language.embed_tokens(token)
        turn = self.language.rotary_emb(x, torch.tensor([[position]], device=self.device))
        self.kept = None
        for index, layer in enumerate(self.language.layers):
            x, weights = self.layer(index, layer, x, turn)
            if index == self.job.split_layer - 1:
                self.choose(weights.mean(1)[0, -1], span)
        normed: Tensor = self.language.norm(x)
        return normed

    def layer(self, index: int, layer: Any, x: Tensor, turn: Any) -> tuple[Tensor, Tensor]:
        """x [1, 1, E] -> x and attention [1, H, 1, S]."""
        attention, residual = layer.self_attn, x
        x = layer.input_layernorm(x)
        shape = (1, 1, -1, attention.head_dim)
        query, key, value = (
            part(x).view(shape).transpose(1, 2) for part in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        query, key = apply_rotary_pos_emb(query, key, *turn)
        self.keys[index] = torch.cat((self.keys[index], key), dim=-2)
        self.values[index] = torch.cat((self.values[index], value), dim=-2)
        key, value = self.gathered(self.keys[index]), self.gathered(self.values[index])
        key, value = (repeat_kv(part, attention.num_key_value_groups) for part in (key, value))
        scores = query @ key.transpose(2, 3) * attention.scaling
        weights = functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
        mixed = (weights @ value).transpose(1, 2).reshape(1, 1, -1)
        x = residual + attention.o_proj(mixed)
        return x + layer.mlp(layer.post_attention_layernorm(x)), weights

    def gathered(self, cached: Tensor) -> Tensor:
        """The kept rows of [1, G, S, D], copied; all of them where nothing was chosen in this step."""
        if self.kept is None:
            return cached
        index = torch.tensor(self.kept, device=cached.device).view(1, 1, -1, 1)
        return torch.gather(cached, 2, index.expand(1, cached.shape[1], -1, cached.shape[3]))

    def choose(self, attention: Tensor, span: slice) -> None:
        """attention [S] of layer L-1: the kept rows of this step, if it turned."""
        visual, everything = attention[span], torch.arange(len(attention), device=self.device)
        turned = self.previous is None or bool(
            functional.cosine_similarity(visual.float(), self.previous.float(), dim=0) < self.options.refresh_threshold
        )
        self.previous = visual
        if turned:
            count = int(len(visual) * (1 - self.options.prune_ratio))
            top = torch.topk(visual, count, sorted=False).indices + span.start
            self.kept = torch.cat((everything[: span.start], top, everything[span.stop :])).tolist()


def merge(tokens: Tensor, merge_ratio: float) -> Tensor:
    """Tokens [F, N, E], F > 4 -> [M, E]: pairs of frames, then the first and third of each window but the last."""
    frames, count, _ = tokens.shape
    kept = int((1 - merge_ratio) * count)
    chosen = list(tokens[: frames - frames % 2])
    pairs = [(first, first + 1) for first in range(0, frames - 1, 2)]
    for anchor, frame in [*pairs, *((first, first + 2) for first in range(0, frames - 4, 4))]:
        similarity = functional.cosine_similarity(tokens[anchor], tokens[frame], dim=-1)
        chosen[frame] = tokens[frame][torch.topk(similarity, kept, largest=False).indices]
    return torch.cat(chosen)
