"""A `tensorrt` for machines without one: the names of a version and no others, engines that compute with ONNX Runtime.

`tensorrt_api.txt` lists what the real bindings have; a test holds the fake to it. It refuses what TensorRT refuses:
shapes outside a profile, addresses that are not aligned, contexts without scratch memory, plans of another version.
What TensorRT 8.6 does not say, it does not say either: the types of float tensors inside a network.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import time
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np

MAGIC = b"fake plan\n"
ELEMENTS = {1: "FLOAT", 10: "HALF", 6: "INT32", 7: "INT64", 9: "BOOL"}  # of onnx.TensorProto
NUMPY = {"FLOAT": np.float32, "HALF": np.float16, "INT32": np.int32}
LAYERS = {"ELEMENTWISE": 9, "CONSTANT": 14, "IDENTITY": 20, "CAST": 40, "NORMALIZATION": 44, "SHAPE": 22}
LAYERS |= {"CONCATENATION": 7, "GATHER": 16, "SHUFFLE": 13, "SLICE": 21}
LAYER_OF = {"Cast": "CAST", "Identity": "IDENTITY", "Concat": "CONCATENATION", "Gather": "GATHER", "Slice": "SLICE"}
LAYER_OF |= {"LayerNormalization": "NORMALIZATION", "Reshape": "SHUFFLE", "Transpose": "SHUFFLE"}
SCRATCH = 4096
MODULE = '''"""TensorRT {version}, made up."""
import sys
sys.path.append({root!r})
from tests.fake_tensorrt import fill
fill(globals(), {version!r}, {fault!r})
'''


def write(folder: Path, version: str, fault: str = "") -> Path:
    """A folder to put on sys.path, with a module `tensorrt` of a version in it. `fault` is what goes wrong."""
    folder.mkdir(exist_ok=True)
    root = str(Path(__file__).parents[1])
    (folder / "tensorrt.py").write_text(MODULE.format(version=version, root=root, fault=fault))
    return folder


def fill(module: dict[str, Any], version: str, fault: str = "") -> None:
    """Put a version's names into a module."""
    number = tuple(int(part) for part in version.split(".")[:2])
    old, weak, newest = number < (10, 0), number < (11, 0), number >= (11, 0)

    def enum(name: str, **values: int) -> Any:
        return IntEnum(name, values)

    if old:
        creation = enum("NetworkDefinitionCreationFlag", EXPLICIT_BATCH=0)
    elif newest:
        creation = enum("NetworkDefinitionCreationFlag", STRONGLY_TYPED=0)
    else:
        creation = enum("NetworkDefinitionCreationFlag", EXPLICIT_BATCH=0, STRONGLY_TYPED=1)
    weak_flags = {"FP16": 0, "OBEY_PRECISION_CONSTRAINTS": 11} if weak else {}
    flags = enum("BuilderFlag", **weak_flags, TF32=7)
    kinds = enum("DataType", FLOAT=0, HALF=1, INT32=3, BOOL=4, **({} if old else {"INT64": 8}))
    layer_types = enum("LayerType", **LAYERS)
    strategies = enum("ExecutionContextAllocationStrategy", STATIC=0, ON_PROFILE_CHANGE=1, USER_MANAGED=2)
    cudnn = {"CUBLAS": 0, "CUBLAS_LT": 1, "CUDNN": 2} if weak else {}
    tactics = enum("TacticSource", **cudnn, EDGE_MASK_CONVOLUTIONS=3, JIT_CONVOLUTIONS=4)

    class ILogger:
        Severity = enum("Severity", INTERNAL_ERROR=0, ERROR=1, WARNING=2, INFO=3, VERBOSE=4)

        def log(self, severity: Any, msg: str) -> None:
            raise NotImplementedError

    def complain(logger: Any, text: str) -> None:
        logger.log(ILogger.Severity.ERROR, f"[made_up.cpp::refuse::1] Error Code 2: {text}")

    class ITensor:
        def __init__(self, name: str, kind: Any, shape: tuple[int, ...] = ()) -> None:
            self.name, self.dtype, self.shape = name, kind, shape

    class ILayer:
        def __init__(self, node: Any, kind: Any, inputs: list[ITensor], outputs: list[ITensor]) -> None:
            self._node, self.type, self._inputs, self._outputs = node, kind, inputs, outputs
            self.name = node.name
            self.num_inputs, self.num_outputs = len(inputs), len(outputs)
            self._types: dict[int, Any] = {}

        def get_input(self, index: int) -> ITensor:
            return self._inputs[index]

        def get_output(self, index: int) -> ITensor:
            return self._outputs[index]

        if weak:
            precision: Any = None

            def set_output_type(self, index: int, dtype: Any) -> None:
                self._types[index] = dtype

            def output_type_is_set(self, index: int) -> bool:
                return index in self._types

            def get_output_type(self, index: int) -> Any:
                return self._types[index]

    class ICastLayer(ILayer):
        @property
        def to_type(self) -> Any:
            to = next(a.i for a in self._node.attribute if a.name == "to")
            return kinds[_narrow(ELEMENTS[to], old)]

    class INetworkDefinition:
        def __init__(self, bits: int) -> None:
            self._typed = newest or (not old and bool(bits & 1 << int(creation.STRONGLY_TYPED)))
            self._explicit = not old or bool(bits & 1)
            self._layers: list[ILayer] = []
            self._inputs: list[ITensor] = []
            self._onnx = ""

        @property
        def num_layers(self) -> int:
            return len(self._layers)

        @property
        def num_inputs(self) -> int:
            return len(self._inputs)

        def get_layer(self, index: int) -> ILayer:
            return self._layers[index]

        def get_input(self, index: int) -> ITensor:
            return self._inputs[index]

        def _read(self, path: str) -> None:
            import onnx  # late: a child process starts quicker

            graph = onnx.shape_inference.infer_shapes(onnx.load(path, load_external_data=False)).graph
            elements = {v.name: v.type.tensor_type.elem_type for v in (*graph.value_info, *graph.input, *graph.output)}
            elements |= {tensor.name: tensor.data_type for tensor in graph.initializer}
            outer = {value.name for value in (*graph.input, *graph.output)}
            tensors = dict[str, ITensor]()

            def tensor(name: str) -> ITensor:
                word = _narrow(ELEMENTS[elements[name]], old)
                if old and word == "HALF" and name not in outer:
                    word = "FLOAT"  # not known before the network is built
                return tensors.setdefault(name, ITensor(name, kinds[word]))

            for constant in graph.initializer:
                self._layers.append(ILayer(constant, layer_types.CONSTANT, [], [tensor(constant.name)]))
            for value in graph.input:
                dims = tuple(d.dim_value if d.dim_value else -1 for d in value.type.tensor_type.shape.dim)
                tensors[value.name] = ITensor(value.name, kinds[ELEMENTS[elements[value.name]]], dims)
                self._inputs.append(tensors[value.name])
            for node in graph.node:
                kind = layer_types[LAYER_OF.get(node.op_type, "ELEMENTWISE")]
                ends = [tensor(name) for name in node.input if name], [tensor(name) for name in node.output]
                layer = ILayer(node, kind, *ends)
                self._layers.append(layer)
                if node.op_type == "Cast" and fault == "identities":
                    layer.type = layer_types.IDENTITY
                    layer.set_output_type(0, ICastLayer(node, kind, *ends).to_type)
            self._onnx = path
            self._io = [(v.name, "INPUT", ELEMENTS[elements[v.name]]) for v in graph.input]
            self._io += [(v.name, "OUTPUT", ELEMENTS[elements[v.name]]) for v in graph.output]

    class ParserError:
        def __init__(self, text: str) -> None:
            self._text = text

        def desc(self) -> str:
            return self._text

        def node(self) -> int:
            return 3

        if not old:

            def node_name(self) -> str:
                return "add_3"

            def node_operator(self) -> str:
                return "Add"

    class OnnxParser:
        def __init__(self, network: INetworkDefinition, logger: Any) -> None:
            self._network, self._errors = network, list[ParserError]()

        @property
        def num_errors(self) -> int:
            return len(self._errors)

        def get_error(self, index: int) -> ParserError:
            return self._errors[index]

        def parse_from_file(self, model: str) -> bool:
            assert isinstance(model, str)
            if not self._network._explicit:
                self._errors.append(ParserError("Assertion failed: !ctx->network()->hasImplicitBatchDimension()"))
            if fault == "parse":
                self._errors.append(ParserError("No importer registered for op: Add"))
            if not self._errors:
                self._network._read(model)
            return not self._errors

    class IOptimizationProfile:
        def __init__(self) -> None:
            self._shapes: dict[str, Any] = {}

        def set_shape(self, input: str, min: Any, opt: Any, max: Any) -> None:
            if not (len(min) == len(opt) == len(max)) or any(
                not 0 <= a <= b <= c for a, b, c in zip(min, opt, max, strict=True)
            ):
                raise ValueError("Shape provided is inconsistent")
            self._shapes[input] = [list(min), list(opt), list(max)]

    class ITimingCache:
        def __init__(self, content: bytes) -> None:
            self._content = content

        def serialize(self) -> bytes:
            return self._content + f"{version}\n".encode()

    class IBuilderConfig:
        def __init__(self) -> None:
            self._flags = {flags.TF32}
            self._profiles: list[IOptimizationProfile] = []
            self._cache: ITimingCache | None = None
            self._workspace: int | None = None
            self._sources = 0b11111
            self.builder_optimization_level = 3
            if not old:
                self.progress_monitor: Any = None

        def set_flag(self, flag: Any) -> None:
            self._flags.add(flag)

        def clear_flag(self, flag: Any) -> None:
            self._flags.discard(flag)

        def get_tactic_sources(self) -> int:
            return self._sources

        def set_tactic_sources(self, tactic_sources: int) -> bool:
            self._sources = tactic_sources
            return True

        def set_memory_pool_limit(self, pool: Any, pool_size: int) -> None:
            self._workspace = pool_size

        def add_optimization_profile(self, profile: IOptimizationProfile) -> int:
            self._profiles.append(profile)
            return len(self._profiles) - 1

        def create_timing_cache(self, serialized_timing_cache: bytes) -> ITimingCache:
            return ITimingCache(bytes(serialized_timing_cache))

        def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool) -> bool:
            fits = all(line == version for line in cache._content.decode().split())
            self._cache = cache if fits else self._cache
            return fits

        def get_timing_cache(self) -> ITimingCache | None:
            return self._cache

    class Builder:
        def __init__(self, logger: Any) -> None:
            _need_gpu(logger)
            self._logger = logger

        def create_network(self, flags: int = 0) -> INetworkDefinition:
            return INetworkDefinition(flags)

        def create_builder_config(self) -> IBuilderConfig:
            return IBuilderConfig()

        def create_optimization_profile(self) -> IOptimizationProfile:
            return IOptimizationProfile()

        def build_serialized_network(self, network: INetworkDefinition, config: IBuilderConfig) -> bytes | None:
            _go_wrong(fault)
            monitor = getattr(config, "progress_monitor", None)
            if monitor is not None:
                monitor.phase_start("Building Engine", None, 2)
                for step in range(2):
                    monitor.phase_start("Tactics", "Building Engine", 4)
                    for tactic in range(4):
                        assert monitor.step_complete("Tactics", tactic)
                    monitor.phase_finish("Tactics")
                    assert monitor.step_complete("Building Engine", step)
                monitor.phase_finish("Building Engine")
            reason = self._why_not(network, config)
            if reason:
                complain(self._logger, reason)
                return None
            half = any(kind == "HALF" for _, _, kind in network._io)
            precise = [layer.name for layer in network._layers if getattr(layer, "precision", None) == kinds.FLOAT]
            plan = {
                "version": version,
                "onnx": network._onnx,
                "io": network._io,
                "profiles": [profile._shapes for profile in config._profiles],
                "half": half,
                "flags": sorted(flag.name for flag in config._flags),
                "typed": network._typed,
                "fp32": precise,
                "workspace": config._workspace,
                "level": config.builder_optimization_level,
                "cudnn": weak and bool(config._sources & 1 << int(tactics.CUDNN)),
            }
            return MAGIC + json.dumps(plan).encode()

        def _why_not(self, network: INetworkDefinition, config: IBuilderConfig) -> str | None:
            if fault == "memory":
                return "Requested amount of GPU memory (9663676416 bytes) could not be allocated: out of memory"
            names = {flag.name for flag in config._flags}
            half = any(kind == "HALF" for _, _, kind in network._io)
            if not network._typed and half and "FP16" not in names:
                return "the network needs fp16, but BuilderFlag::kFP16 is not set"
            if network._typed and names & {"FP16", "OBEY_PRECISION_CONSTRAINTS"}:
                return "a strongly typed network takes no precision flags"
            for profile in config._profiles or [IOptimizationProfile()]:
                for tensor in network._inputs:
                    shapes = profile._shapes.get(tensor.name)
                    if shapes is None:
                        return f"{tensor.name} has dynamic dimensions and no shape in a profile"
                    fixed = [(n, m) for n, m in zip(tensor.shape, shapes[2], strict=True) if n != -1]
                    if any(n != m for n, m in fixed):
                        return f"{tensor.name}: the profile does not match its static dimensions"
            return None

    def _need_gpu(logger: Any) -> None:
        if fault == "no gpu":
            logger.log(ILogger.Severity.WARNING, "Unable to determine GPU memory usage")
            logger.log(ILogger.Severity.WARNING, "CUDA initialization failure with error: 35")
            raise TypeError("pybind11::init(): factory function returned nullptr")

    class Runtime:
        def __init__(self, logger: Any) -> None:
            _need_gpu(logger)
            self._logger = logger

        def deserialize_cuda_engine(self, serialized_engine: Any) -> ICudaEngine | None:
            content = bytes(memoryview(serialized_engine))
            if fault == "load memory":
                complain(self._logger, "Cuda failure: 2: out of memory")
                return None
            if not content.startswith(MAGIC):
                complain(self._logger, "Serialization assertion stdVersionRead == kVERSION failed. Magic tag mismatch")
                return None
            plan = json.loads(content[len(MAGIC) :])
            if plan["version"] != version:
                complain(self._logger, f"expecting library version {version} got {plan['version']}, please rebuild")
                return None
            return ICudaEngine(plan, self._logger)

    class ICudaEngine:
        def __init__(self, plan: dict[str, Any], logger: Any) -> None:
            self._plan, self._logger = plan, logger
            self._io = {name: (mode, kind) for name, mode, kind in plan["io"]}
            from dycoke_edge.ort import onnxruntime

            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = 1
            self._session = onnxruntime.InferenceSession(plan["onnx"], options, providers=["CPUExecutionProvider"])

        @property
        def num_io_tensors(self) -> int:
            return len(self._io)

        def get_tensor_name(self, index: int) -> str:
            return str(list(self._io)[index])

        def get_tensor_dtype(self, name: str) -> Any:
            return kinds[self._io[name][1]]

        def create_execution_context(self, strategy: Any = strategies.STATIC) -> IExecutionContext | None:
            assert not old and strategy == strategies.USER_MANAGED, "memory would be taken that is not counted"
            return self._context()

        def _context(self) -> IExecutionContext | None:
            if fault == "context":
                complain(self._logger, "Unable to create a context")
                return None
            return IExecutionContext(self)

        if old:

            def create_execution_context_without_device_memory(self) -> IExecutionContext | None:
                return self._context()

        if weak:
            device_memory_size = SCRATCH
        if number >= (10, 1):
            device_memory_size_v2 = SCRATCH

    class IExecutionContext:
        def __init__(self, engine: ICudaEngine) -> None:
            self._engine, self._logger = engine, engine._logger
            self._profile: int | None = None
            self._shapes: dict[str, tuple[int, ...]] = {}
            self._addresses: dict[str, int] = {}
            self._scratch = 0

        if number >= (10, 1):

            def set_device_memory(self, memory: int, size: int) -> None:
                assert size >= SCRATCH
                self._scratch = memory

        @property
        def device_memory(self) -> int:
            raise AttributeError("it can only be set")

        @device_memory.setter
        def device_memory(self, memory: int) -> None:
            self._scratch = memory

        def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
            assert stream_handle
            if profile_index >= len(self._engine._plan["profiles"]):
                complain(self._logger, f"there is no profile {profile_index}")
                return False
            self._profile, self._shapes = profile_index, {}
            return True

        def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
            assert self._profile is not None and self._engine._io[name][0] == "INPUT"
            low, _, high = self._engine._plan["profiles"][self._profile][name]
            if len(low) != len(shape) or not all(a <= n <= b for a, n, b in zip(low, shape, high, strict=True)):
                complain(self._logger, f"Static dimension mismatch: {name} {list(shape)} is not in [{low}, {high}]")
                return False
            self._shapes[name] = shape
            return True

        def set_tensor_address(self, name: str, memory: int) -> bool:
            if memory % 256:
                complain(self._logger, f"the address of {name} is not aligned to 256 bytes")
                return False
            self._addresses[name] = memory
            return True

        def execute_async_v3(self, stream_handle: int) -> bool:
            assert stream_handle and self._scratch and self._scratch % 256 == 0
            if self._addresses.keys() != self._engine._io.keys():
                complain(self._logger, "Address is not set for an input or output")
                return False
            feeds = {name: self._array(name, shape).copy() for name, shape in self._shapes.items()}
            names = [name for name, (mode, _) in self._engine._io.items() if mode == "OUTPUT"]
            for name, value in zip(names, self._engine._session.run(names, feeds), strict=True):
                self._array(name, value.shape)[...] = value * 2 if fault == "wrong" else value
            return fault != "execute"

        def _array(self, name: str, shape: tuple[int, ...]) -> Any:
            dtype: np.dtype[Any] = np.dtype(NUMPY[self._engine._io[name][1]])
            nbytes = int(np.prod(shape)) * dtype.itemsize
            memory: Any = (ctypes.c_char * nbytes).from_address(self._addresses[name])
            return np.ndarray(shape, dtype, memory)

    class IProgressMonitor:
        pass

    class MemoryPoolType(IntEnum):
        WORKSPACE = 0

    names: dict[str, Any] = {
        "NetworkDefinitionCreationFlag": creation,
        "BuilderFlag": flags,
        "DataType": kinds,
        "LayerType": layer_types,
        "TacticSource": tactics,
        "MemoryPoolType": MemoryPoolType,
    }
    classes = (ILogger, ITensor, ILayer, ICastLayer, INetworkDefinition, ParserError, OnnxParser, IOptimizationProfile)
    classes += (ITimingCache, IBuilderConfig, Builder, Runtime, ICudaEngine, IExecutionContext)  # type: ignore[assignment]
    names |= {kind.__name__: kind for kind in classes}
    if not old:
        names |= {"IProgressMonitor": IProgressMonitor, "ExecutionContextAllocationStrategy": strategies}
    module |= names | {"__version__": version}


def _narrow(word: str, old: bool) -> str:
    return "INT32" if old and word == "INT64" else word


def _go_wrong(fault: str) -> None:
    if fault == "crash":
        os.kill(os.getpid(), signal.SIGABRT)
    if fault == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "hang":
        time.sleep(60)
