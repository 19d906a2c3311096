"""Train `tiny` on the scenes.

    python -m benchmarks.scenes.train OUT [--steps 20000] [--batch 32] [--device cuda]

Three losses: the answers' tokens; from each visual token, what stands in its part of the picture, also of single
pictures of things in colours without a name, so that a shape is known in colours it was not seen in; from the
decoder's row of each visual token, what the thing there does (two heads that are thrown away). Writes
OUT/checkpoint.pt every --every steps and goes on from it when started again; at the end OUT is a Hugging Face
directory (fp16 safetensors) that `dycoke-edge export` takes. Prints step, losses, and how many held-out answers are
right.
"""

from __future__ import annotations

import argparse
import json
import math
from itertools import islice
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader
from transformers import LlavaOnevisionForConditionalGeneration

from benchmarks.scenes import batches, cells, model, pictures
from benchmarks.scenes.batches import Batch

HELD_OUT_CLIPS = 64  # of the test split, seeds 0 on; accuracy.py measures on others
EASY_SHARE = 0.25  # of the steps, on short clips only
CELLS_WEIGHT = 0.3  # of either loss over cells
RARE = 8.0  # weight of a fact that holds: 99 % do not


class Learner(nn.Module):
    """`tiny` and the heads that name what stands where and what it does."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        make: Any = LlavaOnevisionForConditionalGeneration
        self.tiny = make(model.config(tokenizer))
        self.tiny.model.apply_pooling = halved
        width = self.tiny.config.text_config.hidden_size
        self.facts, self.motions = nn.Linear(width, len(cells.FACTS)), nn.Linear(width, len(cells.MOTIONS))

    def see(self, frames: Tensor) -> Tensor:
        """Visual tokens [B, F * N, E] of frames uint8 [B, F, R, R, 3]."""
        pixels = (frames.permute(0, 1, 4, 2, 3).to(self.tiny.dtype) / 255 - 0.5) / 0.5
        # transformers 5.23 puts the newline behind the features, 5.17 did not
        visual: Tensor = self.tiny.model.get_video_features(pixels).pooler_output
        return visual[:, : frames.shape[1] * batches.TOKENS]

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Logits [n, V] where an answer token is predicted, of facts [B, F * N, facts], of motions [B, M, motions]."""
        tiny = self.tiny
        visual = self.see(batch.frames)
        newline = tiny.model.image_newline.expand(len(visual), 1, -1)
        rows = batch.kept[..., None].expand(-1, -1, visual.shape[-1])
        embed = tiny.get_input_embeddings()
        prefix = embed(batch.prefix).expand(len(batch.ids), -1, -1)
        x = torch.cat((prefix, visual.gather(1, rows), newline, embed(batch.ids)), 1)
        hidden = tiny.model.language_model(
            inputs_embeds=x, attention_mask=batch.mask(), position_ids=batch.positions, use_cache=False
        ).last_hidden_state
        before = hidden[:, -batch.ids.shape[1] - 1 : -1]  # the row that predicts each token of the blocks
        first = len(batch.prefix)
        moving = self.motions(hidden[:, first : first + batch.kept.shape[1]])
        return tiny.lm_head(before.flatten(0, 1)[batch.answers]), self.facts(visual), moving


def halved(features: Tensor) -> Tensor:
    """[n, S * S, E] to [n, S * S / 4, E]: what transformers' bilinear pooling is where S is even, the mean of 2 x 2.
    torch's bilinear kernel took 64 % of a step (torch 2.11, H100)."""
    count, patches, width = features.shape
    side = math.isqrt(patches) // 2
    return features.reshape(count, side, 2, side, 2, width).mean((2, 4)).reshape(count, side * side, width)


def losses(learner: Learner, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy a token of the answers; of the facts and of the motions, a visual token."""
    logits, facts, motions = learner(batch)
    text = functional.cross_entropy(logits.float(), batch.labels.flatten()[batch.answers])
    shapes = learner.facts(learner.see(batch.pictures[:, None]))[..., pictures.TAUGHT]
    shown = named(shapes, batch.shown[..., pictures.TAUGHT])
    return text, named(facts, batch.facts) + shown, named(motions, batch.motions)


def named(logits: Tensor, true: Tensor) -> Tensor:
    """Binary cross-entropy of each name, summed over names, a token."""
    rare = torch.tensor(RARE, device=logits.device)
    each = functional.binary_cross_entropy_with_logits(logits.float(), true.float(), reduction="none", pos_weight=rare)
    return each.sum(-1).mean()


def rate(step: int, steps: int, peak: float) -> float:
    """Warm-up over 2 %, then a cosine down to a fiftieth."""
    warm = max(1, steps // 50)
    if step < warm:
        return peak * (step + 1) / warm
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm))))


@torch.no_grad()
def held_out(learner: Learner, tokenizer: Tokenizer, device: torch.device, frames: int = 16) -> tuple[float, float]:
    """Share of held-out short answers that are right whole, and of the tokens of descriptions, given those before."""
    short, long = list[float](), list[float]()
    for seed in range(0, HELD_OUT_CLIPS, 16):
        batch = batches.make(tokenizer, "test", list(range(seed, min(seed + 16, HELD_OUT_CLIPS))), frames)
        with torch.autocast(device.type, torch.bfloat16):
            logits, _, _ = learner(batch.to(device))
        right = logits.argmax(-1).cpu() == batch.labels.flatten()[batch.answers]
        clip, block = batch.answers // batch.ids.shape[1], batch.block.flatten()[batch.answers]
        for of in torch.unique(clip * 64 + block):
            answer = right[clip * 64 + block == of].float()
            if len(answer) > 25:
                long.append(float(answer.mean()))
            else:
                short.append(float(answer.min()))
    return sum(short) / len(short), sum(long) / len(long)


def save(path: Path, **state: Any) -> None:
    """Write a checkpoint whole or not at all."""
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)


def finish(out: Path, tiny: Any, tokenizer: Tokenizer) -> None:
    """Turn OUT into a Hugging Face directory."""
    tiny.half().save_pretrained(out)
    model.write_files(out, tokenizer)


def train(
    out: Path,
    steps: int,
    batch: int = 32,
    peak: float = 1e-3,
    device: str = "cpu",
    every: int = 500,
    workers: int = 2,
    frames: tuple[int, ...] = batches.FRAMES,
) -> list[float]:
    """Train from the start or from OUT/checkpoint.pt; returns the answers' losses of this run."""
    torch.manual_seed(0)
    out.mkdir(parents=True, exist_ok=True)
    place, where = out / "checkpoint.pt", torch.device(device)
    tokenizer = model.train_tokenizer()
    learner = Learner(tokenizer).to(where)
    optimizer = torch.optim.AdamW(
        learner.parameters(), lr=peak, betas=(0.9, 0.98), weight_decay=0.05, fused=device != "cpu"
    )
    first = 0
    if place.exists():
        state = torch.load(place, map_location=where, weights_only=True)
        learner.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    stream = batches.Stream(tokenizer.to_str(), batch, first, int(steps * EASY_SHARE), frames)
    loader: Any = DataLoader(stream, batch_size=None, num_workers=workers, pin_memory=where.type == "cuda")
    found, began = list[tuple[Tensor, ...]](), perf_counter()
    for step, data in enumerate(islice(loader, steps - first), first):
        for group in optimizer.param_groups:
            group["lr"] = rate(step, steps, peak)
        with torch.autocast(where.type, torch.bfloat16):
            text, facts, motions = losses(learner, data.to(where))
        optimizer.zero_grad()
        (text + CELLS_WEIGHT * (facts + motions)).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(learner.parameters(), 1.0)
        optimizer.step()
        found.append((text.detach(), facts.detach(), motions.detach()))  # not .item(): the GPU need not wait for us
        if (step + 1) % every == 0 or step + 1 == steps:
            save(place, model=learner.state_dict(), optimizer=optimizer.state_dict(), step=step + 1)
            short, long = held_out(learner, tokenizer, where)
            recent = torch.tensor(found[-every:]).mean(0).tolist()
            names = ("loss", "facts", "motions", "short", "describe")
            line = {name: round(value, 4) for name, value in zip(names, (*recent, short, long), strict=True)}
            print(json.dumps({"step": step + 1, **line, "seconds": round(perf_counter() - began)}), flush=True)
    finish(out, learner.tiny, tokenizer)
    return [float(text) for text, *_ in found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=20000)
    parser.add_argument("--batch", type=int, default=32, help="clips a step, each with all its questions")
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--every", type=int, default=500, help="steps between checkpoints")
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    train(args.out, args.steps, args.batch, args.rate, args.device, args.every, args.workers)


if __name__ == "__main__":
    main()
