"""Which ways to write a decoder TensorRT's builder takes, and which make it run for ever.

    python -m benchmarks.trt_forms make FOLDER           where onnx and onnxruntime are: writes the graphs
    python -m benchmarks.trt_forms run FOLDER --jobs 8   where TensorRT and a GPU are; needs numpy besides

Every graph is built in a process of its own with a time limit, run, and compared with ONNX Runtime's CPU kernels. A
line a graph, and FOLDER/results.json, which is written anew after each: an interrupted run keeps what it found.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np

from dycoke_edge.runtime.trt.versions import Versions, load


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description="Which forms TensorRT builds.")
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser("make")
    p.add_argument("folder", type=Path)
    p.add_argument("--large", action="store_true", help="layers as wide as 0.5B's too, 30 MB each")
    p = many = commands.add_parser("run")
    p.add_argument("folder", type=Path)
    p.add_argument("--limit", type=float, default=60, help="seconds a graph may take")
    p.add_argument("--total", type=float, default=500, help="seconds after which no more graphs are begun")
    p.add_argument("--jobs", type=int, default=8)
    p.add_argument("--match", default="*", help="which graphs, as a file pattern")
    one = commands.add_parser("one")
    one.add_argument("file", type=Path)
    for p in (many, one):
        p.add_argument("--level", type=int, default=3, help="builder_optimization_level")
        p.add_argument("--old-shapes", action="store_true", help="8.6: without FASTER_DYNAMIC_SHAPES_0805")
    args = parser.parse_args()
    if args.command == "make":
        from benchmarks.trt_graphs import make

        print("\n".join(make(args.folder, args.large)))
    elif args.command == "one":
        print(json.dumps(try_one(args.file, args.level, args.old_shapes)))
    else:
        options = ["--level", str(args.level), *(["--old-shapes"] if args.old_shapes else [])]
        run(args.folder, args.match, args.limit, args.total, args.jobs, options)


def run(folder: Path, match: str, limit: float, total: float, jobs: int, options: list[str]) -> None:
    """Try all graphs and print a table."""
    files = sorted(folder.glob(f"{match}.onnx"))
    results, end = dict[str, Any](), time.monotonic() + total
    with ThreadPoolExecutor(jobs) as pool:
        waiting = {pool.submit(_apart, file, limit, end, options): file.stem for file in files}
        for done in as_completed(waiting):
            results[waiting[done]] = done.result()
            print(_line(waiting[done], done.result()), flush=True)
            (folder / "results.json").write_text(json.dumps(dict(sorted(results.items())), indent=1) + "\n")
    print("\nin order:")
    for name in sorted(results):
        print(_line(name, results[name]))


def _apart(file: Path, limit: float, end: float, options: list[str]) -> dict[str, Any]:
    if time.monotonic() > end:
        return {"outcome": "not tried"}
    began = time.monotonic()
    command = [sys.executable, "-m", "benchmarks.trt_forms", "one", str(file), *options]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
    except subprocess.TimeoutExpired:
        return {"outcome": "hangs", "seconds": limit}
    seconds = round(time.monotonic() - began, 1)
    try:
        return {**json.loads(done.stdout.splitlines()[-1]), "seconds": seconds}
    except (ValueError, IndexError):
        last = (done.stderr.strip().splitlines() or [""])[-1]
        return {"outcome": "crashes", "seconds": seconds, "reason": f"code {done.returncode}: {last[:200]}"}


def _line(name: str, result: dict[str, Any]) -> str:
    error = f"{result['error']:.1e}" if "error" in result else ""
    return (
        f"{name:34} {result['outcome']:10} {result.get('seconds', 0):6.1f} s  {error:8} "
        f"{result.get('reason', '')} {result.get('kinds', '')}".rstrip()
    )


# One graph


def try_one(file: Path, level: int = 3, old_shapes: bool = False) -> dict[str, Any]:
    """Build it, run it, compare it."""
    trt, arrays = load(), np.load(file.with_suffix(".npz"))
    builder = trt.builder()
    network = trt.network(builder)
    parser = trt.module.OnnxParser(network, trt.logger)
    if not parser.parse_from_file(str(file)):
        return {"outcome": "unread", "reason": "; ".join(trt.parser_errors(parser))[:300]}
    config = builder.create_builder_config()
    half = any(arrays[key].dtype == np.float16 for key in arrays.files)
    kept, kinds = trt.set_precision(network, config, half), _kinds(network)
    trt.leave_out_cudnn(config)
    config.builder_optimization_level = level
    if old_shapes:
        config.set_preview_feature(trt.module.PreviewFeature.FASTER_DYNAMIC_SHAPES_0805, False)
    profile = builder.create_optimization_profile()
    for key in arrays.files:
        if key.startswith("profile."):
            profile.set_shape(key.removeprefix("profile."), *(tuple(map(int, shape)) for shape in arrays[key]))
    config.add_optimization_profile(profile)
    began = time.monotonic()
    plan = builder.build_serialized_network(network, config)
    told = {"build_seconds": round(time.monotonic() - began, 1), "fp32_layers": kept, "kinds": kinds}
    if plan is None:
        return {"outcome": "refused", "reason": trt.journal.explain("")[:300], **told}
    return {"outcome": "built", "error": _error(trt, plan, arrays), "plan_bytes": memoryview(plan).nbytes, **told}


def _kinds(network: Any) -> dict[str, int]:
    """How many tensors of each type the network says it has: whether a weakly typed one knows of fp16 inside."""
    layers = [network.get_layer(at) for at in range(network.num_layers)]
    return dict(Counter(layer.get_output(at).dtype.name for layer in layers for at in range(layer.num_outputs)))


def _error(trt: Versions, plan: Any, arrays: Any) -> float:
    """The largest relative difference of any output."""
    gpu = Gpu()
    engine = trt.runtime().deserialize_cuda_engine(plan)
    context = trt.context(engine)
    context.set_optimization_profile_async(0, gpu.stream)
    needed = max(trt.scratch_bytes(engine), 1)
    trt.set_scratch(context, gpu.alloc(needed), needed)
    got, worst = dict[str, tuple[int, Any]](), 0.0
    for key in arrays.files:
        side, name = key.split(".", 1)
        if side == "profile":
            continue
        array = np.ascontiguousarray(arrays[key])
        address = gpu.alloc(array.nbytes)
        if side == "in":
            gpu.upload(address, array)
            assert context.set_input_shape(name, array.shape), name
        else:
            got[name] = address, np.empty_like(array)
        assert context.set_tensor_address(name, address), name
    assert context.execute_async_v3(gpu.stream)
    for name, (address, array) in got.items():
        gpu.download(address, array)
        want = arrays[f"out.{name}"].astype(np.float64)
        worst = max(worst, float(np.abs(array - want).max() / (np.abs(want).max() or 1.0)))
    return worst


class Gpu:
    """The CUDA driver through ctypes: no package is needed."""

    def __init__(self) -> None:
        self._cuda = ctypes.CDLL("libcuda.so.1")
        device, context, stream = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_void_p()
        self._call("cuInit", 0)
        self._call("cuDeviceGet", ctypes.byref(device), 0)
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self._call("cuCtxSetCurrent", context)
        self._call("cuStreamCreate", ctypes.byref(stream), 1)
        self.stream = int(stream.value or 0)

    def alloc(self, nbytes: int) -> int:
        """New memory."""
        address = ctypes.c_uint64()
        self._call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(nbytes))
        return address.value

    def upload(self, address: int, array: Any) -> None:
        """Host to GPU; waits."""
        pointer = ctypes.c_void_p(array.ctypes.data)
        self._call("cuMemcpyHtoD_v2", ctypes.c_uint64(address), pointer, ctypes.c_size_t(array.nbytes))

    def download(self, address: int, array: Any) -> None:
        """GPU to host, after all that was asked for."""
        self._call("cuStreamSynchronize", ctypes.c_void_p(self.stream))
        pointer = ctypes.c_void_p(array.ctypes.data)
        self._call("cuMemcpyDtoH_v2", pointer, ctypes.c_uint64(address), ctypes.c_size_t(array.nbytes))

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self._cuda, name)(*arguments)
        assert status == 0, f"{name} failed with {status}"


if __name__ == "__main__":
    main()
