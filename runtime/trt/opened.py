"""`--provider tensorrt`: finds the plans for this machine, checks that they serve what is asked for."""

from __future__ import annotations

from pathlib import Path

from dycoke_edge import contract
from dycoke_edge.bundle import Bundle
from dycoke_edge.config import EngineSpec
from dycoke_edge.errors import EngineError
from dycoke_edge.runtime.ort_cuda import open_device
from dycoke_edge.runtime.trt import plan
from dycoke_edge.runtime.trt.engine import TrtEngine
from dycoke_edge.runtime.trt.plan import DECODER, Engines, Machine
from dycoke_edge.runtime.trt.profiles import Profile, largest
from dycoke_edge.runtime.trt.versions import load


class BundlePlans:
    """The plans that a bundle has for this machine; each is hashed once, before it is first used."""

    def __init__(self, bundle: Bundle, machine: Machine, engines: Engines) -> None:
        self._bundle, self._machine, self._engines = bundle, machine, engines
        self._whole: set[tuple[str, int]] = set()

    def file(self, graph: str) -> tuple[Path, list[Profile]]:
        """As Plans.file."""
        file, found = plan.checked(self._bundle, self._machine, self._engines, graph)
        seen = (graph, file.stat().st_mtime_ns)
        if seen not in self._whole:
            plan.check_content(self._bundle, file, found)
            self._whole.add(seen)
        return file, found.profiles


def open_trt(bundle: Bundle, spec: EngineSpec) -> TrtEngine:
    """The engine, or an EngineError that says what is missing and the command that makes it."""
    trt = load()
    device = open_device()
    try:
        machine = Machine.of(trt.version, device)
        engines = plan.find(bundle, machine)
        for graph in needed(bundle, spec):
            plan.checked(bundle, machine, engines, graph)
        _check_sizes(bundle, engines, spec)
    except BaseException:
        device.close()
        raise
    return TrtEngine(bundle, BundlePlans(bundle, machine, engines), device, trt)


def needed(bundle: Bundle, spec: EngineSpec) -> list[str]:
    """The graphs that TensorRT runs: vision and merge, and the decoder's where they decode."""
    names = [graph.name for graph in contract.graphs(bundle.model, bundle.manifest.merge_ratios)]
    return names if spec.decoding == "graphs" else [name for name in names if name not in DECODER]


def _check_sizes(bundle: Bundle, engines: Engines, spec: EngineSpec) -> None:
    """Refuse at once what no plan takes."""
    graphs = {graph.name: graph for graph in contract.graphs(bundle.model, bundle.manifest.merge_ratios)}
    for name in needed(bundle, spec):
        most = largest(engines.plans[name].profiles[-1], graphs[name])
        asked = {"F": ("vision_batch", spec.frames_at_a_time)}
        if name in DECODER:
            asked = {"S": ("kv_capacity", spec.kv_capacity), "T": ("prefill_chunk", spec.tokens_at_a_time)}
        for letter, (option, value) in asked.items():
            if letter in most and value > most[letter]:
                flag = "--" + option.replace("_", "-")
                graph_option = " --graphs vision merge decoder" if name in DECODER else ""
                raise EngineError(
                    f"{option}={value} ({flag}) is more than the plan of {name} was built for; use {flag} "
                    f"{most[letter]} or {plan.rebuild(bundle, f'{graph_option} {flag} {value}')}"
                )
