"""An engine of our own kernels, for vision and merge; other graphs are ONNX Runtime's, once one is needed."""

from __future__ import annotations

from collections.abc import Mapping

from numpy.typing import DTypeLike

from dycoke_edge.bundle import Bundle
from dycoke_edge.config import EngineSpec, Provider
from dycoke_edge.runtime import ort_cuda
from dycoke_edge.runtime.engine import AnyArray, Engine
from dycoke_edge.runtime.gpu import merge
from dycoke_edge.runtime.gpu.device import Device, DeviceArray
from dycoke_edge.runtime.gpu.staging import Staging
from dycoke_edge.runtime.gpu.tower import Tower


class KernelEngine:
    """Results are there once `synchronize` returned or a later call on the same stream reads them. onnxruntime-gpu is
    needed for the decoder graphs (--decoder graphs), and for merge graphs of frames that the kernels do not cover."""

    provider: Provider = "cuda"

    def __init__(self, bundle: Bundle, spec: EngineSpec, device: Device) -> None:
        """BundleError for a bundle that does not say where the vision encoder's weights lie."""
        model = bundle.model
        bundle.vision_table()
        self.device = device
        self._bundle, self._spec = bundle, spec
        self._merges = merge.covers(model.tokens_per_frame, model.hidden_size, model.numpy_dtype)
        self._staging = Staging(device, alignment=16)
        self._tower: Tower | None = None
        self._graphs: ort_cuda.OrtCudaEngine | None = None

    def load(self, graph: str) -> None:
        """Upload the tower's weights, or open a graph."""
        if graph == "vision":
            self._tower = self._tower or Tower(self.device, self._bundle)
        elif not self._own(graph):
            self._others().load(graph)

    def unload(self, graph: str) -> None:
        """Give weights and scratch memory back."""
        if graph == "vision":
            self._tower = None
        elif self._graphs is not None:
            self._graphs.unload(graph)
        self._staging.drop(graph)

    def empty(self, shape: tuple[int, ...], dtype: DTypeLike) -> DeviceArray:
        """Device memory."""
        return DeviceArray.empty(self.device, shape, dtype)

    def run(self, graph: str, inputs: Mapping[str, AnyArray], outputs: Mapping[str, AnyArray]) -> None:
        """As in Engine; returns before it is done if no output is on the host and the graph is not merge's."""
        if not self._own(graph):
            self._others().run(graph, inputs, outputs)
            return
        placed = {name: self._staging.put(graph, name, array) for name, array in inputs.items()}
        if graph == "vision":
            self._encode(placed["pixels"], outputs["tokens"])
            return
        kept, index = merge.merge_pairs(placed["reference"], placed["frame"], outputs["kept"].shape[1])
        outputs["kept"][...], outputs["index"][...] = kept, index

    def synchronize(self) -> None:
        """Wait until the GPU is done."""
        self.device.synchronize()

    def take_peak_bytes(self) -> int:
        """Most bytes of device memory held since the last call, the CUDA libraries' included."""
        return self.device.take_peak_bytes()

    def _own(self, graph: str) -> bool:
        """The kernels do what this graph does."""
        return graph == "vision" or (self._merges and graph.startswith("merge_"))

    def _encode(self, pixels: DeviceArray, tokens: AnyArray) -> None:
        self.load("vision")
        assert self._tower is not None
        place = self._staging.place("vision", "tokens", tokens)
        self._tower.run(pixels, place)
        self._staging.fetch(tokens, place)

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
