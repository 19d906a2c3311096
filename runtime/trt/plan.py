"""Plans in a bundle: `engines/<TensorRT>-sm<compute capability>/` with a manifest, and why one cannot be used."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, NonNegativeInt, ValidationError

from dycoke_edge import contract
from dycoke_edge.bundle import Bundle, sha256
from dycoke_edge.config import DType
from dycoke_edge.errors import EngineError
from dycoke_edge.runtime.gpu.device import Device
from dycoke_edge.runtime.trt.profiles import Profile

FORMAT = 1
FOLDER, MANIFEST = "engines", "manifest.json"
DECODER = ("decoder_shallow", "decoder_deep")


class Machine(BaseModel):
    """What a plan is bound to. `cuda` is told, not compared: a plan outlives an update of the driver."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tensorrt: str
    gpu: str
    compute_capability: tuple[int, int]
    cuda: str

    @classmethod
    def of(cls, tensorrt: str, device: Device) -> Machine:
        """This machine."""
        version = device.driver_version
        cuda = f"{version // 1000}.{version % 1000 // 10}"
        return cls(tensorrt=tensorrt, gpu=device.name, compute_capability=device.compute_capability, cuda=cuda)

    @property
    def key(self) -> str:
        """Its folder: 10.3.0-sm87."""
        major, minor = self.compute_capability
        return f"{self.tensorrt}-sm{major}{minor}"


class Plan(BaseModel):
    """One graph's plan, and the files that it was built from, with their sha256."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    file: str
    size: NonNegativeInt
    sha256: str
    onnx: dict[str, str]
    profiles: list[Profile]
    scratch_bytes: NonNegativeInt
    level: int
    workspace: int | None
    fp32_layers: int  # kept in fp32 by name, where TensorRT is not strongly typed
    build_seconds: float
    parity: float  # the largest relative difference from ONNX Runtime


class Engines(BaseModel):
    """`manifest.json`: the plans of one machine."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int
    made_by: str
    machine: Machine
    precision: DType
    plans: dict[str, Plan]


def folder(bundle: Bundle, machine: Machine) -> Path:
    """Where a machine's plans are."""
    return bundle.path / FOLDER / machine.key


def sources(bundle: Bundle, graph: str) -> tuple[Path, dict[str, str]]:
    """The ONNX file that TensorRT builds a graph from, and the sha256 of it and of the weights that it names.

    It is the form for TensorRT where the bundle has one, else the portable one.
    """
    listed = bundle.manifest.files
    form = contract.FORMS.get((graph, "tensorrt"), graph)
    file = f"onnx/{form}.onnx" if f"onnx/{form}.onnx" in listed else f"onnx/{graph}.onnx"
    content = (bundle.path / file).read_bytes()
    data = [name for name in listed if name.endswith(".data") and Path(name).name.encode() in content]
    return bundle.path / file, {name: listed[name].sha256 for name in (file, *data)}


def rebuild(bundle: Bundle, options: str = "") -> str:
    """The command that makes plans anew."""
    return f"run: dycoke-edge build {bundle.path}{options}"


def read(path: Path) -> Engines:
    """A folder's manifest; EngineError if it cannot be read."""
    file = path / MANIFEST
    try:
        return Engines.model_validate_json(file.read_bytes())
    except (OSError, ValidationError) as error:
        why = error.strerror if isinstance(error, OSError) else str(error).splitlines()[0]
        raise EngineError(f"{file} cannot be read ({why})") from None


def folders(bundle: Bundle) -> Iterator[Path]:
    """Every folder with plans; half-written ones are hidden and have no part in it."""
    found = sorted((bundle.path / FOLDER).glob(f"[!.]*/{MANIFEST}"))
    yield from (file.parent for file in found)


def describe(bundle: Bundle) -> list[dict[str, Any]]:
    """What plans a bundle has, for whom, and whether its graphs are still those they were built from."""
    return [_described(bundle, path) for path in folders(bundle)]


def _described(bundle: Bundle, path: Path) -> dict[str, Any]:
    try:
        engines = read(path)
    except EngineError as error:
        return {"folder": path.name, "error": f"{error}; {rebuild(bundle)}"}
    return {
        "folder": path.name,
        **engines.machine.model_dump(exclude={"compute_capability"}),
        "graphs": sorted(engines.plans),
        "stale": sorted(name for name, plan in engines.plans.items() if why_not(bundle, path, name, plan)),
        "bytes": sum(plan.size for plan in engines.plans.values()),
    }


def find(bundle: Bundle, machine: Machine) -> Engines:
    """The plans for this machine; EngineError with the command to build them if there are none."""
    path = folder(bundle, machine)
    if not (path / MANIFEST).is_file():
        others = " ".join(other.name for other in folders(bundle))
        has = f"has plans for {others}" if others else "has no TensorRT plans"
        raise EngineError(f"{bundle.path} {has}, this machine is {machine.key} ({machine.gpu}); {rebuild(bundle)}")
    try:
        engines = read(path)
    except EngineError as error:
        raise EngineError(f"{error}; {rebuild(bundle)}") from None
    built = engines.machine
    if (built.gpu, built.key) != (machine.gpu, machine.key):
        raise EngineError(
            f"the plans in {path} were built on {built.gpu} with TensorRT {built.tensorrt}, this is {machine.gpu} with "
            f"TensorRT {machine.tensorrt}; {rebuild(bundle)}"
        )
    return engines


def why_not(bundle: Bundle, path: Path, graph: str, plan: Plan) -> str | None:
    """Why a plan cannot be used, without reading it."""
    file = path / plan.file
    if f"onnx/{graph}.onnx" not in bundle.manifest.files:
        return f"{file} is of {graph}, which this bundle does not have"
    if os.path.basename(plan.file) != plan.file or not file.is_file():
        return f"{file} is missing"
    if file.stat().st_size != plan.size:
        return f"{file} has {file.stat().st_size} bytes, not {plan.size}"
    if plan.onnx != sources(bundle, graph)[1]:
        return f"{file} was built from another {graph}.onnx than is in this bundle"
    return None


def checked(bundle: Bundle, machine: Machine, engines: Engines, graph: str) -> tuple[Path, Plan]:
    """A graph's plan; EngineError if it is not there, not whole or of another graph."""
    options = " --graphs vision merge decoder" if graph in DECODER else ""
    path, plan = folder(bundle, machine), engines.plans.get(graph)
    if plan is None:
        raise EngineError(f"{path} has no plan of {graph}; {rebuild(bundle, options)}")
    reason = why_not(bundle, path, graph, plan)
    if reason:
        raise EngineError(f"{reason}; {rebuild(bundle, options)}")
    return path / plan.file, plan


def verify(bundle: Bundle, on_file: Callable[[str], None] = lambda name: None) -> int:
    """Hash every plan of every machine; EngineError names the first that is damaged or of another graph. How many."""
    count = 0
    for path in folders(bundle):
        for graph, plan in read(path).plans.items():
            on_file(f"{FOLDER}/{path.name}/{plan.file}")
            reason = why_not(bundle, path, graph, plan)
            if reason:
                raise EngineError(f"{reason}; {rebuild(bundle)}")
            check_content(bundle, path / plan.file, plan)
            count += 1
    return count


def check_content(bundle: Bundle, file: Path, plan: Plan) -> None:
    """Hash a plan before TensorRT sees it, which trusts what it reads; EngineError if it is damaged."""
    try:
        found = sha256(file)
    except OSError as error:
        raise EngineError(f"{file} cannot be read ({error.strerror}); {rebuild(bundle)}") from None
    if found != plan.sha256:
        raise EngineError(f"{file} is damaged, it does not match its sha256; {rebuild(bundle)}")
