"""Random weights of LLaVA-OneVision, streamed into safetensors files a piece at a time."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from benchmarks.random_files import write_json

DType = Literal["fp32", "fp16"]
Layout = Literal["hub", "v5"]
Names = dict[str, tuple[int, ...]]  # module names, as in transformers 5, and shapes

SHARD_BYTES = 1 << 30
CHUNK = 1 << 23  # values drawn at a time
NUMPY: dict[DType, np.dtype[Any]] = {"fp32": np.dtype(np.float32), "fp16": np.dtype(np.float16)}
SAFETENSORS = {"fp32": "F32", "fp16": "F16"}
GAINS = {"o_proj": 0.3, "down_proj": 3.0, "lm_head": 3.0, "patch_embedding": 2.0}


@dataclass(frozen=True)
class Recipe:
    """What decides all weights and how they are stored. None depends on another weight."""

    seed: int
    dtype: DType
    layout: Layout
    tied: bool
    first_special: int  # output rows from here on are small: special tokens are never generated

    def file_name(self, name: str) -> str:
        """A weight's name in a file. Both have the old prefixes; v5 has no `vision_model`."""
        if name == "lm_head.weight":
            return "language_model.lm_head.weight"
        name = name.removeprefix("model.")
        if self.layout == "hub":
            name = name.replace("vision_tower.", "vision_tower.vision_model.", 1)
        return name.replace("language_model.", "language_model.model.", 1)

    def spread(self, name: str, size: tuple[int, ...]) -> tuple[float, float]:
        """Mean and standard deviation, such that answers vary, attention moves, fp32 is exact."""
        part = name.split(".")[-2]
        if "norm" in part:
            return (1.0, 0.1) if name.endswith("weight") else (0.0, 0.1)
        if name.endswith("bias"):
            return 0.0, 0.3 if part in ("q_proj", "k_proj") else 0.1
        if len(size) == 1 or part == "position_embedding":
            return 0.0, 0.5
        if part == "embed_tokens":  # tied: small, or every token would predict itself
            return 0.0, 1.5 / math.sqrt(size[1]) if self.tied else 1.0
        return 0.0, gain(name, part, size[0], size[-1]) / math.sqrt(math.prod(size[1:]))

    def values(self, name: str, size: tuple[int, ...]) -> Iterator[NDArray[Any]]:
        """A weight in chunks of whole rows, [rows, rest], in the dtype to store."""
        rng = np.random.default_rng([self.seed, zlib.crc32(name.encode())])
        mean, deviation = self.spread(name, size)
        width = math.prod(size[1:])
        step = max(1, CHUNK // width)
        output = name == ("model.language_model.embed_tokens.weight" if self.tied else "lm_head.weight")
        for row in range(0, size[0], step):
            chunk = rng.standard_normal((min(step, size[0] - row), width), dtype=np.float32)
            chunk = np.float32(mean) + np.float32(deviation) * chunk
            if output:
                chunk[max(0, self.first_special - row) :] *= np.float32(0.05)
            yield chunk.astype(NUMPY[self.dtype], copy=False)

    def size_of(self, size: tuple[int, ...]) -> int:
        """Bytes of a weight."""
        return NUMPY[self.dtype].itemsize * math.prod(size)


def gain(name: str, part: str, outputs: int, inputs: int) -> float:
    """Standard deviation of an output for inputs of 1. Wider means deeper and with more heads here.

    Towers that deep would make all tokens alike, the mean of that many heads would hardly move.
    """
    if part in ("fc2", "out_proj"):
        return (4.0 if part == "fc2" else 8.0) / math.sqrt(outputs)
    if part in ("q_proj", "k_proj"):
        return 0.88 * (inputs / 128) ** 0.1 if "language_model" in name else 0.88
    return GAINS.get(part, 1.0)


def write_weights(directory: Path, names: Names, recipe: Recipe, processes: int = 1) -> None:
    """model.safetensors, or numbered shards and their index; the same whatever number of processes draws them."""
    if processes > 1:
        with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
            return _write_weights(directory, names, recipe, pool)
    return _write_weights(directory, names, recipe, None)


def _write_weights(directory: Path, names: Names, recipe: Recipe, pool: Executor | None) -> None:
    parts = shards(names, recipe)
    where: dict[str, str] = {}
    for number, part in enumerate(parts, 1):
        many = f"model-{number:05}-of-{len(parts):05}.safetensors"
        file = many if len(parts) > 1 else "model.safetensors"
        write_shard(directory / file, part, recipe, pool)
        where |= {recipe.file_name(name): file for name in part}
    if len(parts) > 1:
        total = sum(map(recipe.size_of, names.values()))
        index = {"metadata": {"total_size": total}, "weight_map": where}
        write_json(directory / "model.safetensors.index.json", index)


def shards(names: Names, recipe: Recipe) -> list[Names]:
    """Weights split in order into files of at most SHARD_BYTES (or one larger weight)."""
    result: list[Names] = [{}]
    held = 0
    for name, size in names.items():
        if result[-1] and held + recipe.size_of(size) > SHARD_BYTES:
            result.append({})
            held = 0
        result[-1][name] = size
        held += recipe.size_of(size)
    return result


def write_shard(path: Path, names: Names, recipe: Recipe, pool: Executor | None = None) -> None:
    """One safetensors file: length of the header, header (JSON, padded to 8 bytes), raw values, by a pool if given."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, size in names.items():
        begin, end = end, end + recipe.size_of(size)
        kind = SAFETENSORS[recipe.dtype]
        header[recipe.file_name(name)] = {
            "dtype": kind,
            "shape": list(size),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(file.tell() + end)
    start, jobs = 8 + len(text), list[Future[None]]()
    for name, size in names.items():
        if pool is None:
            write_weight(path, start, name, size, recipe)
        else:
            jobs.append(pool.submit(write_weight, path, start, name, size, recipe))
        start += recipe.size_of(size)
    for job in jobs:
        job.result()


def write_weight(path: Path, start: int, name: str, size: tuple[int, ...], recipe: Recipe) -> None:
    """Write one weight's values from byte `start` of a file that is there."""
    with path.open("r+b") as file:
        file.seek(start)
        for chunk in recipe.values(name, size):
            file.write(np.ascontiguousarray(chunk).data)
