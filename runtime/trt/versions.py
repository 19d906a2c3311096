"""Every difference between TensorRT 8.6 and 11 that concerns us.

| what                     | 8.6                            | 10.0 to 10.16             | 11                       |
|--------------------------|--------------------------------|---------------------------|--------------------------|
| batch dimension          | EXPLICIT_BATCH must be set     | flag is there, ignored    | the flag is gone         |
| precision                | FP16 flag, fp32 layers named   | STRONGLY_TYPED: the graph's types, no flags          |
| TF32                     | on unless cleared              | on unless cleared         | on unless cleared        |
| int64 in graphs          | made int32                     | int64                     | int64                    |
| progress, stopping       | none                           | IProgressMonitor          | IProgressMonitor         |
| a parser error's node    | its number only                | name and operator too     | name and operator too    |
| cuDNN tactics            | can be on                      | off unless asked for      | gone                     |
| context without scratch  | ..._without_device_memory()    | USER_MANAGED              | USER_MANAGED             |
| size of the scratch      | device_memory_size             | same; _v2 from 10.1       | device_memory_size_v2    |
| setting the scratch      | the property device_memory     | set_device_memory from 10.1, with the size           |

What is there is asked of the module, not concluded from its number: the same code runs on 9 and 10.0. Our graphs have
int32 inputs and outputs only (`contract`), so int64 concerns constants alone. Checked against the bindings of 8.6.0,
10.0.1, 10.3.0, 10.13.3, 10.16.1, 11.0.0 and 11.4.0.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import numpy as np

from dycoke_edge.errors import EngineError
from dycoke_edge.runtime.trt.journal import Journal
from dycoke_edge.runtime.trt.phases import Phases

OLDEST = (8, 6)
INSTALL = "on a Jetson install JetPack 6 or newer, elsewhere pip install 'dycoke-edge[tensorrt]'"
Progress = Callable[[float], None]  # share of 1


class Versions:
    """The installed TensorRT, with one spelling for all versions. `module` is `tensorrt` itself."""

    def __init__(self, module: Any) -> None:
        """EngineError if the version is too old."""
        self.module = module
        self.version: str = module.__version__
        if self.number < OLDEST:
            raise EngineError(f"TensorRT {self.version} is too old, 8.6 is the oldest that works: {INSTALL}")
        self.journal = Journal()
        self.logger = _logger(module, self.journal)  # TensorRT keeps the first logger of a process, for everything

    @property
    def number(self) -> tuple[int, ...]:
        """(8, 6) of "8.6.2.3"."""
        return tuple(int(part) for part in self.version.split(".")[:2])

    @property
    def strongly_typed(self) -> bool:
        """Whether a network can have the types that its graph says, or must be told layer by layer."""
        return hasattr(self.module.NetworkDefinitionCreationFlag, "STRONGLY_TYPED")

    @property
    def can_be_watched(self) -> bool:
        """Whether a build says how far it is."""
        return hasattr(self.module, "IProgressMonitor")

    # Building

    def builder(self) -> Any:
        """EngineError if there is none, e.g. without a GPU."""
        return self._made("builder", lambda: self.module.Builder(self.logger))

    def network(self, builder: Any) -> Any:
        """An empty network for graphs with a batch dimension of their own and, where it can be, types of their own."""
        flags, bits = self.module.NetworkDefinitionCreationFlag, 0
        for name in ("EXPLICIT_BATCH", "STRONGLY_TYPED"):
            if hasattr(flags, name):
                bits |= 1 << int(getattr(flags, name))  # numbers differ between versions, and so does what bit 1 means
        return builder.create_network(bits)

    def set_precision(self, network: Any, config: Any, half: bool) -> int:
        """fp32 is never TF32. A weakly typed network of an fp16 graph may use fp16, but not in the layers that the
        graph computes in fp32; returns how many these are, 0 for a strongly typed network."""
        flags = self.module.BuilderFlag
        config.clear_flag(flags.TF32)
        if self.strongly_typed or not half:
            return 0
        config.set_flag(flags.FP16)
        config.set_flag(flags.OBEY_PRECISION_CONSTRAINTS)
        return sum(self._keep_fp32(layer) for layer in _fp32_layers(network, self.module))

    def _keep_fp32(self, layer: Any) -> bool:
        kinds = self.module.DataType
        layer.precision = kinds.FLOAT
        for at in range(layer.num_outputs):
            if layer.get_output(at).dtype in (kinds.FLOAT, kinds.HALF):
                layer.set_output_type(at, kinds.FLOAT)
        return True

    def leave_out_cudnn(self, config: Any) -> None:
        """Our graphs are matrix products, which cuDNN has none of; so it need not be installed."""
        sources = self.module.TacticSource
        if hasattr(sources, "CUDNN"):
            config.set_tactic_sources(config.get_tactic_sources() & ~(1 << int(sources.CUDNN)))

    def watch(self, config: Any, progress: Progress) -> None:
        """Say how far a build is. Without IProgressMonitor nothing is said before it is done."""
        if self.can_be_watched:
            config.progress_monitor = _monitor(self.module, progress)

    def parser_errors(self, parser: Any) -> list[str]:
        """What a parser could not read."""
        return [_told(parser.get_error(i)) for i in range(parser.num_errors)]

    # Running

    def runtime(self) -> Any:
        """EngineError if there is none, e.g. without a GPU."""
        return self._made("runtime", lambda: self.module.Runtime(self.logger))

    def context(self, engine: Any) -> Any:
        """An execution context whose scratch memory is ours to give; None if TensorRT cannot make one."""
        strategies = getattr(self.module, "ExecutionContextAllocationStrategy", None)
        if strategies is None:
            return engine.create_execution_context_without_device_memory()
        return engine.create_execution_context(strategies.USER_MANAGED)

    def scratch_bytes(self, engine: Any) -> int:
        """Scratch memory that a context of this engine needs, whatever the profile."""
        name = "device_memory_size_v2" if hasattr(engine, "device_memory_size_v2") else "device_memory_size"
        return int(getattr(engine, name))

    def set_scratch(self, context: Any, address: int, nbytes: int) -> None:
        """Give a context its scratch memory, aligned to 512 bytes."""
        if hasattr(context, "set_device_memory"):
            context.set_device_memory(address, nbytes)
        else:
            context.device_memory = address

    def numpy_dtype(self, engine: Any, tensor: str) -> np.dtype[Any]:
        """The element type of an input or output."""
        name = engine.get_tensor_dtype(tensor).name
        return np.dtype({"FLOAT": "f4", "HALF": "f2", "INT32": "i4", "INT64": "i8", "BOOL": "?"}.get(name, "V1"))

    def _made(self, what: str, make: Callable[[], Any]) -> Any:
        self.journal.clear()
        try:
            return make()
        except TypeError:  # pybind11: the factory function returned nullptr
            raise EngineError(self.journal.explain(f"TensorRT {self.version} makes no {what}")) from None


@functools.cache
def load() -> Versions:
    """The installed TensorRT; EngineError if there is none that works."""
    try:
        module = importlib.import_module("tensorrt")
    except ImportError as error:
        if error.name == "tensorrt":
            raise EngineError(f"TensorRT is not installed: {INSTALL}") from None
        raise EngineError(f"TensorRT cannot be loaded ({error}): {INSTALL}") from None
    except OSError as error:  # its own loader: a library that is not there
        raise EngineError(f"TensorRT cannot be loaded ({error}): {INSTALL}") from None
    if not hasattr(module, "__version__"):
        raise EngineError(f"{module.__path__} is not TensorRT; rename it: it hides the module `tensorrt`")
    return Versions(module)


# Layers that compute nothing, so that precision is nothing to them: told to give fp32, 8.6.0 finds no implementation
# where it reads their input as fp16 ("mismatched type, f16 vs. expected f32", of the mask's Shuffle).
# And norms, which sum in fp32 unless told otherwise: told so, 8.6 makes the whole block that they are fused into fp32
# (a SigLIP tower of 26 layers on an H200: 504 ms for 32 frames and a plan of 1.6 GB; now 60 ms and 0.8 GB).
UNTOLD = ("CONCATENATION", "CONSTANT", "GATHER", "IDENTITY", "NORMALIZATION", "SHAPE", "SHUFFLE", "SLICE")


def _fp32_layers(network: Any, trt: Any) -> list[Any]:
    """The layers that a weakly typed network must be told to compute in fp32: what lies between a cast to fp32 and one
    from it and is not of UNTOLD. TensorRT 8.6 does not say which type a tensor has in between; types are followed."""
    kinds = trt.DataType
    untold = {getattr(trt.LayerType, name) for name in UNTOLD}
    of: dict[str, Any] = {}  # float type of each tensor; none for constants, which take the type of what they meet
    for at in range(network.num_inputs):
        of[network.get_input(at).name] = network.get_input(at).dtype
    found = []
    for at in range(network.num_layers):
        layer = network.get_layer(at)
        inputs = [layer.get_input(i) for i in range(layer.num_inputs)]
        known = [of[tensor.name] for tensor in inputs if tensor is not None and tensor.name in of]
        floats = [kind for kind in known if kind in (kinds.FLOAT, kinds.HALF)]
        cast = _cast_to(layer, trt)
        kind = cast if cast is not None else floats[0] if floats else known[0] if known else None
        computes = cast is None and layer.type not in untold and any(map(_is_float(kinds), _outputs(layer)))
        if kind == kinds.FLOAT and computes:
            found.append(layer)
        for tensor in _outputs(layer):
            if kind is not None:
                of[tensor.name] = kind if _is_float(kinds)(tensor) else tensor.dtype
    return found


def _cast_to(layer: Any, trt: Any) -> Any:
    """What a cast casts to, None for any other layer. The parser of 8.5 wrote casts as identities with a type."""
    if layer.type == trt.LayerType.CAST:
        layer.__class__ = trt.ICastLayer  # get_layer gives the base class
        return layer.to_type
    named = layer.type == trt.LayerType.IDENTITY and layer.output_type_is_set(0)
    return layer.get_output_type(0) if named else None


def _outputs(layer: Any) -> list[Any]:
    return [layer.get_output(at) for at in range(layer.num_outputs)]


def _is_float(kinds: Any) -> Callable[[Any], bool]:
    return lambda tensor: tensor.dtype in (kinds.FLOAT, kinds.HALF)


def _logger(trt: Any, journal: Journal) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, text: str) -> None:
            journal.add(severity.name, text)

    return Logger()


def _monitor(trt: Any, progress: Progress) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._phases = Phases()

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            self._phases.start(name, parent, steps)

        def step_complete(self, name: str, step: int) -> bool:
            self._phases.step(name, step)
            progress(self._phases.share)
            return True

        def phase_finish(self, name: str) -> None:
            self._phases.finish(name)
            progress(self._phases.share)

    return Monitor()


def _told(error: Any) -> str:
    where = f"{error.node_operator()} {error.node_name()}" if hasattr(error, "node_name") else f"node {error.node()}"
    return f"{where}: {error.desc()}"
