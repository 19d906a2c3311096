"""Training batches: clips with all their questions in one sequence, each question blind to the others.

A sequence is prefix, visual tokens, then blocks "question, answer". A block attends to the prefix, the frames and
itself, and its positions begin where the frames end: it sees what it would alone, and the frames are encoded once.

Half of the training batches lose a border of every picture, whole frames, or whole lines anywhere, from each picture
another number of them. A large model has seen pictures of many sizes and films of many rates; one trained on this fixed
grid alone would read time and place from counting tokens. Nothing is lost in the way of any method that is compared:
neither tokens here and there nor those that repeat, or the model would favour it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from benchmarks.scenes import cells, pictures, questions
from benchmarks.scenes.world import Scene, Split, draw, plan

TOKENS = cells.GRID**2  # visual tokens a frame
FRAMES = (8, 12, 16, 24, 32)
EASY = 2  # of FRAMES: the lengths that training begins with
PICTURES = 2  # beside each clip
LOST = 0.5  # of the frames at most, in a batch that loses frames
LINES = 4  # of GRID that stay at least, rows and columns each, in a batch that loses lines
IGNORED = -100


@dataclass
class Batch:
    """B clips of F frames. L = P + M + 1 + Q columns: prefix, kept visual tokens, newline, padded blocks."""

    frames: Tensor  # uint8 [B, F, R, R, 3]
    facts: Tensor  # uint8 [B, F * N, facts], what stands in each token's part of the picture
    motions: Tensor  # uint8 [B, M, motions], what the thing in a kept token's part does
    pictures: Tensor  # uint8 [B * PICTURES, R, R, 3], of things in colours without a name
    shown: Tensor  # uint8 [B * PICTURES, N, facts], what they show; facts about colours are not in it
    kept: Tensor  # int64 [B, M], increasing: which of the F * N visual tokens the decoder sees
    prefix: Tensor  # int64 [P]
    ids: Tensor  # int64 [B, Q]
    labels: Tensor  # int64 [B, Q], IGNORED where no answer token stands
    answers: Tensor  # int64 [n], where labels, flat, are not IGNORED
    block: Tensor  # int64 [B, Q], 1.. for questions, 0 for padding
    positions: Tensor  # int64 [B, L]

    def to(self, device: torch.device) -> Batch:
        """Moved to a device."""
        return Batch(**{name: value.to(device, non_blocking=True) for name, value in self.__dict__.items()})

    def pin_memory(self) -> Batch:
        """In memory that the GPU copies from by itself."""
        return Batch(**{name: value.contiguous().pin_memory() for name, value in self.__dict__.items()})

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


def make(tokenizer: Tokenizer, split: Split, seeds: list[int], frames: int, lossy: bool = False) -> Batch:
    """A batch of the scenes with these seeds; a `lossy` one has lost a border, or frames, or both, or lines."""
    prefix = tokenizer.encode("<|im_start|>user ", add_special_tokens=False).ids
    scenes = [plan(seed, split, frames) for seed in seeds]
    kept, span = _kept(np.random.default_rng([seeds[0], 4]), scenes, lossy)
    rows = [blocks(tokenizer, questions.ask(scene, seed)) for scene, seed in zip(scenes, seeds, strict=True)]
    width = max(len(row[0]) for row in rows)
    fill = (0, IGNORED, 0, 0)
    ids, labels, block, after = (
        torch.tensor([row[part] + [fill[part]] * (width - len(row[part])) for row in rows]) for part in range(4)
    )
    seen = torch.arange(len(prefix)).expand(len(rows), -1), len(prefix) + span
    end = len(prefix) + int(span.max()) + 1
    positions = torch.cat((*seen, torch.full((len(rows), 1), end), after + end + 1), 1)
    video = torch.from_numpy(np.stack([draw(scene) for scene in scenes]))
    facts, motions = (
        torch.from_numpy(np.stack([of(scene) for scene in scenes])).flatten(1, 2) for of in (cells.facts, cells.motions)
    )
    motions = motions.gather(1, kept[..., None].expand(-1, -1, motions.shape[-1]))
    unnamed, shown = map(torch.from_numpy, pictures.draw(np.random.default_rng([seeds[0], 6]), PICTURES * len(seeds)))
    answers = torch.nonzero(labels.flatten() != IGNORED).flatten()
    return Batch(
        video, facts, motions, unnamed, shown, kept, torch.tensor(prefix), ids, labels, answers, block, positions
    )


def _kept(random: np.random.Generator, scenes: list[Scene], lossy: bool) -> tuple[Tensor, Tensor]:
    """Which visual tokens stay, int64 [clips, M], and their positions, the original ones or renumbered."""
    which = int(random.integers(4)) if lossy else -1
    rows = _without_lines(random, scenes) if which == 3 else _without_frames(random, scenes, which)
    kept = torch.from_numpy(rows)
    renumbered = torch.arange(kept.shape[1]).expand(len(scenes), -1)
    return kept, renumbered if lossy and random.random() < 0.5 else kept


def _without_frames(random: np.random.Generator, scenes: list[Scene], which: int) -> NDArray[np.int64]:
    """What stays of every clip without a border (which = 0), without some frames (1), or without both (2)."""
    frames = scenes[0].frames
    inside = np.flatnonzero(_uncropped(random) if which in (0, 2) else np.ones(TOKENS, np.bool_))
    count = frames - int(random.integers(1, int(LOST * frames) + 1)) if which in (1, 2) else frames
    shown = np.stack([_shown(random, scene, count) for scene in scenes])
    return np.asarray((shown[:, :, None] * TOKENS + inside).reshape(len(scenes), -1))


def _without_lines(random: np.random.Generator, scenes: list[Scene]) -> NDArray[np.int64]:
    """What stays of every clip when each picture loses lines of its own, but in all clips as many."""
    sizes = random.integers(LINES, cells.GRID + 1, (scenes[0].frames, 2))
    return np.stack([_thinned(random, scene, sizes) for scene in scenes])


def _thinned(random: np.random.Generator, scene: Scene, sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Rows and columns of each frame drawn by their numbers [F, 2]; those of the spark stay."""
    kept = []
    for frame, wanted in enumerate(sizes):
        here = scene.spark is not None and scene.spark.frame == frame
        spark = scene.spark.centre if here and scene.spark else random.random(2)
        stays = int(spark[1] * cells.GRID), int(spark[0] * cells.GRID)
        rows, columns = (
            np.sort(np.append(random.permutation(np.delete(np.arange(cells.GRID), line))[: size - 1], line))
            for line, size in zip(stays, wanted, strict=True)
        )
        kept.append((frame * TOKENS + rows[:, None] * cells.GRID + columns).flatten())
    return np.concatenate(kept)


def _uncropped(random: np.random.Generator) -> NDArray[np.bool_]:
    """bool [TOKENS], False on the outermost row or column of one to four sides: little of a thing is there."""
    top, bottom, left, right = random.random(4) < 0.5
    grid = np.ones((cells.GRID, cells.GRID), np.bool_)
    grid[0] &= not top
    grid[-1] &= not bottom
    grid[:, 0] &= not left
    grid[:, -1] &= not right
    return grid.flatten()


def _shown(random: np.random.Generator, scene: Scene, count: int) -> NDArray[np.int64]:
    """`count` frames of a clip, in order. The one with the spark is among them: a question asks for it."""
    order = random.permutation(scene.frames)
    if scene.spark is not None:
        order = np.concatenate(([scene.spark.frame], order[order != scene.spark.frame]))
    return np.sort(order[:count])


class Stream(IterableDataset[Batch]):
    """Endless batches of fresh scenes, short ones until batch `hard`; every worker draws its own."""

    def __init__(self, tokenizer: str, size: int, start: int, hard: int = 0, frames: tuple[int, ...] = FRAMES) -> None:
        self.tokenizer, self.size, self.start, self.hard, self.frames = tokenizer, size, start, hard, frames

    def __iter__(self) -> Iterator[Batch]:
        tokenizer = Tokenizer.from_str(self.tokenizer)
        worker = get_worker_info()
        number, count = (worker.id, worker.num_workers) if worker else (0, 1)
        at = self.start + number
        while True:
            random = np.random.default_rng([at, 5])
            lengths = self.frames[: EASY if at < self.hard else None]
            seeds = [at * self.size + i for i in range(self.size)]
            yield make(tokenizer, "train", seeds, int(random.choice(lengths)), bool(random.random() < 0.5))
            at += count
