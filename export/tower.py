"""Where the vision encoder's weights lie, for an engine with kernels of its own.

Matrices stay in vision.onnx.data, where the traced graph has them: a linear layer is the MatMul before the Add of its
bias, which the tracer calls as the module calls it. Vectors, which the graphs of fp16 bundles hold in fp32 or not in
one piece, are written once more, 0.2 % of the whole.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from onnx import TensorProto
from torch import nn

from dycoke_edge.contract import ModelSpec, Placed, VisionTable
from dycoke_edge.export.traced import Traced

VECTORS = "vision_vectors.bin"
ACTIVATIONS = ("gelu", "gelu_pytorch_tanh")


def table_of(folder: Path, encoder: Any, spec: ModelSpec) -> VisionTable | None:
    """Write the vectors beside vision.onnx [E = tower's width] and say where everything is; None, and nothing written,
    for a tower or projector of another kind than kernels are made for."""
    config = encoder.config.vision_config
    known = config.model_type == "siglip_vision_model" and config.hidden_act == "gelu_pytorch_tanh"
    if not known or encoder.config.projector_hidden_act not in ACTIVATIONS:
        return None
    if encoder.multi_modal_projector["linear_1"].bias is None:
        return None
    with (folder / VECTORS).open("wb") as out:
        placed = _Places(Traced(folder / "vision.onnx"), encoder, out, np.dtype(spec.numpy_dtype))
        weights = placed.all(encoder)
    return VisionTable(
        heads=config.num_attention_heads,
        head_dim=config.hidden_size // config.num_attention_heads,
        width=config.hidden_size,
        mlp=config.intermediate_size,
        layers=encoder.depth,
        patch=config.patch_size,
        side=config.image_size // config.patch_size,
        epsilon=config.layer_norm_eps,
        projector_act=encoder.config.projector_hidden_act,
        weights=weights,
    )


class _Places:
    """Finds matrices and writes vectors."""

    def __init__(self, graph: Traced, encoder: nn.Module, out: BinaryIO, dtype: np.dtype[Any]) -> None:
        self._graph, self._out, self._dtype = graph, out, dtype
        self._names = {id(module): name for name, module in encoder.named_modules()}

    def all(self, encoder: Any) -> dict[str, Placed]:
        """As VisionTable names them."""
        embeddings, layers = _tower(encoder).embeddings, _tower(encoder).encoder.layers
        kernel = self._external(f"{self._names[id(embeddings.patch_embedding)]}.weight")
        width = kernel.shape[0]
        kernel = kernel.model_copy(update={"shape": (width, int(np.prod(kernel.shape[1:])))})
        places = _numpy(embeddings.position_embedding.weight) + _numpy(embeddings.patch_embedding.bias)
        found = {"patch.weight": kernel, "patch.offset": self._written(places)}
        for i, layer in enumerate(layers[: encoder.depth]):
            attention = layer.self_attn
            found |= self._norm(f"layers.{i}.norm1", layer.layer_norm1)
            for name, module in (("q", attention.q_proj), ("k", attention.k_proj), ("v", attention.v_proj)):
                found |= self._linear(f"layers.{i}.{name}", module)
            found |= self._linear(f"layers.{i}.out", attention.out_proj)
            found |= self._norm(f"layers.{i}.norm2", layer.layer_norm2)
            found |= self._linear(f"layers.{i}.fc1", layer.mlp.fc1) | self._linear(f"layers.{i}.fc2", layer.mlp.fc2)
        for i in (1, 2):
            found |= self._linear(f"projector.{i}", encoder.multi_modal_projector[f"linear_{i}"])
        return found

    def _norm(self, name: str, module: Any) -> dict[str, Placed]:
        norm = getattr(module, "norm", module)  # inside the fp32 island of an fp16 bundle
        return {f"{name}.{part}": self._written(_numpy(getattr(norm, part))) for part in ("weight", "bias")}

    def _linear(self, name: str, module: nn.Linear) -> dict[str, Placed]:
        graph, bias = self._graph, f"{self._names[id(module)]}.bias"
        product, _ = graph.halves(graph.down(bias, "Add"))
        _, weight = graph.halves(graph.up(product, "MatMul"))
        return {f"{name}.weight": self._external(weight), f"{name}.bias": self._written(_numpy(module.bias))}

    def _external(self, constant: str) -> Placed:
        tensor = self._graph.constants[constant]
        if tensor.data_location != TensorProto.EXTERNAL:
            raise self._graph.unknown(f"{constant} does not lie in a file of its own")
        place = {entry.key: entry.value for entry in tensor.external_data}
        return Placed(file=place["location"], offset=int(place["offset"]), shape=tuple(tensor.dims))

    def _written(self, array: NDArray[Any]) -> Placed:
        offset = self._out.tell()
        self._out.write(np.ascontiguousarray(array, self._dtype).data)
        return Placed(file=VECTORS, offset=offset, shape=array.shape)


def _tower(encoder: Any) -> Any:
    """The SigLIP transformer; transformers before 5 wrap it once more."""
    return getattr(encoder.vision_tower, "vision_model", encoder.vision_tower)


def _numpy(parameter: torch.Tensor) -> NDArray[Any]:
    array: NDArray[Any] = parameter.detach().float().numpy()
    return array
