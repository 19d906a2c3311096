"""The decoder's weights in a GPU's memory, each matrix as rows of outputs, so that a warp reads one in one go."""

from __future__ import annotations

from ctypes import c_int32, c_void_p
from dataclasses import dataclass

import numpy as np

from dycoke_edge.bundle import Bundle
from dycoke_edge.contract import Placed, WeightTable
from dycoke_edge.errors import BundleError, EngineError
from dycoke_edge.runtime.gpu.device import Device, DeviceArray
from dycoke_edge.runtime.gpu.kernels import suffix

HEAD_DIMS = (32, 64, 128)  # that kernels/attend.cu is compiled for
MOST_GROUP = 8  # query heads a KV head, likewise
STAGE_BYTES = 64 << 20  # of a matrix that are turned at a time
TILE = 32  # of kernels/rows.cu


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
        self.device, self.spec, self._folder = device, bundle.model, bundle.path / "onnx"
        table = bundle.weight_table()
        self.rms_eps = table.rms_eps
        self.intermediate = table.weights["layers.0.mlp.down_proj.weight"].shape[0]
        self._check()
        self._stage: DeviceArray | None = None
        self.layers = [self._layer(table, i) for i in range(self.spec.num_layers)]
        self.norm = self._vector(table.weights["norm.weight"])
        self.embed = DeviceArray.of(device, bundle.embed_tokens())  # [V+1, E]
        vocab = self.spec.vocab_size
        self.head = self.embed[:vocab] if table.tied else self._matrix(table.weights["lm_head"])  # [V, E]
        self._stage = None

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

    def _layer(self, table: WeightTable, index: int) -> Layer:
        def at(name: str) -> Placed:
            return table.weights[f"layers.{index}.{name}"]

        return Layer(
            self._vector(at("input_layernorm.weight")),
            self._matrix(at("self_attn.qkv.weight")),
            self._vector(at("self_attn.qkv.bias")),
            self._matrix(at("self_attn.o_proj.weight")),
            self._vector(at("post_attention_layernorm.weight")),
            self._matrix(at("mlp.gate_up.weight")),
            self._matrix(at("mlp.down_proj.weight")),
        )

    def _read(self, placed: Placed) -> np.memmap[tuple[int, ...], np.dtype[np.generic]]:
        file = self._folder / placed.file
        try:
            return np.memmap(file, self.spec.numpy_dtype, "r", placed.offset, placed.shape)
        except (OSError, ValueError) as error:
            raise BundleError(f"{file} does not hold what its weight table says ({error}); export again") from None

    def _vector(self, placed: Placed) -> DeviceArray:
        return DeviceArray.of(self.device, np.asarray(self._read(placed)))

    def _matrix(self, placed: Placed) -> DeviceArray:
        """[in, out] on disk, turned on the GPU piece by piece."""
        source = self._read(placed)
        inputs, outputs = source.shape
        turned = DeviceArray.empty(self.device, (outputs, inputs), self.spec.numpy_dtype)
        most = max(1, STAGE_BYTES // source[0].nbytes)
        for start in range(0, inputs, most):
            part = np.asarray(source[start : start + most])
            stage = self._staged(part)
            grid = (-(-outputs // TILE), -(-len(part) // TILE), 1)
            to = turned.address + start * turned.dtype.itemsize
            sizes = c_int32(len(part)), c_int32(outputs), c_int32(inputs)
            kernel = f"transpose_{suffix(turned.dtype)}"
            self.device.kernel(kernel, grid, 8 * TILE, stage, c_void_p(to), *sizes)()
        return turned

    def _staged(self, part: np.ndarray[tuple[int, ...], np.dtype[np.generic]]) -> DeviceArray:
        if self._stage is None or self._stage.nbytes < part.nbytes:
            self._stage = DeviceArray.empty(self.device, (max(part.nbytes, STAGE_BYTES),), np.uint8)
        self.device.upload(self._stage.address, part)
        return self._stage
