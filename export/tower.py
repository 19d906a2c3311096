"""Where the vision encoder's weights lie, for an engine with kernels of its own.

What vision.onnx.data holds byte for byte as the table has it, in the bundle's dtype and [in, out], is read there: all
matrices are. It is looked up by content, so that nothing depends on how the tracer names, orders and shares constants
(biases that are equal are one, biases of zeros none), and what is found is the checkpoint's. The rest, norms of fp16
bundles, positions and short vectors, is written to a file of its own, 0.2 % of the whole.
"""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import onnx
import torch
from onnx import TensorProto

from dycoke_edge.contract import ModelSpec, Placed, VisionTable
from dycoke_edge.export.checkpoint import TORCH_DTYPE
from dycoke_edge.export.graph import lies_at

VECTORS = "vision_vectors.bin"
ACTIVATIONS = ("gelu", "gelu_pytorch_tanh")
Named = tuple[str, torch.Tensor]


def table_of(folder: Path, encoder: Any, spec: ModelSpec) -> VisionTable | None:
    """Write what vision.onnx.data lacks beside it and say where everything is; None, and nothing written, for a tower
    or projector of another kind than kernels are made for."""
    config, act = encoder.config.vision_config, encoder.config.projector_hidden_act
    known = config.model_type == "siglip_vision_model" and config.hidden_act == "gelu_pytorch_tanh"
    if not known or act not in ACTIVATIONS:
        return None
    held, dtype = _held(folder / "vision.onnx"), TORCH_DTYPE[spec.dtype]
    with (folder / VECTORS).open("wb") as out:
        weights = {name: _place(tensor.to(dtype), held, out) for name, tensor in _weights(encoder)}
    return VisionTable(
        heads=config.num_attention_heads,
        head_dim=config.hidden_size // config.num_attention_heads,
        width=config.hidden_size,
        mlp=config.intermediate_size,
        layers=encoder.depth,
        patch=config.patch_size,
        side=config.image_size // config.patch_size,
        epsilon=config.layer_norm_eps,
        projector_act=act,
        weights=weights,
    )


def _held(graph: Path) -> dict[bytes, tuple[str, int]]:
    """File and offset of every constant that a graph has in its data file, by the digest of its bytes."""
    file, tensors = graph.with_name(graph.name + ".data"), onnx.load(graph, load_external_data=False).graph.initializer
    with file.open("rb") as data, mmap.mmap(data.fileno(), 0, access=mmap.ACCESS_READ) as content:
        places = [lies_at(tensor) for tensor in tensors if tensor.data_location == TensorProto.EXTERNAL]
        return {hashlib.sha256(memoryview(content)[place]).digest(): (file.name, place.start) for place in places}


def _place(tensor: torch.Tensor, held: dict[bytes, tuple[str, int]], out: BinaryIO) -> Placed:
    """Where a weight lies; written if it does not yet."""
    array = tensor.contiguous().numpy()
    digest, end = hashlib.sha256(array.data).digest(), out.tell()
    file, offset = held.get(digest, (VECTORS, end))
    if digest not in held:
        out.write(array.data)
    return Placed(file=file, offset=offset, shape=array.shape)


def _weights(encoder: Any) -> Iterator[Named]:
    """As VisionTable names them, one at a time."""
    tower = getattr(encoder.vision_tower, "vision_model", encoder.vision_tower)  # transformers before 5 wraps it
    kernel, places = tower.embeddings.patch_embedding, tower.embeddings.position_embedding.weight
    yield "patch.weight", kernel.weight.flatten(1)
    yield "patch.offset", places.float() + kernel.bias.float()
    for i, layer in enumerate(tower.encoder.layers[: encoder.depth]):
        attention = layer.self_attn
        yield from _norm(f"layers.{i}.norm1", layer.layer_norm1)
        for name, module in (("q", attention.q_proj), ("k", attention.k_proj), ("v", attention.v_proj)):
            yield from _linear(f"layers.{i}.{name}", module)
        yield from _linear(f"layers.{i}.out", attention.out_proj)
        yield from _norm(f"layers.{i}.norm2", layer.layer_norm2)
        yield from _linear(f"layers.{i}.fc1", layer.mlp.fc1)
        yield from _linear(f"layers.{i}.fc2", layer.mlp.fc2)
    for i in (1, 2):
        yield from _linear(f"projector.{i}", encoder.multi_modal_projector[f"linear_{i}"])


def _norm(name: str, module: Any) -> Iterator[Named]:
    norm = getattr(module, "norm", module)  # inside the fp32 island of an fp16 bundle
    yield f"{name}.weight", norm.weight
    yield f"{name}.bias", norm.bias


def _linear(name: str, module: Any) -> Iterator[Named]:
    yield f"{name}.weight", module.weight.T
    yield f"{name}.bias", torch.zeros(module.out_features) if module.bias is None else module.bias
