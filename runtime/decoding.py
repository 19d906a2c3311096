"""What decodes: the bundle's decoder graphs, or kernels of our own on a GPU."""

from __future__ import annotations

from dycoke_edge.bundle import Bundle
from dycoke_edge.config import EngineSpec
from dycoke_edge.runtime.engine import Engine, device_of
from dycoke_edge.runtime.gpu.layers import KernelLayers
from dycoke_edge.runtime.layers import GraphLayers
from dycoke_edge.runtime.loop import Layers


def open_layers(bundle: Bundle, engine: Engine, spec: EngineSpec) -> Layers:
    """The layers that `spec.decoder` asks for; EngineError for a model that the kernels are not made for."""
    chunk = spec.tokens_at_a_time
    if spec.decoding == "graphs":
        return GraphLayers(bundle.model, engine, bundle.embed_tokens(), chunk)
    device = device_of(engine)
    assert device is not None, "EngineSpec refuses kernels on the CPU"
    return KernelLayers(bundle, device, chunk, captured=spec.decoding == "captured")
