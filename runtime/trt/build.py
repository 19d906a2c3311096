"""`dycoke-edge build`: plans of a bundle's graphs for this machine; checked, then put in place of the old ones.

Plans are written to `engines/.<key>.partial`, compared with ONNX Runtime, and moved. What counts is the manifest, which
is replaced last and at once: a build that is killed leaves the plans there were, and the next one removes what is left.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dycoke_edge import __version__, contract
from dycoke_edge.bundle import Bundle, sha256
from dycoke_edge.config import BuildSpec
from dycoke_edge.contract import Graph
from dycoke_edge.errors import EngineError
from dycoke_edge.parity import Parity
from dycoke_edge.partial import partial
from dycoke_edge.runtime.gpu.device import Device
from dycoke_edge.runtime.trt import parity, room
from dycoke_edge.runtime.trt.compile import Job
from dycoke_edge.runtime.trt.engine import TrtEngine
from dycoke_edge.runtime.trt.plan import FORMAT, MANIFEST, Engines, Machine, Plan, folder, read, sources, why_not
from dycoke_edge.runtime.trt.profiles import Profile, largest, profiles
from dycoke_edge.runtime.trt.versions import Versions
from dycoke_edge.runtime.trt.worker import compile_apart

CACHE = "timing.cache"
Progress = Callable[[str, float], None]  # what is done now, share of the whole in 0..1


@dataclass(frozen=True)
class Built:
    """What a build did."""

    path: Path
    engines: Engines
    new: tuple[str, ...]
    kept: tuple[str, ...]  # built before, and still right
    portable: tuple[str, ...]  # built from the portable graph, for the bundle has no form for TensorRT


def graphs_of(bundle: Bundle, spec: BuildSpec) -> list[Graph]:
    """The graphs that --graphs names, in the order in which they run."""
    kinds = {"vision": "vision", "merge": "merge", "decoder": "decoder"}
    wanted = tuple(kinds[kind] for kind in spec.graphs)
    return [g for g in contract.graphs(bundle.model, bundle.manifest.merge_ratios) if g.name.startswith(wanted)]


def build(
    bundle: Bundle,
    spec: BuildSpec,
    device: Device,
    trt: Versions,
    on_progress: Progress = lambda what, share: None,
    on_parity: Callable[[Parity], None] = lambda parity: None,
) -> Built:
    """Build what is missing or no longer right.

    EngineError if TensorRT refuses, memory or disk are short, or a plan is out of tolerance; UsageError if another
    build is at it. The bundle is then as it was.
    """
    machine, graphs = Machine.of(trt.version, device), graphs_of(bundle, spec)
    target, old = folder(bundle, machine), _old(bundle, machine)
    kept = {} if spec.force else {g.name: old[g.name] for g in graphs if _still_right(bundle, target, g, spec, old)}
    missing = [graph for graph in graphs if graph.name not in kept]
    room.check(room.to_build(bundle, spec, [graph.name for graph in missing]), room.available(bundle.path, device))
    others = {name: plan for name, plan in old.items() if _usable(bundle, target, name, plan)}
    with partial(target, "build", "try again when it is done") as work:
        made = dict[str, Plan]()
        for at, graph in enumerate(missing):
            progress = _part(on_progress, graph.name, at, len(missing))
            made[graph.name] = _make(bundle, graph, spec, device, trt, work, target, progress, on_parity)
        engines = Engines(
            format=FORMAT,
            made_by=f"dycoke-edge {__version__}",
            machine=machine,
            precision=bundle.model.dtype,
            plans=others | kept | made,
        )
        _put_in_place(work, target, engines)
    on_progress("done", 1.0)
    portable = tuple(g.name for g in graphs if _is_portable(bundle, g.name))
    return Built(target, engines, tuple(made), tuple(kept), portable)


def _make(
    bundle: Bundle,
    graph: Graph,
    spec: BuildSpec,
    device: Device,
    trt: Versions,
    work: Path,
    target: Path,
    on_progress: Progress,
    on_parity: Callable[[Parity], None],
) -> Plan:
    """Build one plan and compare it."""
    onnx, hashes = sources(bundle, graph.name)
    cache = work / CACHE
    if not cache.exists() and (target / CACHE).is_file():
        cache.write_bytes((target / CACHE).read_bytes())
    job = Job(
        graph=graph.name,
        onnx=onnx,
        plan=work / f"{graph.name}.plan",
        timing_cache=cache,
        half=bundle.model.dtype == "fp16",
        profiles=profiles(graph, spec),
        workspace=spec.workspace,
        level=spec.level,
    )
    made = compile_apart(job, spec.time_limit, lambda what, share: on_progress(what, 0.9 * share))
    on_progress("checking", 0.9)
    found, scratch = _check(bundle, graph, job, device, trt)
    for one in found:
        on_parity(one)
    digest = sha256(job.plan)
    file = job.plan.rename(work / f"{graph.name}-{digest[:8]}.plan")
    return Plan(
        file=file.name,
        size=file.stat().st_size,
        sha256=digest,
        onnx=hashes,
        profiles=job.profiles,
        scratch_bytes=scratch,
        level=spec.level,
        workspace=spec.workspace,
        fp32_layers=made.fp32_layers,
        build_seconds=round(made.seconds, 3),
        parity=max(one.relative for one in found),
    )


class _OnePlan:
    """A plan that is not in a bundle yet."""

    def __init__(self, job: Job) -> None:
        self._job = job

    def file(self, graph: str) -> tuple[Path, list[Profile]]:
        """As Plans.file."""
        assert graph == self._job.graph
        return self._job.plan, self._job.profiles


def _check(bundle: Bundle, graph: Graph, job: Job, device: Device, trt: Versions) -> tuple[list[Parity], int]:
    """The gate; also the scratch memory that the plan takes."""
    engine = TrtEngine(bundle, _OnePlan(job), device, trt)
    try:
        engine.load(graph.name)
        most = largest(job.profiles[-1], graph)
        found = parity.check(bundle, graph, job.onnx, engine, most.get("F", most.get("B", 1)))
        return found, engine.scratch_bytes(graph.name)
    finally:
        engine.close()


def _old(bundle: Bundle, machine: Machine) -> dict[str, Plan]:
    """The plans there are for exactly this machine; none if they were built elsewhere or cannot be read."""
    try:
        engines = read(folder(bundle, machine))
    except EngineError:
        return {}
    same = (engines.machine.gpu, engines.machine.key) == (machine.gpu, machine.key)
    return engines.plans if same else {}


def _usable(bundle: Bundle, path: Path, name: str, plan: Plan) -> bool:
    return why_not(bundle, path, name, plan) is None and sha256(path / plan.file) == plan.sha256


def _still_right(bundle: Bundle, path: Path, graph: Graph, spec: BuildSpec, old: dict[str, Plan]) -> bool:
    plan = old.get(graph.name)
    if plan is None or not _usable(bundle, path, graph.name, plan):
        return False
    return (plan.profiles, plan.level, plan.workspace) == (profiles(graph, spec), spec.level, spec.workspace)


def _is_portable(bundle: Bundle, graph: str) -> bool:
    return (graph, "tensorrt") in contract.FORMS and sources(bundle, graph)[0].name == f"{graph}.onnx"


def _part(on_progress: Progress, name: str, at: int, count: int) -> Progress:
    return lambda what, share: on_progress(f"{name}: {what}", (at + share) / count)


def _put_in_place(work: Path, target: Path, engines: Engines) -> None:
    """Move the new plans, then say so in the manifest, then remove what it does not name."""
    target.mkdir(exist_ok=True)
    for file in sorted(work.iterdir()):
        if file.suffix in (".plan", ".cache"):
            file.replace(target / file.name)
    manifest = work / MANIFEST
    with manifest.open("w") as out:
        out.write(engines.model_dump_json(indent=1) + "\n")
        out.flush()
        os.fsync(out.fileno())
    _sync(target)
    manifest.replace(target / MANIFEST)
    _sync(target)
    named = {plan.file for plan in engines.plans.values()} | {MANIFEST, CACHE}
    for file in target.iterdir():
        if file.name not in named:
            file.unlink()


def _sync(folder: Path) -> None:
    """Have a folder's names on disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
