"""`dycoke-edge build`: TensorRT plans of a bundle's graphs, for the machine that it runs on."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from dycoke_edge import cli_output as output
from dycoke_edge.bundle import Bundle, open_bundle
from dycoke_edge.cli_options import add, add_bundle, command, installed, take
from dycoke_edge.config import BuildSpec
from dycoke_edge.errors import EngineError

if TYPE_CHECKING:
    from dycoke_edge.runtime.gpu.device import Device
    from dycoke_edge.runtime.trt.build import Built
    from dycoke_edge.runtime.trt.versions import Versions


def add_commands(commands: Any) -> None:
    """Add the command to the parser."""
    p = command(
        commands,
        "build",
        build,
        "build TensorRT plans for this machine",
        ("build BUNDLE --dry-run", "build BUNDLE --vision-batch 16 --workspace 1024"),
    )
    add_bundle(p)
    add(p, BuildSpec)
    p.add_argument("--dry-run", action="store_true", help="build nothing; say what memory and disk it takes")
    p.add_argument("--json", action="store_true", help="print JSON")


def build(args: argparse.Namespace) -> None:
    """dycoke-edge build BUNDLE"""
    spec, bundle = take(args, BuildSpec), open_bundle(args.bundle)
    with installed("build", "dycoke-edge", EngineError):
        from dycoke_edge.runtime.trt.build import build as build_plans
    if args.dry_run:
        _dry_run(bundle, spec, args.json)
        return
    trt, device = _machine()
    try:
        with output.progress() as show:
            built = build_plans(bundle, spec, device, trt, show, output.parity)
    finally:
        device.close()
    output.facts(_result(bundle, built), args.json)
    for graph in built.portable:
        output.note(f"{graph} was built from its portable graph: this bundle has no form for TensorRT; export again")


def _machine() -> tuple[Versions, Device]:
    from dycoke_edge.runtime.ort_cuda import open_device
    from dycoke_edge.runtime.trt.versions import load

    return load(), open_device()


def _dry_run(bundle: Bundle, spec: BuildSpec, as_json: bool) -> None:
    """Print needs and what is free. EngineError if the build does not fit; without TensorRT or a GPU, what is missing
    is part of the answer."""
    from dycoke_edge.runtime.trt import room
    from dycoke_edge.runtime.trt.build import graphs_of

    names, device, missing = [graph.name for graph in graphs_of(bundle, spec)], None, None
    machine: dict[str, Any] = {"tensorrt": None, "gpu": None}
    try:
        trt, device = _machine()
        machine = {"tensorrt": trt.version, "gpu": device.name}
    except EngineError as error:
        missing = str(error)
    try:
        needs, have = room.to_build(bundle, spec, names), room.available(bundle.path, device)
    finally:
        if device:
            device.close()
    told = room.as_dict(needs, room.to_run(bundle, spec, names), have)
    output.facts({"bundle": str(bundle.path), **machine, "missing": missing, "graphs": names, **told}, as_json)
    room.check(needs, have)


def _result(bundle: Bundle, built: Built) -> dict[str, Any]:
    """What there is now, graph by graph, and what runs the rest."""
    from dycoke_edge.runtime.trt.plan import DECODER

    plans = built.engines.plans
    return {
        "bundle": str(bundle.path),
        "engines": str(built.path),
        "tensorrt": built.engines.machine.tensorrt,
        "gpu": built.engines.machine.gpu,
        "precision": built.engines.precision,
        "built": list(built.new),
        "kept": list(built.kept),
        "plans": {
            name: {
                "bytes": plan.size,
                "scratch_bytes": plan.scratch_bytes,
                "build_seconds": plan.build_seconds,
                "parity": plan.parity,
                "fp32_layers": plan.fp32_layers,
            }
            for name, plan in plans.items()
        },
        "decoder": "TensorRT plans, with --decoder graphs; else own CUDA kernels"
        if all(name in plans for name in DECODER)
        else "own CUDA kernels",
        "ok": True,
    }
