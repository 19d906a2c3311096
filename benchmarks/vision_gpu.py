"""The vision tower on a GPU: own kernels, the bundle's graphs under ONNX Runtime and transformers with SDPA, in turns.

    python -m benchmarks.vision_gpu --checkpoint DIR --bundle DIR --export-json benchmarks/results/vision_gpu.json
    python -m benchmarks.vision_gpu --provider cpu --tiny       # a dry run

Without --checkpoint and --bundle a random model of the LLaVA-OneVision 0.5B shape, fp16, with 2 decoder layers, is made
and exported under build/ first. Prints, on stderr, milliseconds for all frames at every batch size (medians), the
distance to transformers, and where the time of the fastest goes, by operator and by kernel; on stdout a JSON line.
Pixels lie on the GPU before the clock starts, but for "encode", which is the runtime's own way from uint8 frames.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from benchmarks.environment import stamp
from benchmarks.models import prepare
from benchmarks.ort_profile import by_kernel, by_operator
from dycoke_edge.bundle import Bundle, open_bundle
from dycoke_edge.config import EngineSpec, Provider
from dycoke_edge.runtime import visual
from dycoke_edge.runtime.engine import Engine, OrtCpuEngine
from dycoke_edge.runtime.gpu.device import Device
from dycoke_edge.runtime.gpu.engine import KernelEngine
from dycoke_edge.runtime.ort_cuda import OrtCudaEngine, check_onnxruntime, open_device
from dycoke_edge.runtime.synthetic import moving_patch
from dycoke_edge.runtime.video import to_pixels

Array = NDArray[Any]
BATCHES = (1, 4, 8, 16, 32)
TORCH, OURS, KERNELS = "transformers SDPA", "vision_cuda", "own kernels"
# name -> the form of the graph, and options of the provider. sdpa_kernel: 1 flash, 2 memory-efficient, 8 cuDNN
SESSIONS: dict[str, tuple[Provider, dict[str, str]]] = {
    "portable": ("cpu", {}),
    "vision_trt": ("tensorrt", {}),
    OURS: ("cuda", {}),
    f"{OURS} flash": ("cuda", {"sdpa_kernel": "1"}),
    f"{OURS} efficient": ("cuda", {"sdpa_kernel": "2"}),
    f"{OURS} cudnn": ("cuda", {"sdpa_kernel": "8"}),
}
people = Console(stderr=True, soft_wrap=True, highlight=False, width=130)


class OnGpu(OrtCudaEngine):
    """The runtime's engine with other provider options."""

    def __init__(self, bundle: Bundle, device: Device, form: Provider, options: dict[str, str]) -> None:
        super().__init__(bundle, EngineSpec("cuda"), device)
        self.provider, self.options = form, options

    def _providers(self) -> list[tuple[str, dict[str, str]]]:
        ((name, options),) = super()._providers()
        return [(name, options | self.options)]


class OnCpu(OrtCpuEngine):
    """For the dry run: ONNX Runtime's CPU kernels take every form."""

    def __init__(self, bundle: Bundle, form: Provider) -> None:
        super().__init__(bundle, EngineSpec())
        self.provider = form


class Graph:
    """One form of the vision graph on pixels that are there already."""

    def __init__(self, engine: Engine, bundle: Bundle, pixels: Array) -> None:
        model = bundle.model
        self.engine = engine
        self.pixels = engine.empty(pixels.shape, pixels.dtype)
        self.pixels[...] = pixels
        self.tokens = engine.empty((len(pixels), model.tokens_per_frame, model.hidden_size), model.numpy_dtype)

    def start(self, batch: int) -> None:
        """Encode all frames, `batch` at a time."""
        for begin in range(0, len(self.pixels), batch):
            part = slice(begin, begin + batch)
            self.engine.run("vision", {"pixels": self.pixels[part]}, {"tokens": self.tokens[part]})

    def wait(self) -> None:
        """Until it is done."""
        self.engine.synchronize()

    def result(self) -> Array:
        """Tokens on the host."""
        return np.asarray(self.tokens)


class Frames(Graph):
    """The runtime's own way, from uint8 frames on the host."""

    def __init__(self, engine: Engine, bundle: Bundle, frames: NDArray[np.uint8]) -> None:
        self.engine, self.bundle, self.frames = engine, bundle, frames

    def start(self, batch: int) -> None:
        """As VideoLLM does."""
        self.tokens = visual.encode(self.bundle, self.engine, self.frames, batch)


class Torch:
    """transformers' own tower, projector and pooling, SDPA attention."""

    def __init__(self, checkpoint: Path, pixels: Array, device: str) -> None:
        import torch
        from transformers import LlavaOnevisionForConditionalGeneration

        load: Any = LlavaOnevisionForConditionalGeneration.from_pretrained
        self.torch, self.pixels = torch, torch.from_numpy(pixels).to(device)
        self.model = load(checkpoint, dtype=self.pixels.dtype, attn_implementation="sdpa").model.to(device).eval()
        self.tokens: list[Any] = []

    def start(self, batch: int) -> None:
        """Encode all frames, `batch` at a time."""
        with self.torch.no_grad():
            starts = range(0, len(self.pixels), batch)
            self.tokens = [self._features(self.pixels[start : start + batch]) for start in starts]

    def wait(self) -> None:
        """Until it is done."""
        if self.pixels.device.type == "cuda":
            self.torch.cuda.synchronize()

    def result(self) -> Array:
        """Tokens on the host."""
        whole: Array = self.torch.cat(self.tokens).float().cpu().numpy()
        return whole

    def _features(self, pixels: Any) -> Any:
        """[B, N, E], without the newline that some versions append."""
        found = self.model.get_video_features(pixels[None])
        found = getattr(found, "pooler_output", found)
        flat = found.reshape(-1, found.shape[-1])
        return flat[: len(flat) // len(pixels) * len(pixels)].reshape(len(pixels), -1, flat.shape[-1])


Contestant = Graph | Torch


def contestants(args: argparse.Namespace, checkpoint: Path, bundle: Bundle) -> dict[str, Contestant]:
    """All sides, loaded, in the order they alternate."""
    model, manifest = bundle.model, bundle.manifest
    frames = moving_patch(args.frames, model.image_size)
    pixels = to_pixels(frames, manifest.image_mean, manifest.image_std).astype(model.numpy_dtype)
    found: dict[str, Contestant] = {}
    if not args.no_torch:
        found[TORCH] = Torch(checkpoint, pixels, args.provider)
    if args.provider == "cuda":
        device = open_device()
        engines: dict[str, Engine] = {KERNELS: KernelEngine(bundle, EngineSpec("cuda"), device)}
        if not args.no_graphs:
            check_onnxruntime()
            engines |= {name: OnGpu(bundle, device, *said) for name, said in SESSIONS.items()}
    else:
        engines = {name: OnCpu(bundle, form) for name, (form, options) in SESSIONS.items() if not options}
    found |= {name: Graph(engine, bundle, pixels) for name, engine in engines.items()}
    return found | {"encode": Frames(engines[KERNELS if KERNELS in engines else OURS], bundle, frames)}


def measure(sides: dict[str, Contestant], batches: list[int], rounds: int) -> dict[str, dict[int, float]]:
    """Median seconds for all frames. The order turns with every round; a side that fails is left out, and said so."""
    times: dict[str, dict[int, list[float]]] = {name: {batch: [] for batch in batches} for name in sides}
    for number in range(-2, rounds):  # two to warm up
        for batch in batches:
            for name in list(times)[:: -1 if number % 2 else 1]:
                try:
                    seconds = timed(sides[name], batch)
                except Exception as error:
                    people.print(f"{name} failed at {batch} frames: {' '.join(str(error).split())[:300]}")
                    del times[name]
                    continue
                if number >= 0:
                    times[name][batch].append(seconds)
    return {name: {batch: median(found) for batch, found in by.items()} for name, by in times.items()}


def timed(side: Contestant, batch: int) -> float:
    """Seconds of one pass over the frames."""
    side.wait()
    began = perf_counter()
    side.start(batch)
    side.wait()
    return perf_counter() - began


def distances(sides: dict[str, Contestant], batch: int) -> dict[str, float]:
    """max |a - b| over max |b|, b being torch's tokens, or the first side's without torch."""
    results = {}
    for name, side in sides.items():
        side.start(batch)
        side.wait()
        results[name] = side.result().astype(np.float64)
    want = results[TORCH if TORCH in results else next(iter(results))]
    return {name: float(np.abs(got - want).max() / np.abs(want).max()) for name, got in results.items()}


def flops(bundle: Bundle, checkpoint: Path, frames: int) -> float:
    """Multiplications and additions of the tower and the projector."""
    config = json.loads((checkpoint / "config.json").read_text())
    vision = config["vision_config"]
    wide, deep, narrow = vision["hidden_size"], vision["intermediate_size"], bundle.model.hidden_size
    patches = (vision["image_size"] // vision["patch_size"]) ** 2
    layer = patches * (4 * wide * wide + 2 * wide * deep) + 2 * patches * patches * wide
    ends = patches * (3 * vision["patch_size"] ** 2 * wide + wide * narrow + narrow * narrow)
    return float(2 * frames * (vision["num_hidden_layers"] * layer + ends))


def show(found: dict[str, Any]) -> None:
    """The tables for people."""
    table = Table(title=f"milliseconds for {found['frames']} frames, by frames a batch", box=None, title_justify="left")
    batches = found["batches"]
    for column in ("side", *map(str, batches), "best to torch", "TFLOP/s", "distance"):
        table.add_column(column, justify="left" if column == "side" else "right", no_wrap=True)
    rival = min(found["seconds"].get(TORCH, {0: float("nan")}).values())
    for name, by in found["seconds"].items():
        best = min(by.values())
        ends = [f"{best / rival:.2f}", f"{found['flops'] / best / 1e12:.1f}", f"{found['distance'][name]:.1e}"]
        table.add_row(name, *(f"{by[batch] * 1e3:.1f}" for batch in batches), *ends)
    people.print(table)
    for what in ("by_operator", "by_kernel"):
        people.print(f"{what.replace('_', ' ')}: {json.dumps(found.get(what))}")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Everything that is printed."""
    if args.tiny:
        checkpoint, folder = prepare("tiny", args.checkpoint, args.bundle, dtype=args.dtype)
    else:
        checkpoint, folder = prepare("0.5b", args.checkpoint, args.bundle, layers=2, dtype=args.dtype)
    bundle = open_bundle(folder)
    sides = contestants(args, checkpoint, bundle)
    batches = [batch for batch in args.batches if batch <= args.frames]
    seconds = measure(sides, batches, args.rounds)
    sides = {name: side for name, side in sides.items() if name in seconds}
    found: dict[str, Any] = {
        "benchmark": "vision_gpu",
        **{name: value for name, value in vars(args).items() if name != "export_json"},
        **{"checkpoint": checkpoint.name, "bundle": folder.name, "batches": batches},
        "environment": stamp(),
        "flops": flops(bundle, checkpoint, args.frames),
        "seconds": seconds,
        "distance": distances(sides, batches[-1]),
    }
    name = OURS if OURS in sides else KERNELS
    ours, best = sides[name], min(seconds[name], key=lambda batch: seconds[name][batch])
    assert isinstance(ours, Graph)

    def once() -> None:
        ours.start(best)
        ours.wait()

    found["by_kernel"] = {"batch": best, **by_kernel(once)} if not args.no_torch else None
    if isinstance(ours.engine, OrtCpuEngine):
        clock, spent = by_operator(ours.engine, "vision", once)
        found["by_operator"] = {"batch": best, "clock": clock, "milliseconds": spent}
    return found


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--provider", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a tower of 3 small layers, to see that this runs")
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--dtype", choices=("fp16", "fp32"), default="fp16")
    parser.add_argument("--frames", type=int, default=32)
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--no-torch", action="store_true", help="leave transformers out, where torch is not there")
    parser.add_argument("--no-graphs", action="store_true", help="own kernels only, where onnxruntime-gpu is not there")
    parser.add_argument("--export-json", type=Path)
    args = parser.parse_args()
    found = run(args)
    show(found)
    line = json.dumps(found, default=str)
    if args.export_json:
        args.export_json.write_text(json.dumps(found, indent=2, default=str) + "\n")
    print(line)


if __name__ == "__main__":
    main()
