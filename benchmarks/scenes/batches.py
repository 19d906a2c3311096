"""Training batches: clips with all their questions in one sequence, each question blind to the others.

A sequence is prefix, visual tokens, then blocks "question, answer". A block attends to the prefix, the frames and
itself, and its positions begin where the frames end: it sees what it would alone, and the frames are encoded once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from benchmarks.scenes import questions
from benchmarks.scenes.world import Split, draw, plan

TOKENS = 49  # visual tokens a frame
FRAMES = (8, 12, 16, 24, 32)
IGNORED = -100


@dataclass
class Batch:
    """B clips of F frames. L = P + V + Q columns: prefix, visual tokens with newline, padded blocks."""

    frames: Tensor  # uint8 [B, F, R, R, 3]
    prefix: Tensor  # int64 [P]
    ids: Tensor  # int64 [B, Q]
    labels: Tensor  # int64 [B, Q], IGNORED where no answer token stands
    block: Tensor  # int64 [B, Q], 1.. for questions, 0 for padding
    positions: Tensor  # int64 [B, L]

    def to(self, device: torch.device) -> Batch:
        """Moved to a device."""
        return Batch(**{name: value.to(device, non_blocking=True) for name, value in self.__dict__.items()})

    def mask(self) -> Tensor:
        """bool [B, 1, L, L], True where a row may look."""
        seen = self.positions.shape[1] - self.ids.shape[1]
        front = torch.zeros(len(self.block), seen, dtype=torch.long, device=self.block.device)
        block = torch.cat((front, self.block), 1)
        common = torch.arange(block.shape[1], device=block.device) < seen
        same = (block[:, None, :] == block[:, :, None]) | common[None, None, :]
        causal = torch.ones(block.shape[1], block.shape[1], dtype=torch.bool, device=block.device).tril()
        return (same & causal)[:, None]


def blocks(tokenizer: Tokenizer, asked: list[questions.Question]) -> tuple[list[int], list[int], list[int], list[int]]:
    """ids, labels, block numbers and positions (from 0) of a clip's questions, end to end."""
    ids, labels, numbers, positions = list[int](), list[int](), list[int](), list[int]()
    for number, question in enumerate(asked, 1):
        text = f"\n{question.text}<|im_end|><|im_start|>assistant\n"
        head = tokenizer.encode(text, add_special_tokens=False).ids
        answer = tokenizer.encode(question.answer + "<|im_end|>", add_special_tokens=False).ids
        ids += head + answer
        labels += [IGNORED] * len(head) + answer
        numbers += [number] * (len(head) + len(answer))
        positions += range(len(head) + len(answer))
    return ids, labels, numbers, positions


def make(tokenizer: Tokenizer, split: Split, seeds: list[int], frames: int) -> Batch:
    """A batch of the scenes with these seeds."""
    prefix = tokenizer.encode("<|im_start|>user ", add_special_tokens=False).ids
    seen = len(prefix) + frames * TOKENS + 1
    scenes = [plan(seed, split, frames) for seed in seeds]
    rows = [blocks(tokenizer, questions.ask(scene, seed)) for scene, seed in zip(scenes, seeds, strict=True)]
    width = max(len(row[0]) for row in rows)
    fill = (0, IGNORED, 0, 0)
    ids, labels, block, after = (
        torch.tensor([row[part] + [fill[part]] * (width - len(row[part])) for row in rows]) for part in range(4)
    )
    positions = torch.cat((torch.arange(seen).expand(len(rows), -1), after + seen), 1)
    video = torch.from_numpy(np.stack([draw(scene) for scene in scenes]))
    return Batch(video, torch.tensor(prefix), ids, labels, block, positions)


class Stream(IterableDataset[Batch]):
    """Endless batches of fresh scenes; every worker draws its own."""

    def __init__(self, tokenizer: str, size: int, start: int, frames: tuple[int, ...] = FRAMES) -> None:
        self.tokenizer, self.size, self.start, self.frames = tokenizer, size, start, frames

    def __iter__(self) -> Iterator[Batch]:
        tokenizer = Tokenizer.from_str(self.tokenizer)
        worker = get_worker_info()
        number, count = (worker.id, worker.num_workers) if worker else (0, 1)
        at = self.start + number
        while True:
            seeds = [at * self.size + i for i in range(self.size)]
            yield make(tokenizer, "train", seeds, self.frames[at % len(self.frames)])
            at += count
