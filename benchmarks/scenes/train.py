"""Train `tiny` on the scenes.

    python -m benchmarks.scenes.train OUT [--steps 20000] [--batch 32] [--device cuda]

Writes OUT/checkpoint.pt every --every steps and goes on from it when started again; at the end OUT is a Hugging Face
directory (fp16 safetensors) that `dycoke-edge export` takes. Prints step, loss, and how many held-out answers are right
token by token.
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
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import LlavaOnevisionForConditionalGeneration

from benchmarks.scenes import batches, model
from benchmarks.scenes.batches import IGNORED, Batch

HELD_OUT_CLIPS = 32


def answer_logits(tiny: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Logits [n, V] where an answer token is predicted, and those tokens [n]."""
    pixels = (batch.frames.permute(0, 1, 4, 2, 3).to(tiny.dtype) / 255 - 0.5) / 0.5
    visual = tiny.model.get_video_features(pixels).pooler_output  # with the newline
    embed = tiny.get_input_embeddings()
    prefix = embed(batch.prefix).expand(len(batch.ids), -1, -1)
    x = torch.cat((prefix, visual, embed(batch.ids)), 1)
    hidden = tiny.model.language_model(
        inputs_embeds=x, attention_mask=batch.mask(), position_ids=batch.positions, use_cache=False
    ).last_hidden_state
    before = hidden[:, -batch.ids.shape[1] - 1 : -1]  # the row that predicts each token of the blocks
    wanted = batch.labels != IGNORED
    return tiny.lm_head(before[wanted]), batch.labels[wanted]


def rate(step: int, steps: int, peak: float) -> float:
    """Warm-up over 2 %, then a cosine down to a twentieth."""
    warm = max(1, steps // 50)
    if step < warm:
        return peak * (step + 1) / warm
    return peak * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm))))


@torch.no_grad()
def held_out(tiny: Any, tokenizer: Tokenizer, device: torch.device, frames: int = 16) -> float:
    """Share of answer tokens of held-out scenes that are predicted right, given those before them."""
    batch = batches.make(tokenizer, "test", list(range(HELD_OUT_CLIPS)), frames).to(device)
    with torch.autocast(device.type, torch.bfloat16):
        logits, wanted = answer_logits(tiny, batch)
    return float((logits.argmax(-1) == wanted).float().mean())


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
    """Train from the start or from OUT/checkpoint.pt; returns the losses of this run."""
    torch.manual_seed(0)
    out.mkdir(parents=True, exist_ok=True)
    place, where = out / "checkpoint.pt", torch.device(device)
    tokenizer = model.train_tokenizer()
    make: Any = LlavaOnevisionForConditionalGeneration
    tiny = make(model.config(tokenizer)).to(where)
    optimizer = torch.optim.AdamW(tiny.parameters(), lr=peak, betas=(0.9, 0.98), weight_decay=0.05)
    first = 0
    if place.exists():
        state = torch.load(place, map_location=where, weights_only=True)
        tiny.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    stream = batches.Stream(tokenizer.to_str(), batch, first, frames)
    loader: Any = DataLoader(stream, batch_size=None, num_workers=workers, pin_memory=where.type == "cuda")
    losses, began = list[float](), perf_counter()
    for step, data in enumerate(islice(loader, steps - first), first):
        for group in optimizer.param_groups:
            group["lr"] = rate(step, steps, peak)
        with torch.autocast(where.type, torch.bfloat16):
            logits, wanted = answer_logits(tiny, data.to(where))
            loss = torch.nn.functional.cross_entropy(logits.float(), wanted)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(tiny.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if (step + 1) % every == 0 or step + 1 == steps:
            save(place, model=tiny.state_dict(), optimizer=optimizer.state_dict(), step=step + 1)
            right, seconds = held_out(tiny, tokenizer, where), perf_counter() - began
            recent = sum(losses[-every:]) / len(losses[-every:])
            line = {"step": step + 1, "loss": round(recent, 4), "held_out": round(right, 4), "seconds": round(seconds)}
            print(json.dumps(line), flush=True)
    finish(out, tiny, tokenizer)
    return losses


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
