"""The plain torch reference: DyCoke (arXiv 2411.15024) over transformers' LLaVA-OneVision.

It restates the paper and shares no code with the product: it may know transformers and
dycoke_edge.config, never dycoke_edge.dycoke, export or runtime. fp32; transformers 4.57 and 5.x.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, silu

from dycoke_edge.config import Compression

Model = Any  # transformers.LlavaOnevisionForConditionalGeneration


@dataclass
class Trace:
    """What one generation did. Decode step t processes ids[t]; there are len(ids) - 1 steps.

    `refreshes` counts choices of the kept set, the first included; `returned` those after the first
    that made a parked token active again. `margins`: top-2 logit differences. `cosines` start at
    step 1. `gaps`: attention of the last token in less that of the first one out, one a refresh.
    """

    ids: list[int] = field(default_factory=list)
    active_counts: list[int] = field(default_factory=list)
    active: list[Tensor] = field(default_factory=list)
    refreshes: int = 0
    returned: int = 0
    margins: list[float] = field(default_factory=list)
    cosines: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    num_visual: int = 0


@torch.no_grad()
def visual_tokens(model: Model, pixels: Tensor) -> Tensor:
    """Tower, projector and 2x2 pooling. pixels: [F, 3, R, R] normalised; returns [F, N, E]."""
    states = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
    patches = model.model.multi_modal_projector(states[model.config.vision_feature_layer])
    return cast(Tensor, model.model.apply_pooling(patches))


def newline(model: Model) -> Tensor:
    """The embedding that follows the visual tokens of a video: [E]."""
    return cast(Tensor, model.model.image_newline.detach())


def merge(tokens: Tensor, merge_ratio: float, mode: str = "paper") -> Tensor:
    """Stage 1. tokens: [F, N, C]; returns int64 [M]: flat indices into F*N, in decoder order."""
    frames, count, _ = tokens.shape
    if mode == "official" and frames <= 4:
        raise ValueError("the released code fails on 4 frames or fewer")
    partner: dict[int, int] = {}
    if mode == "paper":
        for start in range(0, frames, 4):
            partner |= {start + 1: start, start + 2: start, start + 3: start + 2}
    else:
        frames -= frames % 2
        partner = {second: second - 1 for second in range(1, frames, 2)}
        partner |= {start + 2: start for start in range(0, len(tokens) - 4, 4)}
    kept: list[Tensor] = []
    for frame in range(frames):
        places = torch.arange(count)
        if frame in partner:
            similarity = similarities(tokens[partner[frame]], tokens[frame])
            places = torch.sort(similarity, stable=True).indices[: int((1 - merge_ratio) * count)]
            places = places.sort().values if mode == "paper" else places
        kept.append(frame * count + places)
    return torch.cat(kept)


def weights(index: Tensor, frames: int, count: int) -> Tensor:
    """For how many of the F*N tokens each kept one of `index` [M] stands, mode "paper", fp32 [M]: a dropped one is
    counted at the first kept one on its way from partner to partner."""
    place = {token: at for at, token in enumerate(index.tolist())}
    standing = torch.zeros(len(index))
    for token in range(frames * count):
        while token not in place:
            token -= count * (2 if token // count % 4 == 2 else 1)
        standing[place[token]] += 1
    return standing


def cover(tokens: Tensor, budget: float, prune_ratio: float) -> tuple[Tensor, Tensor]:
    """Mode "coverage". tokens: [F, N, C]; returns int64 [M] flat indices in raster order, and fp32 [2, M] counts: among
    all kept tokens of a frame, and among those that stay active (0: parked)."""
    frames, count, _ = tokens.shape
    size = max(1, int(budget * count))
    active = max(1, int(size * (1 - prune_ratio)))
    found: list[list[int]] = []
    rows: list[tuple[int, ...]] = []  # flat index, both counts
    for frame in range(frames):
        alike = similarities(tokens[frame][:, None], tokens[frame][None])
        best = torch.zeros(count, dtype=torch.float64)
        if frame % 2:
            known = tokens[frame - 1][found[-1]]
            best = best.maximum(similarities(tokens[frame][:, None], known[None]).amax(1))
        picks: list[int] = []
        for _ in range(size):
            gains = [(-int(float((alike[:, j] - best).clamp(min=0).sum()) * 1024 + 0.5), j) for j in range(count)]
            picks.append(min(gain for gain in gains if gain[1] not in picks)[1])
            best = best.maximum(alike[:, picks[-1]])
        standing = [_standing(alike, sorted(picks)), _standing(alike, sorted(picks[:active]))]
        rows += [(frame * count + place, *(some.get(place, 0) for some in standing)) for place in sorted(picks)]
        found.append(sorted(picks))
    table = torch.tensor(rows)
    return table[:, 0], table[:, 1:].T.float()


def _standing(alike: Tensor, among: list[int]) -> dict[int, int]:
    """How many of the N tokens are most like each of these; a token among them is like itself."""
    standing = dict.fromkeys(among, 0)
    for token in range(len(alike)):
        standing[token if token in standing else max(among, key=lambda other: float(alike[token, other]))] += 1
    return standing


def similarities(a: Tensor, b: Tensor) -> Tensor:
    """Cosine along the last axis in float64; 0 where a vector is zero."""
    return cosine_similarity(a.double(), b.double(), dim=-1, eps=1e-60)


class Chooser:
    """Stage 2: which visual tokens the deep layers see, from one attention vector a step."""

    def __init__(self, num_visual: int, compression: Compression, trace: Trace) -> None:
        self.options = compression
        self.trace = trace
        self.count = int(num_visual * (1 - compression.prune_ratio))
        self.active = torch.ones(num_visual, dtype=torch.bool)
        self.previous: Tensor | None = None

    def step(self, attention: Tensor) -> Tensor:
        """attention: [M], head mean; returns bool [M] for this same step."""
        if self.options.keep == "coverage":
            return self.active
        if self.options.prune_ratio == 0 or not len(attention):
            return self.active
        if self.previous is None:
            self.active = self.chosen(attention)
        else:
            cosine = float(similarities(self.previous, attention))
            self.trace.cosines.append(cosine)
            self.follow(attention, cosine)
        self.previous = attention
        return self.active

    def follow(self, attention: Tensor, cosine: float) -> None:
        """Any step but the first: stay, choose anew, or (official) open up."""
        if self.options.free_parked:
            return
        if cosine < self.options.refresh_threshold:
            before, self.active = self.active, self.chosen(attention)
            self.trace.returned += bool((self.active & ~before).any())
        elif self.options.mode == "official":
            self.active = torch.ones_like(self.active)

    def chosen(self, attention: Tensor) -> Tensor:
        """The `count` largest; of equals, the lower index."""
        ranked = torch.sort(attention, descending=True, stable=True)
        self.trace.refreshes += 1
        if 0 < self.count < len(attention):
            self.trace.gaps.append(float(ranked.values[self.count - 1] - ranked.values[self.count]))
        return torch.zeros_like(self.active).index_fill(0, ranked.indices[: self.count], True)


class Decoder:
    """The Qwen2 decoder written out, with every key and value it ever computed."""

    def __init__(self, model: Model) -> None:
        self.inner, self.head = model.model.language_model, model.lm_head
        config = model.config.text_config
        self.heads, self.groups = config.num_attention_heads, config.num_key_value_heads
        self.dim = config.hidden_size // self.heads
        self.eps = config.rms_norm_eps
        rope = getattr(config, "rope_parameters", None) or {"rope_theta": config.rope_theta}
        exponents = torch.arange(0, self.dim, 2).float() / self.dim
        self.frequencies = 1.0 / float(rope["rope_theta"]) ** exponents
        nothing = torch.empty(0, self.groups, self.dim)
        self.keys: list[Tensor] = [nothing for _ in self.inner.layers]
        self.values: list[Tensor] = [nothing for _ in self.inner.layers]
        self.bias = torch.zeros(0)  # of the first columns, added to every score
        self.deep_bias: Tensor | None = None  # instead, in deep layers of a decode step

    def norm(self, weight: Tensor, x: Tensor) -> Tensor:
        """RMSNorm. x: [T, E]."""
        return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """RoPE. x: [T, heads, D], positions: [T]."""
        angles = positions[:, None].float() * self.frequencies
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        first, second = x.chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)

    def layer(self, index: int, x: Tensor, positions: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
        """x: [T, E], visible: bool [T, S+T]; returns [T, E] and probabilities [H, T, S+T]."""
        layer = self.inner.layers[index]
        attention, mlp = layer.self_attn, layer.mlp
        normed = self.norm(layer.input_layernorm.weight, x)
        query = self.rotate(attention.q_proj(normed).view(len(x), self.heads, self.dim), positions)
        key = self.rotate(attention.k_proj(normed).view(len(x), self.groups, self.dim), positions)
        value = attention.v_proj(normed).view(len(x), self.groups, self.dim)
        self.keys[index] = torch.cat((self.keys[index], key))
        self.values[index] = torch.cat((self.values[index], value))
        shared = self.heads // self.groups
        keys = self.keys[index].repeat_interleave(shared, dim=1)
        values = self.values[index].repeat_interleave(shared, dim=1)
        scores = torch.einsum("thd,shd->hts", query, keys) / math.sqrt(self.dim)
        scores[..., : len(self.bias)] += self.bias
        weights = scores.masked_fill(~visible, -math.inf).softmax(-1)
        mixed = torch.einsum("hts,shd->thd", weights, values).reshape(len(x), -1)
        x = x + attention.o_proj(mixed)
        normed = self.norm(layer.post_attention_layernorm.weight, x)
        return x + mlp.down_proj(silu(mlp.gate_proj(normed)) * mlp.up_proj(normed)), weights

    def logits(self, x: Tensor) -> Tensor:
        """[V] of the last token. x: [T, E]."""
        return cast(Tensor, self.head(self.norm(self.inner.norm.weight, x[-1:]))[0])

    def prefill(self, x: Tensor, positions: Tensor) -> Tensor:
        """All prompt tokens at once, causal, nothing hidden. x: [T, E]; returns logits [V]."""
        visible = torch.ones(len(x), len(x), dtype=torch.bool).tril()
        for index in range(len(self.inner.layers)):
            x, _ = self.layer(index, x, positions, visible)
        return self.logits(x)

    def step(self, token: int, position: int, split_layer: int, span: slice, chooser: Chooser) -> Tensor:
        """One decode step: layers from `split_layer` on do not see the parked columns of `span`."""
        x = self.inner.embed_tokens.weight[token][None]
        positions = torch.tensor([position])
        visible = torch.ones(1, len(self.keys[0]) + 1, dtype=torch.bool)
        for index in range(len(self.inner.layers)):
            x, weights = self.layer(index, x, positions, visible)
            if index == split_layer - 1:
                active = chooser.step(weights.mean(0)[0, span])
                visible[0, span] = active
                shallow, self.bias = self.bias, self.bias if self.deep_bias is None else self.deep_bias
        self.bias = shallow
        chooser.trace.active.append(active)
        chooser.trace.active_counts.append(int(active.sum()))
        return self.logits(x)


@torch.no_grad()
def generate(
    model: Model,
    prefix_ids: list[int],
    visual: Tensor | None,
    suffix_ids: list[int],
    compression: Compression,
    max_new_tokens: int,
    split_layer: int = 3,
) -> Trace:
    """Greedy, exactly `max_new_tokens`, after prefix, merged visual [F, N, E], newline, suffix."""
    embed = model.model.language_model.embed_tokens.weight
    count = 0 if visual is None else visual.shape[0] * visual.shape[1]
    kept = torch.arange(count)
    counts: Tensor | None = None
    if visual is not None and compression.mode == "coverage":
        kept, counts = cover(visual, compression.budget, compression.prune_ratio)
    elif visual is not None and compression.merge_ratio > 0:
        kept = merge(visual, compression.merge_ratio, compression.mode)
    parts = [embed[prefix_ids]]
    if visual is not None:
        parts += [visual.flatten(0, 1)[kept], newline(model)[None]]
    x = torch.cat([*parts, embed[suffix_ids]])
    start = len(prefix_ids)
    positions = torch.arange(len(x))
    if compression.positions == "keep":
        after = start + count + torch.arange(len(x) - start - len(kept))
        positions = torch.cat((torch.arange(start), start + kept, after))
    trace = Trace(num_visual=len(kept))
    chooser, decoder = Chooser(len(kept), compression, trace), Decoder(model)
    if counts is not None:
        decoder.bias, decoder.deep_bias = (torch.cat((torch.zeros(start), row.clamp(min=1).log())) for row in counts)
        chooser.active = counts[1] > 0 if compression.keep == "coverage" else chooser.active
        decoder.deep_bias = decoder.bias if compression.keep == "attention" else decoder.deep_bias
    elif compression.weigh and visual is not None:
        decoder.bias = torch.cat((torch.zeros(start), weights(kept, *visual.shape[:2]).log()))
    logits = decoder.prefill(x, positions)
    span = slice(start, start + len(kept))
    for position in range(int(positions[-1]) + 1, int(positions[-1]) + max_new_tokens):
        logits = decoder.step(pick(logits, trace), position, split_layer, span, chooser)
    pick(logits, trace)
    return trace


def pick(logits: Tensor, trace: Trace) -> int:
    """The largest logit, recorded with its lead over the second."""
    best = logits.topk(2)
    trace.ids.append(int(best.indices[0]))
    trace.margins.append(float(best.values[0] - best.values[1]))
    return trace.ids[-1]
