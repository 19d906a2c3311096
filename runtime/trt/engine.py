"""TrtEngine: a bundle's graphs as TensorRT plans, on device memory bound by address and on our stream.

All contexts share one scratch memory, the largest that a loaded plan needs: they run one after another. What does not
lie on the device, or not at a multiple of 256 bytes, which TensorRT asks for, is copied to and from memory of ours.
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import DTypeLike

from dycoke_edge import contract
from dycoke_edge.bundle import Bundle
from dycoke_edge.config import Provider
from dycoke_edge.contract import NUMPY, Graph
from dycoke_edge.errors import EngineError
from dycoke_edge.runtime.engine import AnyArray
from dycoke_edge.runtime.gpu.device import Device, DeviceArray
from dycoke_edge.runtime.gpu.staging import Staging
from dycoke_edge.runtime.trt.plan import rebuild
from dycoke_edge.runtime.trt.profiles import Profile, fits
from dycoke_edge.runtime.trt.versions import Versions

ALIGNMENT = 256  # of every tensor's address


class Plans(Protocol):
    """Where plans come from."""

    def file(self, graph: str) -> tuple[Path, list[Profile]]:
        """A graph's plan, known to be whole, and its profiles; EngineError if there is none."""


@dataclass
class _Loaded:
    """A plan in memory. `runtime` has to outlive the engine, the engine its context."""

    runtime: Any
    engine: Any
    context: Any
    scratch_bytes: int
    profiles: list[Profile]
    active: int = 0


class TrtEngine:
    """Plans on a GPU. DeviceArrays are bound where they lie; results are there once `synchronize` returned or a later
    call on the same stream reads them."""

    provider: Provider = "tensorrt"

    def __init__(self, bundle: Bundle, plans: Plans, device: Device, trt: Versions) -> None:
        self.device = device
        self._bundle, self._plans, self._trt = bundle, plans, trt
        self._graphs = {g.name: g for g in contract.graphs(bundle.model, bundle.manifest.merge_ratios)}
        self._loaded: dict[str, _Loaded] = {}
        self._staging = Staging(device, ALIGNMENT)
        self._scratch: DeviceArray | None = None

    def load(self, graph: str) -> None:
        """Read a plan; EngineError if it is missing, damaged, foreign or does not fit the GPU's memory."""
        if graph not in self._loaded:
            file, profiles = self._plans.file(graph)
            self._loaded[graph] = self._open(graph, file, profiles)
            try:
                self._share_scratch()
            except BaseException:
                self.unload(graph)
                raise

    def unload(self, graph: str) -> None:
        """Give a plan's memory back."""
        if graph not in self._loaded:
            return
        self.device.synchronize()  # it may still be running
        loaded = self._loaded.pop(graph)
        loaded.context = loaded.engine = None  # in this order
        self._staging.drop(graph)
        self._share_scratch()

    def empty(self, shape: tuple[int, ...], dtype: DTypeLike) -> DeviceArray:
        """Device memory."""
        return DeviceArray.empty(self.device, shape, dtype)

    def run(self, graph: str, inputs: Mapping[str, AnyArray], outputs: Mapping[str, AnyArray]) -> None:
        """Run a graph; returns before it is done if no output is on the host. EngineError if a shape is not one that
        the plan was built for, or TensorRT fails."""
        self.load(graph)
        loaded = self._loaded[graph]
        self._trt.journal.clear()
        self._choose_profile(graph, loaded, {name: tuple(array.shape) for name, array in inputs.items()})
        results = dict[str, DeviceArray]()
        for name, array in inputs.items():
            place = self._staging.put(graph, name, array)
            self._must(loaded.context.set_input_shape(name, tuple(array.shape)), graph, f"take {name} {array.shape}")
            self._must(loaded.context.set_tensor_address(name, place.address), graph, f"bind {name}")
        for name, array in outputs.items():
            results[name] = self._staging.place(graph, name, array)
            self._must(loaded.context.set_tensor_address(name, results[name].address), graph, f"bind {name}")
        self._must(loaded.context.execute_async_v3(self.device.stream), graph, "run it")
        for name, array in outputs.items():
            self._staging.fetch(array, results[name])

    def synchronize(self) -> None:
        """Wait until the GPU is done."""
        self.device.synchronize()

    def take_peak_bytes(self) -> int:
        """Most bytes of device memory held since the last call, TensorRT's included."""
        return self.device.take_peak_bytes()

    def scratch_bytes(self, graph: str) -> int:
        """Scratch memory that a loaded plan needs."""
        return self._loaded[graph].scratch_bytes

    def close(self) -> None:
        """Give everything back but the device."""
        for graph in tuple(self._loaded):
            self.unload(graph)

    def _open(self, graph: str, file: Path, profiles: list[Profile]) -> _Loaded:
        trt = self._trt
        runtime = trt.runtime()
        trt.journal.clear()
        with file.open("rb") as source, mmap.mmap(source.fileno(), 0, access=mmap.ACCESS_READ) as content:
            engine = runtime.deserialize_cuda_engine(content)
        if engine is None:
            raise self._failed(graph, f"load {file}", rebuild(self._bundle))
        self._check_tensors(self._graphs[graph], engine, file)
        context = trt.context(engine)
        if context is None:
            raise self._failed(graph, f"make a context for {file}", rebuild(self._bundle))
        self._must(context.set_optimization_profile_async(0, self.device.stream), graph, "choose shapes")
        return _Loaded(runtime, engine, context, trt.scratch_bytes(engine), profiles)

    def _check_tensors(self, graph: Graph, engine: Any, file: Path) -> None:
        """A plan's inputs and outputs are those of the contract."""
        names = {engine.get_tensor_name(at) for at in range(engine.num_io_tensors)}
        found = {name: self._trt.numpy_dtype(engine, name) for name in names}
        wanted = {tensor.name: np.dtype(NUMPY[tensor.dtype]) for tensor in (*graph.inputs, *graph.outputs)}
        if found != wanted:
            odd = sorted(found.items() ^ wanted.items(), key=str)[0][0]
            raise EngineError(f"{file} is no plan of {graph.name}: {odd} differs; {rebuild(self._bundle)}")

    def _share_scratch(self) -> None:
        """One scratch memory for all, as large as the largest needs."""
        needed = max((loaded.scratch_bytes for loaded in self._loaded.values()), default=0)
        if needed != (self._scratch.nbytes if self._scratch else 0):
            self.device.synchronize()
            self._scratch = None  # before more is taken
            self._scratch = self.empty((needed,), np.uint8) if needed else None
        if self._scratch:
            for loaded in self._loaded.values():
                self._trt.set_scratch(loaded.context, self._scratch.address, self._scratch.nbytes)

    def _choose_profile(self, graph: str, loaded: _Loaded, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """The first profile that takes these shapes."""
        at = next((at for at, profile in enumerate(loaded.profiles) if fits(profile, shapes)), None)
        if at is None:
            raise EngineError(
                f"{self._too_large(graph, loaded.profiles, shapes)}; build larger: {rebuild(self._bundle)}"
            )
        if at != loaded.active:
            self._must(loaded.context.set_optimization_profile_async(at, self.device.stream), graph, "choose shapes")
            loaded.active = at

    def _too_large(self, graph: str, profiles: list[Profile], shapes: Mapping[str, tuple[int, ...]]) -> str:
        name, (low, _, high) = next(item for item in profiles[-1].items() if not fits(dict([item]), shapes))
        return f"{graph} was built for {name} from {list(low)} to {list(high)}, not {list(shapes[name])}"

    def _must(self, done: bool, graph: str, what: str) -> None:
        if not done:
            self.device.synchronize()  # says so if the GPU is lost
            raise self._failed(graph, what)

    def _failed(self, graph: str, what: str, otherwise: str = "") -> EngineError:
        return EngineError(self._trt.journal.explain(f"TensorRT failed in {graph}, could not {what}", otherwise))
