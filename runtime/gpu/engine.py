"""An engine of our own kernels: the vision encoder is ours, and other graphs are ONNX Runtime's, once one is needed."""

from __future__ import annotations

from collections.abc import Mapping

from numpy.typing import DTypeLike

from dycoke_edge.bundle import Bundle
from dycoke_edge.config import EngineSpec, Provider
from dycoke_edge.runtime import ort_cuda
from dycoke_edge.runtime.engine import AnyArray, Engine
from dycoke_edge.runtime.gpu.device import Device, DeviceArray
from dycoke_edge.runtime.gpu.staging import Staging
from dycoke_edge.runtime.gpu.tower import Tower


class KernelEngine:
    """Results are there once `synchronize` returned or a later call on the same stream reads them. onnxruntime-gpu is
    needed for the decoder graphs (--decoder graphs) and for merge graphs that the kernels do not cover."""

    provider: Provider = "cuda"

    def __init__(self, bundle: Bundle, spec: EngineSpec, device: Device) -> None:
        self.device = device
        self._bundle, self._spec = bundle, spec
        self._staging = Staging(device, alignment=16)
        self._tower: Tower | None = None
        self._graphs: ort_cuda.OrtCudaEngine | None = None

    def load(self, graph: str) -> None:
        """Upload the tower's weights, or open a graph."""
        if graph != "vision":
            self._others().load(graph)
        elif self._tower is None:
            self._tower = Tower(self.device, self._bundle)

    def unload(self, graph: str) -> None:
        """Give weights and scratch memory back."""
        if graph != "vision":
            self._others().unload(graph)
        elif self._tower is not None:
            self._tower = None
            self._staging.drop(graph)

    def empty(self, shape: tuple[int, ...], dtype: DTypeLike) -> DeviceArray:
        """Device memory."""
        return DeviceArray.empty(self.device, shape, dtype)

    def run(self, graph: str, inputs: Mapping[str, AnyArray], outputs: Mapping[str, AnyArray]) -> None:
        """As in Engine; returns before it is done if no output is on the host."""
        if graph != "vision":
            self._others().run(graph, inputs, outputs)
            return
        self.load(graph)
        assert self._tower is not None
        tokens = outputs["tokens"]
        place = self._staging.place(graph, "tokens", tokens)
        self._tower.run(self._staging.put(graph, "pixels", inputs["pixels"]), place)
        self._staging.fetch(tokens, place)

    def synchronize(self) -> None:
        """Wait until the GPU is done."""
        self.device.synchronize()

    def take_peak_bytes(self) -> int:
        """Most bytes of device memory held since the last call, the CUDA libraries' included."""
        return self.device.take_peak_bytes()

    def _others(self) -> ort_cuda.OrtCudaEngine:
        if self._graphs is None:
            ort_cuda.check_onnxruntime()
            self._graphs = ort_cuda.OrtCudaEngine(self._bundle, self._spec, self.device)
        return self._graphs


def open_cuda(bundle: Bundle, spec: EngineSpec) -> Engine:
    """The engine for --provider cuda, or an EngineError that says what this machine lacks for what is asked."""
    if spec.seeing == "graph" or spec.decoding == "graphs":
        ort_cuda.check_onnxruntime()
    device = ort_cuda.open_device()
    return (KernelEngine if spec.seeing == "kernels" else ort_cuda.OrtCudaEngine)(bundle, spec, device)
