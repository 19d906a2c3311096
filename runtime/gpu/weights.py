"""The decoder's weights in a GPU's memory, each matrix as rows of outputs, so that a warp reads one in one go."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dycoke_edge.bundle import Bundle
from dycoke_edge.contract import Placed, WeightTable
from dycoke_edge.errors import EngineError
from dycoke_edge.runtime.gpu.device import Device, DeviceArray
from dycoke_edge.runtime.gpu.stored import Stored

HEAD_DIMS = (32, 64, 128)  # that kernels/attend.cu is compiled for
MOST_GROUP = 8  # query heads a KV head, likewise


@dataclass(frozen=True)
class Layer:
    """One decoder layer. Matrices are [out, in]."""

    input_norm: DeviceArray  # [E]
    qkv: DeviceArray  # [(H+2G) D, E]
    bias: DeviceArray  # [(H+2G) D]
    out: DeviceArray  # [E, H D]
    post_norm: DeviceArray  # [E]
    gate_up: DeviceArray  # [2I, E]
    down: DeviceArray  # [E, I]


class Weights:
    """All of them, uploaded once. BundleError for files that do not fit the table, EngineError for a model that the
    kernels do not cover."""

    def __init__(self, device: Device, bundle: Bundle) -> None:
        self.device, self.spec = device, bundle.model
        table = bundle.weight_table()
        self.rms_eps = table.rms_eps
        self.intermediate = table.weights["layers.0.mlp.down_proj.weight"].shape[0]
        self._check()
        stored = Stored(device, bundle)
        self.layers = [self._layer(stored, table, i) for i in range(self.spec.num_layers)]
        self.norm = stored.vector(table.weights["norm.weight"])
        self.embed = DeviceArray.of(device, bundle.embed_tokens())  # [V+1, E]
        vocab = self.spec.vocab_size
        self.head = self.embed[:vocab] if table.tied else stored.matrix(table.weights["lm_head"])  # [V, E]

    @property
    def nbytes(self) -> int:
        """Bytes that a decode step reads: everything but the embedding table, of which it reads a row."""
        arrays = [getattr(layer, name) for layer in self.layers for name in Layer.__dataclass_fields__]
        return sum(array.nbytes for array in (*arrays, self.norm, self.head))

    def _check(self) -> None:
        spec = self.spec
        width = 16 // np.dtype(spec.numpy_dtype).itemsize
        wrong = [f"{name} {value}" for name, value in (("hidden", spec.hidden_size), ("MLP", self.intermediate))
                 if value % width]  # fmt: skip
        if spec.head_dim not in HEAD_DIMS:
            wrong.append(f"head_dim {spec.head_dim}")
        if spec.num_heads // spec.kv_heads > MOST_GROUP:
            wrong.append(f"{spec.num_heads // spec.kv_heads} query heads a KV head")
        if wrong:
            raise EngineError(f"the CUDA kernels are not made for {', '.join(wrong)}; use --decoder graphs")

    def _layer(self, stored: Stored, table: WeightTable, index: int) -> Layer:
        def at(name: str) -> Placed:
            return table.weights[f"layers.{index}.{name}"]

        return Layer(
            stored.vector(at("input_layernorm.weight")),
            stored.matrix(at("self_attn.qkv.weight")),
            stored.vector(at("self_attn.qkv.bias")),
            stored.matrix(at("self_attn.o_proj.weight")),
            stored.vector(at("post_attention_layernorm.weight")),
            stored.matrix(at("mlp.gate_up.weight")),
            stored.matrix(at("mlp.down_proj.weight")),
        )
