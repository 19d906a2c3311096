"""What runs the graphs. An engine binds memory it is given and keeps no tensor that outlives a call."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
from numpy.typing import DTypeLike, NDArray

from dycoke_edge.bundle import Bundle
from dycoke_edge.config import EngineSpec, Provider
from dycoke_edge.errors import EngineError
from dycoke_edge.ort import onnxruntime
from dycoke_edge.runtime.gpu.device import Device, DeviceArray

Array = NDArray[Any]
AnyArray: TypeAlias = "NDArray[Any] | DeviceArray"


class Engine(Protocol):
    """Runs a bundle's graphs by name on memory of the caller, as `contract` describes them."""

    provider: Provider

    def load(self, graph: str) -> None:
        """Make a graph ready; nothing if it is."""

    def unload(self, graph: str) -> None:
        """Give a graph's memory back; nothing if it is not loaded."""

    def empty(self, shape: tuple[int, ...], dtype: DTypeLike) -> AnyArray:
        """Memory where graphs compute: what they read and write there is not copied. Its content is anything."""

    def run(self, graph: str, inputs: Mapping[str, AnyArray], outputs: Mapping[str, AnyArray]) -> None:
        """Run a graph. Every array must be contiguous and of the contract's dtype; outputs are written in place, those
        on the host by the time this returns."""

    def synchronize(self) -> None:
        """Wait until all that was asked for is done."""


@runtime_checkable
class OnDevice(Protocol):
    """What an engine with memory of its own offers beside `Engine`; without it, device figures are None."""

    def take_peak_bytes(self) -> int:
        """Most bytes of device memory held since the last call."""


def device_of(engine: Engine) -> Device | None:
    """The GPU that an engine computes on. By name, for an engine may be wrapped in another."""
    device: Device | None = getattr(engine, "device", None)
    return device


class OrtCpuEngine:
    """ONNX Runtime on the CPU, with IO binding on the caller's memory."""

    provider: Provider = "cpu"

    def __init__(self, bundle: Bundle, spec: EngineSpec) -> None:
        self._bundle = bundle
        self._options = session_options(spec.threads)
        if not spec.resident:  # weights stay mapped from the file: a stage opens in 50 ms and closes without a trace
            self._options.add_session_config_entry("session.disable_prepacking", "1")
        self._sessions: dict[str, onnxruntime.InferenceSession] = {}
        self._bindings: dict[str, onnxruntime.IOBinding] = {}

    def load(self, graph: str) -> None:
        """Open a graph."""
        if graph in self._sessions:
            return
        path = self._bundle.graph_path(graph, self.provider)
        try:
            session = self._open(graph, path)
            self._bundle.check_same()  # not while it was opened either
        except EngineError:
            raise
        except Exception as error:  # onnxruntime raises a class of its own per status code
            self._bundle.check_same()  # else that is why
            raise EngineError(f"onnxruntime cannot load {path}: {one_line(error)}; export again") from None
        self._sessions[graph] = session
        self._bindings[graph] = session.io_binding()

    def unload(self, graph: str) -> None:
        """Close a graph and unmap its weights."""
        self._bindings.pop(graph, None)
        self._sessions.pop(graph, None)

    def empty(self, shape: tuple[int, ...], dtype: DTypeLike) -> AnyArray:
        """Host memory."""
        return np.empty(shape, dtype)

    def run(self, graph: str, inputs: Mapping[str, AnyArray], outputs: Mapping[str, AnyArray]) -> None:
        """Run a graph; EngineError if ONNX Runtime fails."""
        self.load(graph)
        binding = self._bindings[graph]
        for name, array in inputs.items():
            binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, _address(array))
        for name, array in outputs.items():
            binding.bind_output(name, "cpu", 0, array.dtype.type, array.shape, _address(array))
        try:
            self._sessions[graph].run_with_iobinding(binding)
        except Exception as error:
            raise EngineError(f"onnxruntime failed in {graph}: {one_line(error)}") from None

    def synchronize(self) -> None:
        """Nothing: `run` waits."""

    def _open(self, graph: str, path: Path) -> onnxruntime.InferenceSession:
        return onnxruntime.InferenceSession(str(path), self._options, providers=["CPUExecutionProvider"])


def open_engine(bundle: Bundle, spec: EngineSpec) -> Engine:
    """The engine asked for, or an error that says what is missing: never another one."""
    if spec.provider == "cuda":
        from dycoke_edge.runtime.gpu.engine import open_cuda

        return open_cuda(bundle, spec)
    if spec.provider == "tensorrt":
        from dycoke_edge.runtime.trt.opened import open_trt

        return open_trt(bundle, spec)
    return OrtCpuEngine(bundle, spec)


def session_options(threads: int) -> onnxruntime.SessionOptions:
    """What every session has in common."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.enable_mem_pattern = False  # patterns are cached per input shape, and every step has a new one
    # spinning threads take a camera app's cores, and cost time too: 106 against 79 ms a token (2 cores, 1.32)
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def one_line(error: Exception) -> str:
    """The beginning of an error's text."""
    return " ".join(str(error).split())[:300]


def _address(array: AnyArray) -> int:
    assert isinstance(array, np.ndarray) and array.flags.c_contiguous
    return int(array.__array_interface__["data"][0])
