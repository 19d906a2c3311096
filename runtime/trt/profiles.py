"""The shapes that a plan is made for. A decoder graph has two profiles: one token, and a chunk of a prompt."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TypeAlias

from dycoke_edge.config import BuildSpec
from dycoke_edge.contract import Graph

Shape: TypeAlias = tuple[int, ...]
Range: TypeAlias = tuple[Shape, Shape, Shape]  # the smallest, the one that is made fast, the largest
Profile: TypeAlias = dict[str, Range]  # of each input
Letters: TypeAlias = Mapping[str, tuple[int, int, int]]


def profiles(graph: Graph, spec: BuildSpec) -> list[Profile]:
    """What a graph is built for."""
    return [{t.name: _ranges(t.shape, letters) for t in graph.inputs} for letters in _letters(graph.name, spec)]


def fits(profile: Profile, shapes: Mapping[str, Shape]) -> bool:
    """Whether every input's shape lies within a profile."""
    return all(
        len(shapes[name]) == len(low) and all(a <= n <= b for a, n, b in zip(low, shapes[name], high, strict=True))
        for name, (low, _, high) in profile.items()
    )


def largest(profile: Profile, graph: Graph) -> dict[str, int]:
    """Letter -> the most of it that a profile takes."""
    return {
        letter: profile[t.name][2][at]
        for t in graph.inputs
        if t.name in profile
        for at, letter in enumerate(t.shape)
        if isinstance(letter, str)
    }


def _letters(name: str, spec: BuildSpec) -> Iterator[Letters]:
    if not name.startswith("decoder"):
        batch = spec.vision_batch
        # frames come in full batches, pairs one by one
        yield {"F": (1, batch, batch), "B": (1, 1, batch)}
        return
    rows = (1, min(spec.usual_rows, spec.kv_capacity), spec.kv_capacity)
    yield {"S": rows, "T": (1, 1, 1), "S+T": _sum(rows, (1, 1, 1))}
    chunk = (1, spec.prefill_chunk, spec.prefill_chunk)
    yield {"S": rows, "T": chunk, "S+T": _sum(rows, chunk)}


def _sum(a: tuple[int, int, int], b: tuple[int, int, int]) -> tuple[int, int, int]:
    return a[0] + b[0], a[1] + b[1], a[2] + b[2]


def _ranges(shape: tuple[int | str, ...], letters: Letters) -> Range:
    low, usual, high = (tuple(n if isinstance(n, int) else letters[n][at] for n in shape) for at in range(3))
    return low, usual, high
