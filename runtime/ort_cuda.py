"""ONNX Runtime on an NVIDIA GPU: the same graphs, on device memory bound by pointer and on our stream.

What every session is told, and why:
- the stream is ours and a run does not wait for it: what reads the outputs, a kernel or a copy, is ordered on it too
- no node may run on the CPU, but for those that compute shapes in the decoder graphs; without this option a missing
  library means the CPU, and no word of it
- its arena grows by what is asked for: doubling would take what the KV buffer needs
- no TF32: fp32 means fp32; SkipLayerNormalization adds up in fp32, which older versions do only when told
- convolutions (the portable vision graph has one) by cuDNN's heuristic, not by trying every algorithm at each
  new number of frames
Host arrays are copied to memory of our own before a run and from it after: ONNX Runtime would copy them on another
stream, which is not ordered with ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import ClassVar

from numpy.typing import DTypeLike

from dycoke_edge.bundle import Bundle
from dycoke_edge.config import EngineSpec, Provider
from dycoke_edge.errors import EngineError
from dycoke_edge.ort import onnxruntime
from dycoke_edge.runtime.engine import AnyArray, OrtCpuEngine, one_line, session_options
from dycoke_edge.runtime.gpu import libraries
from dycoke_edge.runtime.gpu.device import Device, DeviceArray
from dycoke_edge.runtime.gpu.staging import Staging

CUDA = "CUDAExecutionProvider"
WITH_SHAPES = ("decoder_shallow", "decoder_deep")  # they slice by the number of cached rows, which the CPU computes
OUT_OF_MEMORY = ("out of memory", "Failed to allocate memory", "Available memory of", "CUBLAS_STATUS_ALLOC_FAILED")
DRIVER = "libcuda.so.1"
# In this order from any state, and again whenever pip brought onnxruntime back, which dycoke-edge depends on
INSTALL = "pip uninstall -y onnxruntime && pip install --force-reinstall --no-deps onnxruntime-gpu"
JETPACK = "on JetPack name its own wheel instead of onnxruntime-gpu"


class OrtCudaEngine(OrtCpuEngine):
    """ONNX Runtime's CUDA kernels. DeviceArrays are bound where they lie; results are there once `synchronize` returned
    or a later call on the same stream reads them."""

    provider: Provider = "cuda"
    memory = "cuda"  # what ONNX Runtime calls the memory that DeviceArrays lie in
    on_cuda_only: ClassVar[dict[str, str]] = {"session.disable_cpu_ep_fallback": "1"}

    def __init__(self, bundle: Bundle, spec: EngineSpec, device: Device) -> None:
        super().__init__(bundle, spec)
        self.device = device
        self._staging = Staging(device)
        self._run_options = onnxruntime.RunOptions()
        self._run_options.add_run_config_entry("disable_synchronize_execution_providers", "1")

    def unload(self, graph: str) -> None:
        """Close a graph and give its memory back."""
        if graph in self._sessions:
            self.device.synchronize()  # it may still be running
        super().unload(graph)
        self._staging.drop(graph)

    def empty(self, shape: tuple[int, ...], dtype: DTypeLike) -> DeviceArray:
        """Device memory."""
        return DeviceArray.empty(self.device, shape, dtype)

    def run(self, graph: str, inputs: Mapping[str, AnyArray], outputs: Mapping[str, AnyArray]) -> None:
        """Run a graph; returns before it is done if no output is on the host. EngineError if ONNX Runtime fails."""
        self.load(graph)
        binding, results = self._bindings[graph], dict[str, DeviceArray]()
        for name, array in inputs.items():
            place = self._staging.put(graph, name, array)
            binding.bind_input(name, self.memory, self.device.index, place.dtype.type, place.shape, place.address)
        for name, array in outputs.items():
            place = results[name] = self._staging.place(graph, name, array)
            binding.bind_output(name, self.memory, self.device.index, place.dtype.type, place.shape, place.address)
        try:
            self._sessions[graph].run_with_iobinding(binding, self._run_options)
        except Exception as error:  # onnxruntime raises a class of its own per status code
            raise self._failed(graph, error) from None
        for name, array in outputs.items():
            self._staging.fetch(array, results[name])

    def synchronize(self) -> None:
        """Wait until the GPU is done."""
        self.device.synchronize()

    def take_peak_bytes(self) -> int:
        """Most bytes of device memory held since the last call, ONNX Runtime's and the CUDA libraries' included."""
        return self.device.take_peak_bytes()

    def _open(self, graph: str, path: Path) -> onnxruntime.InferenceSession:
        options = session_options(threads=1)
        options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
        for key, value in self.on_cuda_only.items() if graph not in WITH_SHAPES else ():
            options.add_session_config_entry(key, value)
        try:
            session = onnxruntime.InferenceSession(str(path), options, providers=self._providers())
        except Exception as error:
            raise self._failed(graph, error, f"load {path}") from None
        if session.get_providers()[0] != self._providers()[0][0]:
            raise EngineError(f"onnxruntime-gpu does not use this GPU ({self.device.name}); run: dycoke-edge doctor")
        return session

    def _providers(self) -> list[tuple[str, dict[str, str]]]:
        """The provider and its options."""
        options = {
            "device_id": str(self.device.index),
            "user_compute_stream": str(self.device.stream),
            "arena_extend_strategy": "kSameAsRequested",
            "cudnn_conv_algo_search": "HEURISTIC",
            "use_tf32": "0",
            "enable_skip_layer_norm_strict_mode": "1",
        }
        return [(CUDA, options)]

    def _failed(self, graph: str, error: Exception, doing: str = "run it") -> EngineError:
        """What went wrong, in our words: no memory, a GPU that is lost, or something else."""
        text = one_line(error)
        if any(words in str(error) for words in OUT_OF_MEMORY):
            return EngineError(
                f"the GPU has no memory left for {graph} ({self.device.bytes_in_use / 2**20:,.0f} of "
                f"{self.device.total_bytes / 2**20:,.0f} MiB are ours); use fewer --vision-batch or --kv-capacity"
            )
        self.device.synchronize()  # says so if the GPU is lost
        return EngineError(f"onnxruntime failed in {graph}, could not {doing}: {text}")


def open_device() -> Device:
    """The first GPU; EngineError without cuda-bindings, a driver or a GPU."""
    try:
        from dycoke_edge.runtime.gpu.cuda import CudaDevice
    except ImportError as error:
        raise EngineError(f"a GPU needs {error.name or error}: pip install 'dycoke-edge[gpu]'") from None
    return CudaDevice()


def check_onnxruntime() -> None:
    """EngineError if onnxruntime has no CUDA kernels, or they lack a library."""
    if CUDA not in onnxruntime.get_available_providers():
        raise EngineError(
            f"onnxruntime {onnxruntime.__version__} has no CUDA kernels: "
            + _shadowed()
            + f"; run: {INSTALL} ({JETPACK})"
        )
    kernels = Path(onnxruntime.__file__).parent / "capi" / "libonnxruntime_providers_cuda.so"
    if not kernels.is_file():  # a build of its own, such as JetPack's, that knows where its libraries are
        return
    missing = libraries.load(libraries.needed_by(kernels))
    if missing := [name for name in missing if name != DRIVER]:  # `open_device` says more of it
        raise EngineError(
            f"onnxruntime-gpu {onnxruntime.__version__} needs {', '.join(missing)}, not found here; "
            "run: pip install 'onnxruntime-gpu[cuda,cudnn]', or install CUDA and set LD_LIBRARY_PATH to it"
        )


def _shadowed() -> str:
    """Which of the two packages that own the same files is there."""
    try:
        gpu = version("onnxruntime-gpu")
    except PackageNotFoundError:
        return "the package for the CPU is installed, not onnxruntime-gpu"
    return f"onnxruntime-gpu {gpu} is installed, but the package onnxruntime overwrote its files"
