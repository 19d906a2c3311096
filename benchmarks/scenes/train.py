"""Train `tiny` on the scenes.

    python -m benchmarks.scenes.train OUT [--steps 7000] [--minutes 12] [--batch 32] [--device cuda]

Three losses: the answers' tokens; from each visual token, what stands in its part of the picture, also of single
pictures of things in colours without a name, so that a shape is known in colours it was not seen in; from the
decoder's row of each visual token, what the thing there does (two heads that are thrown away). That row is taken after
half of the layers: an answer can only read what earlier layers have written. Writes OUT/checkpoint.pt every --every
steps and goes on from it when started again; at the end OUT is a Hugging Face directory (fp16 safetensors) that
`dycoke-edge export` takes. Prints step, losses, and how many held-out answers are right, by kind. With --minutes the
rate falls with the time, and training ends with it.
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

from benchmarks.scenes import batches, cells, model, pictures, questions
from benchmarks.scenes.batches import Batch
from benchmarks.scenes.world import plan

HELD_OUT_CLIPS = 64  # of the test split, seeds 0 on; accuracy.py measures on others
EASY_SHARE = 0.25  # of the steps, on short clips only
WARM = 0.02  # of the training
CELLS_WEIGHT = 0.3  # of either loss over cells
RARE = 8.0  # weight of a fact that holds: 99 % do not
MOTION_LAYER = 3  # of 6: after how many layers a row is asked for motions


class Learner(nn.Module):
    """`tiny` and the heads that name what stands where and what it does."""

    taught: Tensor  # int64, which facts pictures teach: a mask as index would make the host wait for the GPU

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        make: Any = LlavaOnevisionForConditionalGeneration
        self.tiny = make(model.config(tokenizer))
        self.tiny.model.apply_pooling = halved
        width = self.tiny.config.text_config.hidden_size
        self.facts, self.motions = nn.Linear(width, len(cells.FACTS)), nn.Linear(width, len(cells.MOTIONS))
        self.norm = nn.LayerNorm(width)  # between layers rows are not normalised
        taught = torch.from_numpy(pictures.TAUGHT).nonzero().flatten()
        self.register_buffer("taught", taught, persistent=False)

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
        found = tiny.model.language_model(
            inputs_embeds=x,
            attention_mask=batch.mask(),
            position_ids=batch.positions,
            use_cache=False,
            output_hidden_states=True,
        )
        before = found.last_hidden_state[
            :, -batch.ids.shape[1] - 1 : -1
        ]  # the row that predicts each token of the blocks
        first = len(batch.prefix)
        moving = self.motions(self.norm(found.hidden_states[MOTION_LAYER][:, first : first + batch.kept.shape[1]]))
        return tiny.lm_head(before.flatten(0, 1)[batch.answers]), self.facts(visual), moving


def halved(features: Tensor) -> Tensor:
    """[n, S * S, E] to [n, S * S / 4, E]: what transformers' bilinear pooling is where S is even, the mean of 2 x 2.
    torch's bilinear kernel took 64 % of a step (torch 2.11, H100)."""
    count, patches, width = features.shape
    side = math.isqrt(patches) // 2
    return features.reshape(count, side, 2, side, 2, width).mean((2, 4)).reshape(count, side * side, width)


def losses(learner: Learner, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy a token of the answers; of the facts, a visual token; of the motions, one where a thing is."""
    logits, facts, motions = learner(batch)
    text = functional.cross_entropy(logits.float(), batch.labels.flatten()[batch.answers])
    shapes = learner.facts(learner.see(batch.pictures[:, None]))
    shown = named(shapes.index_select(-1, learner.taught), batch.shown.index_select(-1, learner.taught))
    there = batch.motions.any(-1, keepdim=True).float()  # nothing moves elsewhere, which is easily learned
    doing = (each_name(motions, batch.motions, 1.0) * there).sum() / there.sum().clamp(min=1)
    return text, named(facts, batch.facts) + shown, doing


def named(logits: Tensor, true: Tensor) -> Tensor:
    """Binary cross-entropy of each name, summed over names, a token."""
    return each_name(logits, true, RARE).sum(-1).mean()


def each_name(logits: Tensor, true: Tensor, weight: float) -> Tensor:
    """Binary cross-entropy of each name and token; names that hold have a weight. Made without a tensor from the host,
    for which the GPU would be waited for."""
    true = true.float()
    each = functional.binary_cross_entropy_with_logits(logits.float(), true, reduction="none")
    return each * (1 + (weight - 1) * true)


def rate(share: float, peak: float) -> float:
    """Warm-up over 2 % of the training, then a cosine down to a fiftieth."""
    if share < WARM:
        return peak * max(share, 0.01 * WARM) / WARM
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, (share - WARM) / (1 - WARM)))))


@torch.no_grad()
def held_out(learner: Learner, tokenizer: Tokenizer, device: torch.device, frames: int = 16) -> dict[str, float]:
    """Share of held-out answers that are right whole, all short ones and by kind; of descriptions, the share of tokens,
    given those before."""
    scores: dict[str, list[float]] = {kind: [] for kind in ("short", *questions.KINDS)}
    for first in range(0, HELD_OUT_CLIPS, 16):
        seeds = list(range(first, min(first + 16, HELD_OUT_CLIPS)))
        batch = batches.make(tokenizer, "test", seeds, frames)
        with torch.autocast(device.type, torch.bfloat16):
            logits, _, _ = learner(batch.to(device))
        right = logits.argmax(-1).cpu() == batch.labels.flatten()[batch.answers]
        clip, block = batch.answers // batch.ids.shape[1], batch.block.flatten()[batch.answers]
        for row, seed in enumerate(seeds):
            for number, question in enumerate(questions.ask(plan(seed, "test", frames), seed), 1):
                answer = right[(clip == row) & (block == number)].float()
                if question.kind == "describe":
                    scores["describe"].append(float(answer.mean()))
                else:
                    scores["short"].append(float(answer.min()))
                    scores[question.kind].append(float(answer.min()))
    return {kind: round(sum(found) / len(found), 3) for kind, found in scores.items() if found}


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
    minutes: float = math.inf,
    seed: int = 0,
) -> list[float]:
    """Train from the start or from OUT/checkpoint.pt, for `steps` or `minutes`, whichever end first; returns the
    answers' losses of this run."""
    torch.manual_seed(seed)
    out.mkdir(parents=True, exist_ok=True)
    place, where = out / "checkpoint.pt", torch.device(device)
    tokenizer = model.train_tokenizer()
    learner = Learner(tokenizer).to(where)
    optimizer = torch.optim.AdamW(
        learner.parameters(), lr=peak, betas=(0.9, 0.98), weight_decay=0.05, fused=device != "cpu"
    )
    first, before = 0, 0.0
    if place.exists():
        state = torch.load(place, map_location=where, weights_only=True)
        learner.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first, before = state["step"], state["seconds"]
    stream = batches.Stream(tokenizer.to_str(), batch, first, int(steps * EASY_SHARE), frames)
    loader: Any = DataLoader(stream, batch_size=None, num_workers=workers, pin_memory=where.type == "cuda")
    found, began, share = list[tuple[Tensor, ...]](), perf_counter(), 0.0
    for step, data in enumerate(islice(loader, steps - first), first):
        spent = before + perf_counter() - began
        share = max((step + 1) / steps, spent / (60 * minutes))
        for group in optimizer.param_groups:
            group["lr"] = rate(share, peak)
        with torch.autocast(where.type, torch.bfloat16):
            text, facts, motions = losses(learner, data.to(where))
        optimizer.zero_grad()
        (text + CELLS_WEIGHT * (facts + motions)).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(learner.parameters(), 1.0)
        optimizer.step()
        found.append((text.detach(), facts.detach(), motions.detach()))  # not .item(): the GPU need not wait for us
        if (step + 1) % every == 0 or share >= 1:
            state = {"model": learner.state_dict(), "optimizer": optimizer.state_dict()}
            save(place, **state, step=step + 1, seconds=spent)
            recent = torch.tensor(found[-every:]).mean(0).tolist()
            line = {name: round(value, 4) for name, value in zip(("loss", "facts", "motions"), recent, strict=True)}
            line |= held_out(learner, tokenizer, where)
            print(json.dumps({"step": step + 1, **line, "seconds": round(spent)}), flush=True)
        if share >= 1:
            break
    finish(out, learner.tiny, tokenizer)
    return [float(text) for text, *_ in found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=20000)
    parser.add_argument("--minutes", type=float, default=math.inf, help="end after so long, however many steps that is")
    parser.add_argument("--batch", type=int, default=32, help="clips a step, each with all its questions")
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--every", type=int, default=500, help="steps between checkpoints")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0, help="of the first weights; the scenes are the same")
    args = parser.parse_args()
    settings = (args.steps, args.batch, args.rate, args.device, args.every, args.workers)
    train(args.out, *settings, minutes=args.minutes, seed=args.seed)


if __name__ == "__main__":
    main()
